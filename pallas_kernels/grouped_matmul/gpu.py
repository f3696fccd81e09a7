"""The Hopper backend: bfloat16 tiles through TMA and `wgmma`, for groups padded to whole tiles of rows.

XLA lowers `ragged_dot` on NVIDIA GPUs to a dense product of every row with every group: E times the work and a copy of
the rows for each group. Here every tile of rows belongs to one group, so a tile is an ordinary matrix product with the
matrix of its group, and nothing is masked.

Both kernels are one persistent loop. A block of threads per streaming multiprocessor walks over tiles of the output.
One of its three warpgroups copies blocks of the operands into a ring of slots in shared memory; the other two multiply
them, each half of the tile, and write the result. Every slot has two barriers: `full`, when the copies have landed, and
`free`, when both consumers have read it. The ring turns on from one tile to the next, so the copies for a tile start
while the tile before is still being multiplied and written.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.tiled import tiles_of_groups

MULTIPROCESSORS = 132
"""Of an H100 or H200 SXM. Another count is correct too, only less even."""

BLOCK_K = 64
"""Terms of the sum in one slot: 128 bytes of bfloat16, one row of the widest swizzle."""

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


TILES = {(rows, columns): Tile(rows, columns, slots)
         for rows, columns, slots in ((128, 256, 4), (128, 128, 6), (64, 256, 4), (64, 128, 8))}


def product(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, alignment: int, *,
            transpose_rhs: bool = False) -> jax.Array:
    """rows of group e times weights[e], or its transpose, in rows' dtype; zero past the last group."""
    rows, terms = rows_PD.shape
    columns = weights_EDF.shape[1 if transpose_rhs else 2]
    tile = _tile(alignment, columns)
    used, group_of_tile = tiles_of_groups(group_sizes_E, rows, tile.rows)
    b_block = (tile.columns, BLOCK_K) if transpose_rhs else (BLOCK_K, tile.columns)
    column_tiles = columns // tile.columns

    def work(used_1, group_of_tile, x_PD, w_EDF, out_PF) -> _Work:
        used = used_1[0]

        def locate(i: jax.Array) -> _Place:
            row, column = plgpu.planar_snake(i, (used, column_tiles), 1, SNAKE_WIDTH)
            w = w_EDF.at[group_of_tile[row]]

            def b(k: jax.Array) -> Ref:
                at = pl.ds(k * BLOCK_K, BLOCK_K), pl.ds(column * tile.columns, tile.columns)
                return w.at[at[::-1] if transpose_rhs else at]
            x = x_PD.at[pl.ds(row * tile.rows, tile.rows)]
            return _Place(terms // BLOCK_K, lambda k: x.at[:, pl.ds(k * BLOCK_K, BLOCK_K)], b,
                          _block_of(out_PF, row * tile.rows, column * tile.columns))

        def unused(i: jax.Array) -> Callable[..., Ref]:
            row, column = jax.lax.div(i, jnp.int32(column_tiles)), jax.lax.rem(i, jnp.int32(column_tiles))
            return _block_of(out_PF, (used + row) * tile.rows, column * tile.columns)
        return _Work(used * column_tiles, locate, ((rows // tile.rows - used) * column_tiles, unused))
    shape = jax.ShapeDtypeStruct((rows, columns), rows_PD.dtype)
    run = _kernel("grouped_product", work, tile, shape, (tile.rows, BLOCK_K), b_block, False, transpose_rhs)
    return run(used[None].astype(jnp.int32), group_of_tile.astype(jnp.int32), rows_PD, weights_EDF)


def weight_gradient(rows_PD: jax.Array, grads_PF: jax.Array, group_sizes_E: jax.Array, *,
                    dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """x^T dy of each group, [E, D, F], summed in float32 and rounded once to `dtype`; zero for an empty group."""
    groups, width, inner = group_sizes_E.shape[0], rows_PD.shape[1], grads_PF.shape[1]
    tile = _tile(128, inner)
    down, across = width // tile.rows, inner // tile.columns
    ends_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)

    def work(starts_E, steps_E, x_PD, dy_PF, out_EDF) -> _Work:
        def locate(i: jax.Array) -> _Place:
            group = jax.lax.div(i, jnp.int32(down * across))
            row, column = plgpu.planar_snake(jax.lax.rem(i, jnp.int32(down * across)), (down, across), 1, SNAKE_WIDTH)
            start = pl.multiple_of(starts_E[group], BLOCK_K)

            def block(ref: Ref, at: jax.Array, size: int) -> Callable[[jax.Array], Ref]:
                return lambda k: ref.at[pl.ds(start + k * BLOCK_K, BLOCK_K), pl.ds(at * size, size)]
            return _Place(steps_E[group], block(x_PD, row, tile.rows), block(dy_PF, column, tile.columns),
                          _block_of(out_EDF.at[group], row * tile.rows, column * tile.columns))
        return _Work(jnp.int32(groups * down * across), locate)
    shape = jax.ShapeDtypeStruct((groups, width, inner), dtype)
    blocks = (BLOCK_K, tile.rows), (BLOCK_K, tile.columns)
    run = _kernel("grouped_weight_gradient", work, tile, shape, *blocks, True, False)
    return run((ends_E - group_sizes_E).astype(jnp.int32), (group_sizes_E // BLOCK_K).astype(jnp.int32),
               rows_PD, grads_PF)


def gradients(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, grads_PF: jax.Array,
              alignment: int) -> tuple[jax.Array, jax.Array]:
    """With respect to rows and weights; the weights are read as they lie, and their gradient is rounded once."""
    return (product(grads_PF, weights_EDF, group_sizes_E, alignment, transpose_rhs=True),
            weight_gradient(rows_PD, grads_PF, group_sizes_E, dtype=weights_EDF.dtype))


def _tile(alignment: int, columns: int) -> Tile:
    return TILES[128 if alignment % 128 == 0 else 64, 256 if columns % 256 == 0 else 128]


class _Place(NamedTuple):
    """One tile of the output: how many steps its sum has, the operands' blocks of a step, and where it goes."""

    steps: int | jax.Array
    a: Callable[[jax.Array], Ref]
    b: Callable[[jax.Array], Ref]
    out: Callable[[Any, Any, int, int], Ref]


class _Work(NamedTuple):
    """What a kernel does: tiles to compute, and how many to fill with zero and where they lie."""

    tiles: jax.Array
    locate: Callable[[jax.Array], _Place]
    unused: tuple[jax.Array, Callable[[jax.Array], Callable[..., Ref]]] | None = None


def _block_of(ref: Ref, row: jax.Array, column: jax.Array) -> Callable[[Any, Any, int, int], Ref]:
    """(first row, first column, rows, columns) inside the tile at (row, column) -> that piece of `ref`."""
    return lambda r, c, rows, columns: ref.at[pl.ds(row + r, rows), pl.ds(column + c, columns)]


class _Ring(NamedTuple):
    """The slots in shared memory and their barriers."""

    a: Ref
    b: Ref
    full: Ref
    free: Ref


def _swizzled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
    """Shared memory in 8 rows by 128 bytes, swizzled: what TMA writes and `wgmma` reads without bank conflicts."""
    # mypy takes a method of jax's base class for an abstract one.
    tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(128)  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=(tiling, swizzle))


def _kernel(name: str, work: Callable[..., _Work], tile: Tile, out: jax.ShapeDtypeStruct, a_block: tuple[int, int],
            b_block: tuple[int, int], transpose_a: bool, transpose_b: bool) -> Callable:
    """The function (two int32 vectors, a, b) -> out that runs `work` as a persistent kernel."""
    def body(first, second, a, b, out, a_slots, b_slots, out_slots, full, free):
        todo = work(first, second, a, b, out)
        ring = _Ring(a_slots, b_slots, full, free)
        consumer = jax.lax.axis_index("warpgroup")

        @pl.when(consumer == CONSUMERS)
        def _():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            _produce(todo, tile, ring)

        @pl.when(consumer < CONSUMERS)
        def _():
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            operands = functools.partial(_operands, tile, consumer, ring, transpose_a, transpose_b)
            origin = (consumer * tile.part[0], 0) if tile.by_rows else (0, consumer * tile.part[1])
            _consume(todo, tile, ring, operands, origin, out_slots.at[consumer])
    body.__name__ = name
    return plgpu.kernel(
        body, out_type=out, grid=(MULTIPROCESSORS,), grid_names=("multiprocessor",), num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types=[
            _swizzled((tile.slots, *a_block), jnp.bfloat16),
            _swizzled((tile.slots, *b_block), jnp.bfloat16),
            _swizzled((CONSUMERS, 2, 64, 128 // out.dtype.itemsize), out.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=tile.slots),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tile.slots),
        ])


def _operands(tile: Tile, consumer: jax.Array, ring: _Ring, transpose_a: bool, transpose_b: bool,
              slot: jax.Array) -> tuple[Ref, Ref]:
    """A consumer's [rows, k] and [k, columns] of a slot; a transpose is only another way to read it."""
    a, b = ring.a.at[slot], ring.b.at[slot]
    rows, columns = tile.part
    if tile.by_rows:
        mine = pl.ds(consumer * rows, rows)
        a = a.at[:, mine] if transpose_a else a.at[mine]
    else:
        mine = pl.ds(consumer * columns, columns)
        b = b.at[mine] if transpose_b else b.at[:, mine]
    return a.transpose((1, 0)) if transpose_a else a, b.transpose((1, 0)) if transpose_b else b


def _produce(todo: _Work, tile: Tile, ring: _Ring) -> None:
    """Copies every block of every tile into the next slot, as soon as it is free."""
    @plgpu.nd_loop((todo.tiles,), collective_axes="multiprocessor", init_carry=jnp.int32(0))
    def turns(info, carry):
        place = todo.locate(info.index[0])

        def copy(k: jax.Array, turn: jax.Array) -> jax.Array:
            slot = jax.lax.rem(turn, jnp.int32(tile.slots))
            plgpu.barrier_wait(ring.free.at[slot])
            plgpu.copy_gmem_to_smem(place.a(k), ring.a.at[slot], ring.full.at[slot])
            plgpu.copy_gmem_to_smem(place.b(k), ring.b.at[slot], ring.full.at[slot])
            return turn + 1
        return jax.lax.fori_loop(0, place.steps, copy, carry)

    # No warpgroup may still be on its way to a barrier when the block ends.
    @pl.loop(0, tile.slots)
    def _(i):
        plgpu.barrier_wait(ring.free.at[jax.lax.rem(turns + i, jnp.int32(tile.slots))])


def _consume(todo: _Work, tile: Tile, ring: _Ring, operands: Callable[[jax.Array], tuple[Ref, Ref]],
             origin: tuple[Any, Any], out_slots: Ref) -> None:
    """Multiplies the slots as they fill, and writes each tile when its sum is done."""
    @pl.loop(0, tile.slots)
    def _(slot):
        plgpu.barrier_arrive(ring.free.at[slot])

    @plgpu.nd_loop((todo.tiles,), collective_axes="multiprocessor", init_carry=jnp.int32(0))
    def _(info, carry):
        place = todo.locate(info.index[0])

        def accumulate(acc: Ref) -> jax.Array:
            def multiply(k: jax.Array, turn: jax.Array) -> jax.Array:
                slot = jax.lax.rem(turn, jnp.int32(tile.slots))
                plgpu.barrier_wait(ring.full.at[slot])
                plgpu.wgmma(acc, *operands(slot))
                plgpu.wgmma_wait(1)

                # One product is left running; the one before has finished reading its slot.
                @pl.when(k > 0)
                def _():
                    plgpu.barrier_arrive(ring.free.at[jax.lax.rem(turn - 1, jnp.int32(tile.slots))])
                return turn + 1
            end = jax.lax.fori_loop(0, place.steps, multiply, carry)
            plgpu.wgmma_wait(0)

            @pl.when(place.steps > 0)
            def _():
                plgpu.barrier_arrive(ring.free.at[jax.lax.rem(end - 1, jnp.int32(tile.slots))])
            return acc[...]
        total = pl.run_scoped(accumulate, plgpu.ACC(tile.part, jnp.float32))
        _write(total.astype(out_slots.dtype), place.out, origin, out_slots)
        return carry + place.steps
    if todo.unused is not None:
        _write_zeros(*todo.unused, tile, origin, out_slots)
    plgpu.wait_smem_to_gmem(0)


def _pieces(shape: tuple[int, ...], out_slots: Ref) -> list[tuple[int, int]]:
    """First row and column of each piece of a consumer's part that fits in one of its two output slots."""
    rows, columns = out_slots.shape[1:]
    return [(r, c) for r in range(0, shape[0], rows) for c in range(0, shape[1], columns)]


def _write(total: jax.Array, out: Callable[..., Ref], origin: tuple[Any, Any], out_slots: Ref) -> None:
    """Registers to shared memory to device memory, piece by piece, two pieces in flight."""
    rows, columns = out_slots.shape[1:]
    pieces = _pieces(total.shape, out_slots)
    # The last piece of the tile before may still leave through slot 1, unless there was one piece and it took slot 0.
    in_flight = 1 if len(pieces) % 2 == 0 else 0
    for i, (r, c) in enumerate(pieces):
        plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
        out_slots[i % 2] = total[r:r + rows, c:c + columns]
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
        for r, c in _pieces(tile.part, out_slots):
            plgpu.copy_smem_to_gmem(out_slots.at[0], out(origin[0] + r, origin[1] + c, rows, columns))
