"""The persistent loop of the Hopper kernels: what a tile's sum is, each kernel says itself.

A block of threads per streaming multiprocessor walks over tiles of the output. One of its three warpgroups copies
blocks of the operands into a ring of slots in shared memory; the other two multiply them, each half of the tile, and
write the result. Every slot has two barriers: `full`, when the copies have landed, and `free`, when both consumers have
read it. The ring turns on from one tile to the next, so the copies for a tile start while the tile before is still
being multiplied and written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

MULTIPROCESSORS = 132
"""Of an H100 or H200 SXM. Another count is correct too, only less even."""

CONSUMERS = 2
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
"""A thread; (40 + 2 * 232) * 128 threads is just under the 65536 registers of a multiprocessor."""

SNAKE_WIDTH = 8
"""Output tiles in flight form a patch this many tiles wide: 8 * 256 columns beside 16 * 128 rows share reads in L2."""

Ref = Any


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a block of threads covers its tile of the output."""

    rows: int
    columns: int
    slots: int
    """Of the ring: as many as fit in 227 KiB beside the 32 KiB through which results leave."""

    @property
    def by_rows(self) -> bool:
        """Whether the consumers share the tile by rows; else by columns. `wgmma` takes 64 rows at a time."""
        return self.rows == 64 * CONSUMERS

    @property
    def part(self) -> tuple[int, int]:
        """Rows and columns of one consumer."""
        return (self.rows // CONSUMERS, self.columns) if self.by_rows else (self.rows, self.columns // CONSUMERS)

    def origin(self, consumer: jax.Array) -> tuple[Any, Any]:
        """First row and column of a consumer's part in the tile."""
        return (consumer * self.part[0], 0) if self.by_rows else (0, consumer * self.part[1])


class Place(NamedTuple):
    """One tile of the output: how many steps its sum has, what a step copies into each buffer, and where it goes."""

    steps: int | jax.Array
    blocks: tuple[Callable[[jax.Array], Ref], ...]
    out: Callable[[Any, Any, int, int], Ref]
    extra: Any = None
    """What else a kernel's sum needs of the tile."""


class Work(NamedTuple):
    """What a kernel does: tiles to compute, and how many to fill with zero and where they lie."""

    tiles: int | jax.Array
    locate: Callable[[jax.Array], Place]
    unused: tuple[jax.Array, Callable[[jax.Array], Callable[..., Ref]]] | None = None


class Ring(NamedTuple):
    """The slots in shared memory, one buffer an operand, and their barriers."""

    buffers: tuple[Ref, ...]
    full: Ref
    free: Ref

    def slot(self, turn: jax.Array) -> jax.Array:
        """Where the block of this turn lies."""
        return jax.lax.rem(turn, jnp.int32(self.buffers[0].shape[0]))


Sum = Callable[[Ring, Place, jax.Array, jax.Array], tuple[list[tuple[int, jax.Array]], jax.Array]]
"""(ring, place, consumer, first turn) -> (the sum of the consumer's part, as (first column, float32 [rows, columns]),
and the turn after the last)."""


def block_of(ref: Ref, row: jax.Array, column: jax.Array) -> Callable[[Any, Any, int, int], Ref]:
    """(first row, first column, rows, columns) inside the tile at (row, column) -> that piece of `ref`."""
    return lambda r, c, rows, columns: ref.at[pl.ds(row + r, rows), pl.ds(column + c, columns)]


def swizzled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, beyond: int = 0) -> Any:
    """Shared memory in 8 rows by 128 bytes, or a shorter row, swizzled: TMA and `wgmma` then meet no bank conflict.

    `beyond` is the width of the array in device memory, if whole rows of 128 bytes may not divide it: TMA wants that.
    """
    itemsize = jnp.dtype(dtype).itemsize
    width = min(128, shape[-1] * itemsize)
    if beyond * itemsize > width:
        width = math.gcd(width, beyond * itemsize)
    # mypy takes a method of jax's base class for an abstract one.
    tiling = plgpu.TilingTransform((8, width // itemsize))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(width)  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def kernel(name: str, work: Callable[..., Work], tile: Tile, out: jax.ShapeDtypeStruct, buffers: Sequence[Any],
           add: Sum) -> Callable[..., jax.Array]:
    """The function of `work`'s operands that runs it as a persistent kernel.

    `work` has references to the operands and to the result. `buffers` are the ring's, [slots, ...] in shared memory.
    """
    def body(*refs):
        operands, scratch = refs[:-len(buffers) - 3], refs[-len(buffers) - 3:]
        *slots, out_slots, full, free = scratch
        todo, ring = work(*operands), Ring(tuple(slots), full, free)
        warpgroup = jax.lax.axis_index("warpgroup")

        @pl.when(warpgroup == CONSUMERS)
        def _():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            _produce(todo, tile, ring)

        @pl.when(warpgroup < CONSUMERS)
        def _():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            _consume(todo, tile, ring, add, warpgroup, out_slots.at[warpgroup])
    body.__name__ = name
    piece = 64, min(128 // out.dtype.itemsize, tile.part[1])
    return plgpu.kernel(
        body, out_type=out, grid=(MULTIPROCESSORS,), grid_names=("multiprocessor",), num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types=[
            *buffers,
            swizzled((CONSUMERS, 2, *piece), out.dtype),
            plgpu.Barrier(num_arrivals=len(buffers), num_barriers=tile.slots),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.slots),
        ])


def _produce(todo: Work, tile: Tile, ring: Ring) -> None:
    """Copies every block of every tile into the next slot, as soon as it is free."""
    @plgpu.nd_loop((todo.tiles,), collective_axes="multiprocessor", init_carry=jnp.int32(0))
    def turns(info, carry):
        place = todo.locate(info.index[0])

        def copy(k: jax.Array, turn: jax.Array) -> jax.Array:
            slot = ring.slot(turn)
            plgpu.barrier_wait(ring.free.at[slot])
            for block, buffer in zip(place.blocks, ring.buffers, strict=True):
                plgpu.copy_gmem_to_smem(block(k), buffer.at[slot], ring.full.at[slot])
            return turn + 1
        return jax.lax.fori_loop(0, place.steps, copy, carry)

    # No warpgroup may still be on its way to a barrier when the block ends.
    @pl.loop(0, tile.slots)
    def _(i):
        plgpu.barrier_wait(ring.free.at[ring.slot(turns + i)])


def _consume(todo: Work, tile: Tile, ring: Ring, add: Sum, consumer: jax.Array, out_slots: Ref) -> None:
    """Sums the slots as they fill, and writes each tile when its sum is done."""
    origin = tile.origin(consumer)

    @pl.loop(0, tile.slots)
    def _(slot):
        plgpu.barrier_arrive(ring.free.at[slot])

    @plgpu.nd_loop((todo.tiles,), collective_axes="multiprocessor", init_carry=jnp.int32(0))
    def _(info, carry):
        place = todo.locate(info.index[0])
        total, turn = add(ring, place, consumer, carry)
        _write([(column, part.astype(out_slots.dtype)) for column, part in total], place.out, origin, out_slots)
        return turn
    if todo.unused is not None:
        _write_zeros(*todo.unused, tile, origin, out_slots)
    plgpu.wait_smem_to_gmem(0)


def _write(total: list[tuple[int, jax.Array]], out: Callable[..., Ref], origin: tuple[Any, Any],
           out_slots: Ref) -> None:
    """Registers to shared memory to device memory, piece by piece, two pieces in flight."""
    rows, columns = out_slots.shape[1:]
    pieces = [(r, first + c, part[r:r + rows, c:c + columns]) for first, part in total
              for r in range(0, part.shape[0], rows) for c in range(0, part.shape[1], columns)]
    # The last piece of the tile before may still leave through slot 1, unless an odd count took slot 0 last.
    in_flight = 1 if len(pieces) % 2 == 0 else 0
    for i, (r, c, piece) in enumerate(pieces):
        plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
        out_slots[i % 2] = piece
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_slots.at[i % 2], out(origin[0] + r, origin[1] + c, rows, columns))


def _write_zeros(tiles: jax.Array, locate: Callable[[jax.Array], Callable[..., Ref]], tile: Tile,
                 origin: tuple[Any, Any], out_slots: Ref) -> None:
    """The tiles past the last group: one slot of zeros, copied to each piece."""
    rows, columns = out_slots.shape[1:]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_slots[0] = jnp.zeros((rows, columns), out_slots.dtype)
    plgpu.commit_smem()

    @plgpu.nd_loop((tiles,), collective_axes="multiprocessor")
    def _(info):
        out = locate(info.index[0])
        for r in range(0, tile.part[0], rows):
            for c in range(0, tile.part[1], columns):
                plgpu.copy_smem_to_gmem(out_slots.at[0], out(origin[0] + r, origin[1] + c, rows, columns))
