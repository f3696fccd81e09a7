"""What a cache keeps of a token in one layer: the values as they are, or in 8 bits with scales."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

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


class EntryFormat(Protocol):
    """Entries of W values as arrays of other widths."""

    @property
    def arrays(self) -> tuple[tuple[int, jnp.dtype], ...]:
        """Width and type of each array."""

    @property
    def scales(self) -> int | None:
        """Which of them holds scales."""

    def encode(self, entries: jax.Array) -> tuple[jax.Array, ...]:
        """[..., W] -> the arrays, [..., width] each."""

    def decode(self, arrays: tuple[jax.Array, ...], dtype: jnp.dtype) -> jax.Array:
        """The arrays -> [..., W] in `dtype`."""


@dataclasses.dataclass(frozen=True)
class PlainFormat:
    """Entries as they are, in one floating-point type; see `EntryFormat`."""

    width: int
    dtype: jnp.dtype

    @property
    def arrays(self) -> tuple[tuple[int, jnp.dtype], ...]:
        return ((self.width, self.dtype),)

    @property
    def scales(self) -> int | None:
        return None

    def encode(self, entries: jax.Array) -> tuple[jax.Array, ...]:
        return (entries.astype(self.dtype),)

    def decode(self, arrays: tuple[jax.Array, ...], dtype: jnp.dtype) -> jax.Array:
        return arrays[0].astype(dtype)


@dataclasses.dataclass(frozen=True)
class EightBitFormat:
    """Entries in 8 bits with a float32 scale a tile, and what does not bear that in bf16; see `EntryFormat`.

    For DeepSeek-V3's latent 512 codes, 4 scales and the 64 rotary values in bf16: 656 bytes, the layout of
    DeepSeek-V3.2's cache.
    """

    layout: EntryLayout
    dtype: jnp.dtype
    """float8_e4m3fn or int8."""

    @property
    def arrays(self) -> tuple[tuple[int, jnp.dtype], ...]:
        coded = (sum(self.layout.parts), self.dtype), (self.layout.tiles, jnp.dtype(jnp.float32))
        return (*coded, (self.layout.plain, jnp.dtype(jnp.bfloat16))) if self.layout.plain else coded

    @property
    def scales(self) -> int | None:
        return 1

    def encode(self, entries: jax.Array) -> tuple[jax.Array, ...]:
        *parts, plain = jnp.split(entries, _starts(self.layout), axis=-1)
        codes, scales = zip(*(quantize(part, self.dtype) for part in parts), strict=True)
        coded = jnp.concatenate(codes, axis=-1), jnp.concatenate(scales, axis=-1)
        return (*coded, plain.astype(jnp.bfloat16)) if self.layout.plain else coded

    def decode(self, arrays: tuple[jax.Array, ...], dtype: jnp.dtype) -> jax.Array:
        codes, scales, *plain = arrays
        starts, tiles = _starts(self.layout), _starts(EntryLayout(tuple(-(-w // TILE) for w in self.layout.parts)))
        parts = [dequantize(c, s, dtype) for c, s in zip(jnp.split(codes, starts[:-1], axis=-1),
                                                         jnp.split(scales, tiles[:-1], axis=-1), strict=True)]
        return jnp.concatenate([*parts, *(x.astype(dtype) for x in plain)], axis=-1)


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


def _starts(layout: EntryLayout) -> list[int]:
    """Where each part but the first begins, and where the plain values do."""
    return [sum(layout.parts[:index + 1]) for index in range(len(layout.parts))]
