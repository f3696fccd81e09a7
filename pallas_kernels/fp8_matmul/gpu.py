"""The Hopper backend of the block-scaled product: a persistent loop over tiles of the output, each of one group."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_matmul import promotion
from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.grouped_matmul.tiled import tiles_of_groups
from pallas_kernels.hopper import SNAKE_WIDTH, Place, Ref, Tile, Work, block_of, kernel
from pallas_kernels.tuning import tile_for

ROW_MULTIPLE = 8
"""TMA cuts what it reads into 8 rows of 128 bytes; tiles that reach past the last of these are filled with zeros."""


def product(x_MK: jax.Array, x_scales: jax.Array, w_NK: jax.Array, w_scales: jax.Array,
            dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `api.fp8_matmul`: one group that has every row."""
    rows, terms = x_MK.shape
    tile = tile_for("product", rows, w_NK.shape[0], terms)
    assert tile is not None
    more = ((0, -rows % ROW_MULTIPLE), (0, 0))
    used = -(-rows // tile.rows)
    out_PN = _product(jnp.pad(x_MK, more), jnp.pad(x_scales, more), w_NK[None], w_scales[None], jnp.int32(used),
                      jnp.zeros((used,), jnp.int32), tile, dtype)
    return out_PN[:rows]


def grouped_product(x_PK: jax.Array, x_scales: jax.Array, w_ENK: jax.Array, w_scales: jax.Array,
                    group_sizes_E: jax.Array, alignment: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `grouped_fp8_matmul.api.grouped_fp8_matmul`."""
    del alignment  # a multiple of every tile's rows
    rows, terms = x_PK.shape
    tile = tile_for("product", rows, w_ENK.shape[1], terms, w_ENK.shape[0])
    assert tile is not None
    return _product(x_PK, x_scales, w_ENK, w_scales, *tiles_of_groups(group_sizes_E, rows, tile.rows), tile, dtype)


def _product(x_PK: jax.Array, x_scales: jax.Array, w_ENK: jax.Array, w_scales: jax.Array, used: jax.Array,
             group_of_tile: jax.Array, tile: Tile, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Each of the first `used` tiles of rows times the matrix of its group; zero in the others."""
    (rows, terms), columns = x_PK.shape, w_ENK.shape[1]
    column_tiles, last_block = -(-columns // tile.columns), w_scales.shape[1] - 1

    def work(used_1, group_of_tile, x_PK, x_scales_KP, w_ENK, w_scales, out_PN) -> Work:
        used = used_1[0]

        def locate(i: jax.Array) -> Place:
            row, column = plgpu.planar_snake(i, (used, column_tiles), 1, SNAKE_WIDTH)
            group = group_of_tile[row]
            at_row, at_column = pl.ds(row * tile.rows, tile.rows), pl.ds(column * tile.columns, tile.columns)
            w = w_ENK.at[group]

            def scale(k: jax.Array, inside: jax.Array) -> jax.Array:
                # A tile may reach past the last block; what is there is not written.
                block = jnp.minimum(jax.lax.div(column * tile.columns + inside, jnp.int32(BLOCK)), last_block)
                return w_scales[group, block, k]

            def terms_of(k: jax.Array) -> Ref:
                return pl.ds(k * BLOCK, BLOCK)
            blocks = (lambda k: x_PK.at[at_row, terms_of(k)], lambda k: w.at[at_column, terms_of(k)],
                      lambda k: x_scales_KP.at[k, at_row])
            return Place(terms // BLOCK, blocks, block_of(out_PN, row * tile.rows, column * tile.columns), scale)

        def unused(i: jax.Array) -> Callable[..., Ref]:
            row, column = jax.lax.div(i, jnp.int32(column_tiles)), jax.lax.rem(i, jnp.int32(column_tiles))
            return block_of(out_PN, (used + row) * tile.rows, column * tile.columns)
        return Work(used * column_tiles, locate, ((-(-rows // tile.rows) - used) * column_tiles, unused))
    run = kernel("fp8_product", work, tile, jax.ShapeDtypeStruct((rows, columns), dtype),
                 promotion.buffers(tile, False), promotion.by_block(tile))
    # A step's scales of neighbouring rows lie side by side then, which TMA asks for.
    return run(used[None].astype(jnp.int32), group_of_tile.astype(jnp.int32), x_PK, x_scales.T, w_ENK, w_scales)
