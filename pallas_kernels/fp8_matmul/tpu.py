"""The TPU backend of the block-scaled product: a tile's sum over K in float32, scaled every 128 terms.

A tile of the weights stays in VMEM, whole along K, while the tiles of rows of its group pass by. The matrix unit of
TPUs before Ironwood takes bfloat16, which holds every float8_e4m3fn value; Ironwood's takes float8 itself. Where that
unit is 256 terms deep (v6e, Ironwood), a scale every 128 terms leaves half of it idle: the price of such scales there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.grouped_matmul.tiled import tiles_of_groups
from pallas_kernels.targets import device_kind

WEIGHT_BYTES = 4 * 2 ** 20
"""Of the weights' tile; twice that is in VMEM, since the next arrives while this one is in use."""
VMEM_BYTES = 48 * 2 ** 20
"""Asked for: the tiles above, rows, results and scales. Ironwood has 64 MiB, the others more."""
ROWS, COLUMNS = 512, 1024
"""Of a tile, at most."""
PACKED_ROWS = 32
"""Rows of float8 in one register."""


def product(x_MK: jax.Array, x_scales: jax.Array, w_NK: jax.Array, w_scales: jax.Array,
            dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `api.fp8_matmul`: one group that has every row."""
    rows = x_MK.shape[0]
    more = ((0, -rows % PACKED_ROWS), (0, 0))
    x_MK, x_scales = jnp.pad(x_MK, more), jnp.pad(x_scales, more)
    tile = x_MK.shape[0] if rows < BLOCK else even_tile(rows, ROWS)
    tiles = -(-rows // tile)
    return _product(x_MK, x_scales, w_NK[None], w_scales[None], jnp.int32(tiles), jnp.zeros((tiles,), jnp.int32), tile,
                    dtype)[:rows]


def grouped_product(x_PK: jax.Array, x_scales: jax.Array, w_ENK: jax.Array, w_scales: jax.Array,
                    group_sizes_E: jax.Array, alignment: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `grouped_fp8_matmul.api.grouped_fp8_matmul`."""
    tile = next(tile for tile in (512, 256, 128) if alignment % tile == 0)
    return _product(x_PK, x_scales, w_ENK, w_scales, *tiles_of_groups(group_sizes_E, x_PK.shape[0], tile), tile, dtype)


def _product(x_PK: jax.Array, x_scales: jax.Array, w_ENK: jax.Array, w_scales: jax.Array, used: jax.Array,
             group_of_tile: jax.Array, rows: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Each of the first `used` tiles of `rows` rows times the matrix of its group; zero in the others."""
    (total, terms), (groups, width, _) = x_PK.shape, w_ENK.shape
    columns = even_tile(width, min(COLUMNS, max(BLOCK, WEIGHT_BYTES // terms // BLOCK * BLOCK)))

    def body(used_1, group_of_tile, x_ref, x_scales_ref, w_ref, w_scales_ref, out_ref, sum_ref):
        del group_of_tile
        sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(pl.program_id(1) < used_1[0])
        def _():
            @pl.loop(0, terms // BLOCK)
            def _(k):
                at = pl.ds(pl.multiple_of(k * BLOCK, BLOCK), BLOCK)
                sum_ref[...] += scaled_product(x_ref[:, at], x_scales_ref[k], w_ref[:, at], w_scales_ref[k])
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    def last(i, used_1):
        # Unused tiles point to what is in VMEM already.
        return jnp.minimum(i, jnp.maximum(used_1[0] - 1, 0))
    scales = terms // BLOCK
    # A row of scales for every 128 terms: x's are turned into a column, w's are repeated for every column they scale.
    x_scales_K1P = x_scales.T[:, None]
    w_scales_EK1N = jnp.repeat(w_scales.swapaxes(1, 2), BLOCK, axis=2)[:, :, None, :width]
    call = pl.pallas_call(
        body, name="fp8_product",
        out_shape=jax.ShapeDtypeStruct((total, width), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(width, columns), pl.cdiv(total, rows)),
            in_specs=[
                pl.BlockSpec((rows, terms), lambda j, i, used, group: (last(i, used), 0)),
                pl.BlockSpec((scales, 1, rows), lambda j, i, used, group: (0, 0, last(i, used))),
                pl.BlockSpec((None, columns, terms), lambda j, i, used, group: (group[last(i, used)], j, 0)),
                pl.BlockSpec((None, scales, 1, columns), lambda j, i, used, group: (group[last(i, used)], 0, 0, j)),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda j, i, used, group: (i, j)),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"),
                                             vmem_limit_bytes=VMEM_BYTES))
    return call(used[None].astype(jnp.int32), jnp.minimum(group_of_tile, groups - 1).astype(jnp.int32), x_PK,
                x_scales_K1P, w_ENK, w_scales_EK1N)


def even_tile(size: int, most: int) -> int:
    """Multiple of 128, or all of a smaller size, in as few tiles as `most` allows and as even as those can be."""
    if size <= BLOCK:
        return size
    tiles = -(-size // most)
    return -(-size // (tiles * BLOCK)) * BLOCK


def scaled_product(x_XK: jax.Array, x_scales_1X: jax.Array, y_YK: jax.Array, y_scales_1Y: jax.Array) -> jax.Array:
    """x y^T of 128 terms in float32, times the scales of rows and columns."""
    if not _multiplies_float8():
        x_XK, y_YK = x_XK.astype(jnp.bfloat16), y_YK.astype(jnp.bfloat16)
    sums_XY = jax.lax.dot_general(x_XK, y_YK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return sums_XY * x_scales_1X.T * y_scales_1Y


def _multiplies_float8() -> bool:
    return "7x" in device_kind("tpu", "")
