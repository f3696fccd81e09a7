"""The Hopper backend of the weight gradient: a persistent loop over tiles of the groups' matrices.

A group's tokens are a range of the operands' last dimension, so its sum is the steps of that range.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_matmul import promotion
from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.hopper import SNAKE_WIDTH, Place, Ref, Tile, Work, block_of, kernel
from pallas_kernels.tuning import tile_for


def gradient(x_AM: jax.Array, x_scales: jax.Array, y_BM: jax.Array, y_scales: jax.Array,
             accumulate_AB: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `api.fp8_wgrad`: one group that has every token."""
    (rows, terms), columns = x_AM.shape, y_BM.shape[0]
    # The sum starts from what is accumulated onto; that is read by threads, which must not reach past its end.
    fused = None if accumulate_AB is None else tile_for("gradient", rows, columns, terms, whole=True)
    tile = fused or tile_for("gradient", rows, columns, terms)
    assert tile is not None
    more = ((0, 0), (0, -terms % BLOCK))
    steps = jnp.full((1,), x_scales.shape[1], jnp.int32)
    out_AB = _gradient(jnp.pad(x_AM, more), x_scales, jnp.pad(y_BM, more), y_scales, jnp.zeros((1,), jnp.int32), steps,
                       accumulate_AB if fused else None, tile, dtype if fused else jnp.float32)[0]
    return (out_AB if accumulate_AB is None or fused else out_AB + accumulate_AB).astype(dtype)


def grouped_gradient(x_AP: jax.Array, x_scales: jax.Array, y_BP: jax.Array, y_scales: jax.Array,
                     group_sizes_E: jax.Array, alignment: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `grouped_fp8_matmul.api.grouped_fp8_wgrad`."""
    del alignment
    tile = tile_for("gradient", x_AP.shape[0], y_BP.shape[0], x_AP.shape[1], group_sizes_E.shape[0])
    assert tile is not None
    steps_E = (group_sizes_E // BLOCK).astype(jnp.int32)
    starts_E = jnp.cumsum(steps_E, dtype=jnp.int32) - steps_E
    return _gradient(x_AP, x_scales, y_BP, y_scales, starts_E, steps_E, None, tile, dtype)


def _gradient(x_AP: jax.Array, x_scales: jax.Array, y_BP: jax.Array, y_scales: jax.Array, starts_E: jax.Array,
              steps_E: jax.Array, accumulate_AB: jax.Array | None, tile: Tile,
              dtype: jax.typing.DTypeLike) -> jax.Array:
    """[E, A, B]: each group's blocks of tokens are the `steps_E` from `starts_E` on."""
    groups, rows, columns = starts_E.shape[0], x_AP.shape[0], y_BP.shape[0]
    down, across = -(-rows // tile.rows), -(-columns // tile.columns)
    added = () if accumulate_AB is None else (accumulate_AB,)

    def work(starts_E, steps_E, x_AP, y_BP, x_scales_KA, y_scales_KB, *more) -> Work:
        *added, out_EAB = more

        def locate(i: jax.Array) -> Place:
            group = jax.lax.div(i, jnp.int32(down * across))
            row, column = plgpu.planar_snake(jax.lax.rem(i, jnp.int32(down * across)), (down, across), 1, SNAKE_WIDTH)
            start = starts_E[group]
            at_row, at_column = row * tile.rows, column * tile.columns

            def values(ref: Ref, at: jax.Array, size: int) -> Callable[[jax.Array], Ref]:
                return lambda k: ref.at[pl.ds(at, size), pl.ds((start + k) * BLOCK, BLOCK)]

            def scales(ref: Ref, at: jax.Array, size: int) -> Callable[[jax.Array], Ref]:
                return lambda k: ref.at[start + k, pl.ds(at, size)]
            blocks = (values(x_AP, at_row, tile.rows), values(y_BP, at_column, tile.columns),
                      scales(x_scales_KA, at_row, tile.rows), scales(y_scales_KB, at_column, tile.columns))
            return Place(steps_E[group], blocks, block_of(out_EAB.at[group], at_row, at_column),
                         block_of(added[0], at_row, at_column) if added else None)
        return Work(jnp.int32(groups * down * across), locate)
    run = kernel("fp8_gradient", work, tile, jax.ShapeDtypeStruct((groups, rows, columns), dtype),
                 promotion.buffers(tile, True), promotion.by_column(tile))
    # A step's scales of neighbouring rows lie side by side then, which TMA asks for.
    return run(starts_E, steps_E, x_AP, y_BP, x_scales.T, y_scales.T, *added)
