"""A float8 sum on Hopper: the tensor cores' accumulator is taken out every 128 terms, scaled, and added in float32.

The tensor cores add float8 products with about 14 bits; 128 terms are four `wgmma` instructions (DeepSeek-V3, section
3.3.2). While one consumer scales and adds, the other's product runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.hopper import Place, Ref, Ring, Sum, Tile, swizzled


def buffers(tile: Tile, columns_have_scales: bool) -> Sequence[Any]:
    """Of the ring: both operands' [rows, 128 terms], then the scales of the rows and, if they have, of the columns."""
    values = [swizzled((tile.slots, size, BLOCK), jnp.float8_e4m3fn) for size in (tile.rows, tile.columns)]
    sizes = (tile.rows, tile.columns) if columns_have_scales else (tile.rows,)
    return [*values, *(plgpu.SMEM((tile.slots, size), jnp.float32) for size in sizes)]


def by_block(tile: Tile) -> Sum:
    """Columns share a scale in blocks of 128: `place.extra(k, column)` is it, for a column of the tile."""
    return functools.partial(_add, tile, math.gcd(BLOCK, tile.part[1]), False)


def by_column(tile: Tile) -> Sum:
    """Every column has a scale; `place.extra` is None, or what `Place.out` is, for what the sum starts from."""
    return functools.partial(_add, tile, tile.part[1], True)


def _add(tile: Tile, width: int, columns_have_scales: bool, ring: Ring, place: Place, consumer: jax.Array,
         turn: jax.Array) -> tuple[list[tuple[int, jax.Array]], jax.Array]:
    rows, columns = tile.part
    row, column = tile.origin(consumer)
    firsts = range(0, columns, width)

    def scaled(sums: jax.Array, x_scales: jax.Array, w_scale: jax.Array) -> jax.Array:
        if columns_have_scales:
            return sums * (_wide(x_scales, sums, 0) * _wide(w_scale, sums, 1))
        return sums * _wide(x_scales * w_scale, sums, 0)

    def step(k: jax.Array, carry: tuple) -> tuple:
        turn, totals = carry
        slot = ring.slot(turn)
        x, w, x_scales, *w_scales = (buffer.at[slot] for buffer in ring.buffers)
        if not columns_have_scales:  # from device memory, on its way while the blocks arrive
            blocks = [place.extra(k, column + first) for first in firsts]
        plgpu.barrier_wait(ring.full.at[slot])

        def multiply(acc: Ref) -> tuple:
            plgpu.wgmma(acc, x.at[pl.ds(row, rows)], w.at[pl.ds(column, columns)].transpose((1, 0)))
            plgpu.wgmma_wait(1)  # waits for nothing, and keeps what follows from coming between the instructions
            down = x_scales[pl.ds(row, rows)]
            across = [w_scales[0][pl.ds(column, width)]] if columns_have_scales else blocks
            plgpu.commit_smem()  # These were read by threads; TMA, which writes the slot next, must come after.
            plgpu.wgmma_wait(0)
            return acc[...], down, across
        sums, down, across = pl.run_scoped(multiply, plgpu.ACC((rows, columns), jnp.float32))
        plgpu.barrier_arrive(ring.free.at[slot])
        return turn + 1, tuple(total + scaled(sums[:, first:first + width], down, scale)
                               for first, total, scale in zip(firsts, totals, across, strict=True))
    zeros = [jnp.zeros((rows, width), jnp.float32) for _ in firsts]
    if columns_have_scales and place.extra is not None:
        zeros = [place.extra(row, column, rows, width)[...]]
    turn, totals = jax.lax.fori_loop(0, place.steps, step, (turn, tuple(zeros)))
    return list(zip(firsts, totals, strict=True)), turn


def _wide(vector: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    return jax.lax.broadcast_in_dim(vector, like.shape, (axis,))
