"""A cache in pages: rows hold as many as their tokens fill, in any order, and may share those of a common beginning.

Pages are spread over the devices as rows are, and a row has pages of its own device only: tables count from the first
page of the device. Devices that share rows (`mesh.context`) have the same pages, each all of them.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.inference.entry_format import EntryFormat
from dsv3_jax.mesh import BATCH_AXES, TOKENS, context_size, on_each_device

PAGES, ROWS = PartitionSpec(None, BATCH_AXES), PartitionSpec(BATCH_AXES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedStorage:
    """Entries in P pages of S each, and the pages of B rows; see `Storage`."""

    arrays_LPSx: tuple[jax.Array, ...]
    """Of `EntryFormat.encode`, but scales are [L, P, x, S]: those of neighbouring entries side by side, as kernels want
    them."""
    table_BJ: jax.Array
    """int32: the page of each S positions of a row, counted from its device's first; -1 for none."""
    format: EntryFormat = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, layers: int, pages: int, size: int, form: EntryFormat) -> PagedStorage:
        """For no rows yet; to be laid out by PAGES.

        Args:
          pages: P, of all devices together.
          size: S, positions of a page.
        """
        arrays = tuple(jnp.zeros((layers, pages, *((width, size) if number == form.scales else (size, width))), dtype)
                       for number, (width, dtype) in enumerate(form.arrays))
        return cls(arrays, jnp.zeros((0, 0), jnp.int32), form)

    @property
    def page_size(self) -> int:
        """S."""
        return self.arrays_LPSx[0].shape[2]

    @property
    def capacity(self) -> int:
        return self.table_BJ.shape[1] * self.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return sum(math.prod(x.shape) // x.shape[1] * x.dtype.itemsize for x in self.arrays_LPSx)

    def of_rows(self, table_BJ: jax.Array) -> PagedStorage:
        """The same pages for these rows."""
        return dataclasses.replace(self, table_BJ=table_BJ)

    def write(self, layer: jax.Array | int, entries_BQW: jax.Array, positions_BQ: jax.Array) -> PagedStorage:
        size, pages = self.page_size, self.arrays_LPSx[0].shape[1]

        def local(arrays: tuple[jax.Array, ...], encoded: tuple[jax.Array, ...], table_BJ: jax.Array,
                  positions_BQ: jax.Array, layer: jax.Array) -> tuple[jax.Array, ...]:
            if context_size() > 1:
                encoded, positions_BQ = jax.lax.all_gather((encoded, positions_BQ), "context", axis=1, tiled=True)
            place_BQ = positions_BQ // size
            page_BQ = jnp.take_along_axis(table_BJ, jnp.clip(place_BQ, 0, table_BJ.shape[1] - 1), axis=1)
            is_there = (positions_BQ >= 0) & (place_BQ < table_BJ.shape[1]) & (page_BQ >= 0)
            page_BQ = jnp.where(is_there, page_BQ, pages)  # outside: dropped
            slot_BQ = positions_BQ % size
            return tuple(array.at[(layer, page_BQ, slice(None), slot_BQ) if number == self.format.scales
                                  else (layer, page_BQ, slot_BQ)].set(new, mode="drop")
                         for number, (array, new) in enumerate(zip(arrays, encoded, strict=True)))
        write = on_each_device(local, (PAGES, TOKENS, ROWS, TOKENS, PartitionSpec()), PAGES)
        arrays = write(self.arrays_LPSx, self.format.encode(entries_BQW), self.table_BJ, positions_BQ,
                       jnp.asarray(layer))
        return dataclasses.replace(self, arrays_LPSx=arrays)

    def read(self, layer: jax.Array | int, dtype: jnp.dtype) -> jax.Array:
        def local(arrays: tuple[jax.Array, ...], table_BJ: jax.Array, layer: jax.Array) -> tuple[jax.Array, ...]:
            # A place without a page reads page 0: nobody looks at positions beyond the row's length.
            found = [array[layer, jnp.maximum(table_BJ, 0)] for array in arrays]
            if self.format.scales is not None:
                found[self.format.scales] = jnp.swapaxes(found[self.format.scales], -1, -2)
            return tuple(x.reshape(x.shape[0], -1, x.shape[-1]) for x in found)
        read = on_each_device(local, (PAGES, ROWS, PartitionSpec()), ROWS)
        return self.format.decode(read(self.arrays_LPSx, self.table_BJ, jnp.asarray(layer)), dtype)

    def rounded(self, entries_BQW: jax.Array) -> jax.Array:
        return self.format.decode(self.format.encode(entries_BQW), entries_BQW.dtype)
