"""Where a cache's entries lie: each row in a stretch of its own (pages that rows share are in `paged_storage`).

The model's code writes entries by position and reads them back by layer, so another way to keep them is another class
with the methods of `Storage`.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.inference.entry_format import EntryFormat
from dsv3_jax.mesh import BATCH_AXES


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
class RowStorage:
    """Room for N entries of each row; see `Storage`."""

    arrays_LBNx: tuple[jax.Array, ...]
    """Of `EntryFormat.encode`."""
    format: EntryFormat = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, shape: tuple[int, int, int], form: EntryFormat) -> RowStorage:
        """For (layers, rows, capacity), rows spread over the mesh in use."""
        return cls(tuple(_spread(jnp.zeros((*shape, width), dtype)) for width, dtype in form.arrays), form)

    @property
    def capacity(self) -> int:
        return self.arrays_LBNx[0].shape[2]

    def write(self, layer: jax.Array | int, entries_BQW: jax.Array, positions_BQ: jax.Array) -> RowStorage:
        encoded = self.format.encode(entries_BQW)
        return dataclasses.replace(self, arrays_LBNx=tuple(
            write_rows(array, layer, new, positions_BQ)
            for array, new in zip(self.arrays_LBNx, encoded, strict=True)))

    def read(self, layer: jax.Array | int, dtype: jnp.dtype) -> jax.Array:
        return self.format.decode(tuple(jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
                                        for array in self.arrays_LBNx), dtype)

    def rounded(self, entries_BQW: jax.Array) -> jax.Array:
        return self.format.decode(self.format.encode(entries_BQW), entries_BQW.dtype)


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
    return _spread(jax.lax.scatter(values_LBNW, index_BQ2, rows_BQW.astype(values_LBNW.dtype), dimensions,
                                   mode=jax.lax.GatherScatterMode.FILL_OR_DROP))


def _spread(x_LBNW: jax.Array) -> jax.Array:
    """`x` with its rows spread over the mesh in use."""
    if jax.sharding.get_abstract_mesh().empty:
        return x_LBNW
    return jax.lax.with_sharding_constraint(x_LBNW, PartitionSpec(None, BATCH_AXES))
