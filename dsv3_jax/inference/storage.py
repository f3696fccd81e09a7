"""How a cache's entries lie in memory: as they are, or in 8 bits with scales.

The model's code writes entries by position and reads them back by layer, so another format is another class with the
methods of `Storage`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.mesh import BATCH_AXES

TILE = 128
"""Values that share a scale, as activations in training do (paper 2, section 3.3.2); the last tile may be shorter."""


class EntryLayout(NamedTuple):
    """The values of one token in one layer, in order."""

    parts: tuple[int, ...]
    """Widths of what may be kept in 8 bits; no tile reaches over two of them."""
    plain: int = 0
    """Width of what follows and is kept in bf16 then."""

    @property
    def width(self) -> int:
        return sum(self.parts) + self.plain

    @property
    def tiles(self) -> int:
        """Scales of an entry in 8 bits."""
        return sum(-(-width // TILE) for width in self.parts)


class Storage(Protocol):
    """Entries of W values for each layer, row and position; a pytree."""

    @property
    def capacity(self) -> int:
        """N: positions of a row."""

    def write(self, layer: jax.Array | int, entries_BQW: jax.Array, positions_BQ: jax.Array) -> Self:
        """Keeps entries of one layer at int32 positions of their rows; those outside [0, N) are dropped."""

    def read(self, layer: jax.Array | int, dtype: jnp.dtype) -> jax.Array:
        """All entries of one layer, [B, N, W]; what was never written may be anything."""

    def rounded(self, entries_BQW: jax.Array) -> jax.Array:
        """What `read` would give of entries once they are written, in their dtype."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlainStorage:
    """Entries as they are, in one floating-point type; see `Storage`."""

    values_LBNW: jax.Array

    @property
    def capacity(self) -> int:
        return self.values_LBNW.shape[2]

    def write(self, layer: jax.Array | int, entries_BQW: jax.Array, positions_BQ: jax.Array) -> PlainStorage:
        return PlainStorage(write_rows(self.values_LBNW, layer, entries_BQW, positions_BQ))

    def read(self, layer: jax.Array | int, dtype: jnp.dtype) -> jax.Array:
        return _layer(self.values_LBNW, layer).astype(dtype)

    def rounded(self, entries_BQW: jax.Array) -> jax.Array:
        return entries_BQW.astype(self.values_LBNW.dtype).astype(entries_BQW.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedStorage:
    """Entries in 8 bits with a float32 scale a tile, and what does not bear that in bf16; see `Storage`.

    For DeepSeek-V3's latent 512 codes, 4 scales and the 64 rotary values in bf16: 656 bytes, the layout of
    DeepSeek-V3.2's cache.
    """

    codes_LBNQ: jax.Array
    """float8_e4m3fn or int8."""
    scales_LBNS: jax.Array
    plain_LBNP: jax.Array | None
    layout: EntryLayout = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, shape: tuple[int, int, int], layout: EntryLayout, dtype: jnp.dtype) -> QuantizedStorage:
        """For (layers, rows, capacity)."""
        plain = spread(jnp.zeros((*shape, layout.plain), jnp.bfloat16)) if layout.plain else None
        return cls(spread(jnp.zeros((*shape, sum(layout.parts)), dtype)),
                   spread(jnp.zeros((*shape, layout.tiles), jnp.float32)), plain, layout)

    @property
    def capacity(self) -> int:
        return self.codes_LBNQ.shape[2]

    def write(self, layer: jax.Array | int, entries_BQW: jax.Array, positions_BQ: jax.Array) -> QuantizedStorage:
        codes, scales, plain = self._encode(entries_BQW)
        return dataclasses.replace(
            self, codes_LBNQ=write_rows(self.codes_LBNQ, layer, codes, positions_BQ),
            scales_LBNS=write_rows(self.scales_LBNS, layer, scales, positions_BQ),
            plain_LBNP=None if self.plain_LBNP is None else write_rows(self.plain_LBNP, layer, plain, positions_BQ))

    def read(self, layer: jax.Array | int, dtype: jnp.dtype) -> jax.Array:
        plain = None if self.plain_LBNP is None else _layer(self.plain_LBNP, layer)
        return self._decode(_layer(self.codes_LBNQ, layer), _layer(self.scales_LBNS, layer), plain, dtype)

    def rounded(self, entries_BQW: jax.Array) -> jax.Array:
        return self._decode(*self._encode(entries_BQW), entries_BQW.dtype)

    def _encode(self, entries: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        starts = _starts(self.layout)
        *parts, plain = jnp.split(entries, starts, axis=-1)
        codes, scales = zip(*(quantize(part, self.codes_LBNQ.dtype) for part in parts), strict=True)
        return jnp.concatenate(codes, axis=-1), jnp.concatenate(scales, axis=-1), plain.astype(jnp.bfloat16)

    def _decode(self, codes: jax.Array, scales: jax.Array, plain: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        starts, tiles = _starts(self.layout), _starts(EntryLayout(tuple(-(-w // TILE) for w in self.layout.parts)))
        parts = [dequantize(c, s, dtype) for c, s in zip(jnp.split(codes, starts[:-1], axis=-1),
                                                         jnp.split(scales, tiles[:-1], axis=-1), strict=True)]
        return jnp.concatenate(parts if plain is None else [*parts, plain.astype(dtype)], axis=-1)


def quantize(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """[..., W] -> (codes [..., W], float32 scales [..., tiles]): the greatest value of a tile is the format's greatest.

    `codes * scale` is x to half a step: |x| / 16 and scale * 2^-10 at the least for float8 (3 bits after the point,
    smallest step 2^-9), scale / 2 for int8; scale is the tile's greatest |x| over 448 or 127.
    """
    limit = float(jnp.iinfo(dtype).max if dtype == jnp.int8 else jnp.finfo(dtype).max)
    width, x = x.shape[-1], x.astype(jnp.float32)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -width % TILE)])
    tiles = x.reshape(*x.shape[:-1], -1, TILE)
    # The floor keeps a tile of zeros from dividing by zero.
    scales = jnp.maximum(jnp.max(jnp.abs(tiles), axis=-1), 1e-30) / limit
    scaled = tiles / scales[..., None]
    codes = (jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype)
    return codes.reshape(x.shape)[..., :width], scales


def dequantize(codes: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `quantize`, in `dtype`."""
    each = jnp.repeat(scales, TILE, axis=-1)[..., :codes.shape[-1]]
    return (codes.astype(jnp.float32) * each).astype(dtype)


def write_rows(values_LBNW: jax.Array, layer: jax.Array | int, rows_BQW: jax.Array,
               positions_BQ: jax.Array) -> jax.Array:
    """`values[layer, b, positions[b, q]] = rows[b, q]`, in place where the buffer may be; positions outside [0, N) are
    dropped. Rows stay on the devices that hold them."""
    index_BQ2 = jnp.stack([jnp.full_like(positions_BQ, layer), positions_BQ], axis=-1)
    # Spelt out, because B is a batch dimension of both sides: by `values.at[...]` it would be an index like another,
    # and the partitioner would gather the cache.
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2,), inserted_window_dims=(0, 2), scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,), scatter_indices_batching_dims=(0,))
    return spread(jax.lax.scatter(values_LBNW, index_BQ2, rows_BQW.astype(values_LBNW.dtype), dimensions,
                                  mode=jax.lax.GatherScatterMode.FILL_OR_DROP))


def spread(x_LBNW: jax.Array) -> jax.Array:
    """`x` with its rows spread over the mesh in use."""
    if jax.sharding.get_abstract_mesh().empty:
        return x_LBNW
    return jax.lax.with_sharding_constraint(x_LBNW, PartitionSpec(None, BATCH_AXES))


def _layer(values_LBNW: jax.Array, layer: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(values_LBNW, layer, keepdims=False)


def _starts(layout: EntryLayout) -> list[int]:
    """Where each part but the first begins, and where the plain values do."""
    return [sum(layout.parts[:index + 1]) for index in range(len(layout.parts))]
