"""The Hopper backend: bfloat16 tiles through TMA and `wgmma`, for groups padded to whole tiles of rows.

XLA lowers `ragged_dot` on NVIDIA GPUs to a dense product of every row with every group: E times the work and a copy of
the rows for each group. Here every tile of rows belongs to one group, so a tile is an ordinary matrix product with the
matrix of its group, and nothing is masked.

Both kernels are the persistent loop of `pallas_kernels.hopper`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.tiled import tiles_of_groups
from pallas_kernels.hopper import SNAKE_WIDTH, Place, Ref, Ring, Tile, Work, block_of, kernel, swizzled

BLOCK_K = 64
"""Terms of the sum in one slot: 128 bytes of bfloat16, one row of the widest swizzle."""

TILES = {(rows, columns): Tile(rows, columns, slots)
         for rows, columns, slots in ((128, 256, 4), (128, 128, 6), (64, 256, 4), (64, 128, 8))}


def product(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, alignment: int, *,
            transpose_rhs: bool = False) -> jax.Array:
    """See `api.grouped_matmul`; weights are read as they lie."""
    rows, terms = rows_PD.shape
    columns = weights_EDF.shape[1 if transpose_rhs else 2]
    tile = tile_for(alignment, columns)
    used, group_of_tile = tiles_of_groups(group_sizes_E, rows, tile.rows)
    b_block = (tile.columns, BLOCK_K) if transpose_rhs else (BLOCK_K, tile.columns)
    column_tiles = columns // tile.columns

    def work(used_1, group_of_tile, x_PD, w_EDF, out_PF) -> Work:
        used = used_1[0]

        def locate(i: jax.Array) -> Place:
            row, column = plgpu.planar_snake(i, (used, column_tiles), 1, SNAKE_WIDTH)
            w = w_EDF.at[group_of_tile[row]]

            def b(k: jax.Array) -> Ref:
                at = pl.ds(k * BLOCK_K, BLOCK_K), pl.ds(column * tile.columns, tile.columns)
                return w.at[at[::-1] if transpose_rhs else at]
            x = x_PD.at[pl.ds(row * tile.rows, tile.rows)]
            return Place(terms // BLOCK_K, (lambda k: x.at[:, pl.ds(k * BLOCK_K, BLOCK_K)], b),
                         block_of(out_PF, row * tile.rows, column * tile.columns))

        def unused(i: jax.Array) -> Callable[..., Ref]:
            row, column = jax.lax.div(i, jnp.int32(column_tiles)), jax.lax.rem(i, jnp.int32(column_tiles))
            return block_of(out_PF, (used + row) * tile.rows, column * tile.columns)
        return Work(used * column_tiles, locate, ((rows // tile.rows - used) * column_tiles, unused))
    shape = jax.ShapeDtypeStruct((rows, columns), rows_PD.dtype)
    run = _kernel("grouped_product", work, tile, shape, (tile.rows, BLOCK_K), b_block, False, transpose_rhs)
    return run(used[None].astype(jnp.int32), group_of_tile.astype(jnp.int32), rows_PD, weights_EDF)


def weight_gradient(rows_PD: jax.Array, grads_PF: jax.Array, group_sizes_E: jax.Array,
                    alignment: int = BLOCK_K) -> jax.Array:
    """See `api.grouped_wgrad`."""
    del alignment
    groups, width, inner = group_sizes_E.shape[0], rows_PD.shape[1], grads_PF.shape[1]
    tile = tile_for(128, inner)
    down, across = width // tile.rows, inner // tile.columns
    ends_E = jnp.cumsum(group_sizes_E, dtype=jnp.int32)

    def work(starts_E, steps_E, x_PD, dy_PF, out_EDF) -> Work:
        def locate(i: jax.Array) -> Place:
            group = jax.lax.div(i, jnp.int32(down * across))
            row, column = plgpu.planar_snake(jax.lax.rem(i, jnp.int32(down * across)), (down, across), 1, SNAKE_WIDTH)
            start = pl.multiple_of(starts_E[group], BLOCK_K)

            def block(ref: Ref, at: jax.Array, size: int) -> Callable[[jax.Array], Ref]:
                return lambda k: ref.at[pl.ds(start + k * BLOCK_K, BLOCK_K), pl.ds(at * size, size)]
            return Place(steps_E[group], (block(x_PD, row, tile.rows), block(dy_PF, column, tile.columns)),
                         block_of(out_EDF.at[group], row * tile.rows, column * tile.columns))
        return Work(jnp.int32(groups * down * across), locate)
    shape = jax.ShapeDtypeStruct((groups, width, inner), rows_PD.dtype)
    blocks = (BLOCK_K, tile.rows), (BLOCK_K, tile.columns)
    run = _kernel("grouped_weight_gradient", work, tile, shape, *blocks, True, False)
    return run((ends_E - group_sizes_E).astype(jnp.int32), (group_sizes_E // BLOCK_K).astype(jnp.int32),
               rows_PD, grads_PF)


def tile_for(alignment: int, columns: int) -> Tile:
    """The largest that alignment and columns allow."""
    return TILES[128 if alignment % 128 == 0 else 64, 256 if columns % 256 == 0 else 128]


def _kernel(name: str, work: Callable[..., Work], tile: Tile, out: jax.ShapeDtypeStruct, a_block: tuple[int, int],
            b_block: tuple[int, int], transpose_a: bool, transpose_b: bool) -> Callable:
    """The function (two int32 vectors, a, b) -> out that runs `work` as a persistent kernel."""
    buffers = [swizzled((tile.slots, *block), jnp.bfloat16) for block in (a_block, b_block)]
    add = functools.partial(_accumulate, functools.partial(_operands, tile, transpose_a, transpose_b), tile.part)
    return kernel(name, work, tile, out, buffers, add)


def _operands(tile: Tile, transpose_a: bool, transpose_b: bool, ring: Ring, consumer: jax.Array,
              slot: jax.Array) -> tuple[Ref, Ref]:
    """A consumer's [rows, k] and [k, columns] of a slot; a transpose is only another way to read it."""
    a, b = (buffer.at[slot] for buffer in ring.buffers)
    rows, columns = tile.part
    if tile.by_rows:
        mine = pl.ds(consumer * rows, rows)
        a = a.at[:, mine] if transpose_a else a.at[mine]
    else:
        mine = pl.ds(consumer * columns, columns)
        b = b.at[mine] if transpose_b else b.at[:, mine]
    return a.transpose((1, 0)) if transpose_a else a, b.transpose((1, 0)) if transpose_b else b


def _accumulate(operands: Callable[..., tuple[Ref, Ref]], part: tuple[int, int], ring: Ring, place: Place,
                consumer: jax.Array, turn: jax.Array) -> tuple[list[tuple[int, jax.Array]], jax.Array]:
    """The sum stays in the tensor cores' accumulator from the first step to the last."""
    def accumulate(acc: Ref) -> jax.Array:
        def multiply(k: jax.Array, turn: jax.Array) -> jax.Array:
            slot = ring.slot(turn)
            plgpu.barrier_wait(ring.full.at[slot])
            plgpu.wgmma(acc, *operands(ring, consumer, slot))
            plgpu.wgmma_wait(1)

            # One product is left running; the one before has finished reading its slot.
            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(ring.free.at[ring.slot(turn - 1)])
            return turn + 1
        end = jax.lax.fori_loop(0, place.steps, multiply, turn)
        plgpu.wgmma_wait(0)

        @pl.when(place.steps > 0)
        def _():
            plgpu.barrier_arrive(ring.free.at[ring.slot(end - 1)])
        return acc[...]
    total = pl.run_scoped(accumulate, plgpu.ACC(part, jnp.float32))
    return [(0, total)], turn + place.steps
