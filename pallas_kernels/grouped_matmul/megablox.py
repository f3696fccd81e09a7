"""JAX's own Pallas kernels for TPU, for chips where XLA multiplies every row with every group.

XLA:TPU (libtpu 0.0.52) has a ragged kernel for v5p only. For v4, v5e, v6e and Ironwood it lowers `ragged_dot` to
products of E times the work: 11.5 instead of 2.9 TFLOP for [49152, 7168] x [4, 7168, 4096], as compiled.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

ROW_TILES = (512, 256, 128)
"""Rows of a kernel's tile, the largest that divides them is taken; the columns' tile is WIDTH_TILE."""
WIDTH_TILE = 1024


def serves(rows: int, dtype: jnp.dtype) -> bool:
    """Whether the kernels compute this."""
    return dtype in (jnp.bfloat16, jnp.float32) and rows > 0 and rows % ROW_TILES[-1] == 0


def product(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, alignment: int = 1, *,
            transpose_rhs: bool = False, interpret: bool = False) -> jax.Array:
    """See `api.grouped_matmul`."""
    del alignment
    width, inner = rows_PD.shape[1], weights_EDF.shape[1 if transpose_rhs else 2]
    out_PF = gmm(rows_PD, weights_EDF, group_sizes_E, rows_PD.dtype, _tiling(rows_PD.shape[0], width, inner),
                 transpose_rhs=transpose_rhs, interpret=interpret)
    # The kernel leaves rows past the last group as they were.
    return jnp.where(jnp.arange(rows_PD.shape[0])[:, None] < jnp.sum(group_sizes_E), out_PF, 0)


def weight_gradient(rows_PD: jax.Array, grads_PF: jax.Array, group_sizes_E: jax.Array, alignment: int = 1, *,
                    interpret: bool = False) -> jax.Array:
    """See `api.grouped_wgrad`."""
    del alignment
    tiling = _tiling(rows_PD.shape[0], rows_PD.shape[1], grads_PF.shape[1])
    d_weights = tgmm(rows_PD.swapaxes(0, 1), grads_PF, group_sizes_E, rows_PD.dtype, tiling, interpret=interpret)
    # A group without rows is not visited, so its gradient is whatever was there.
    return jnp.where(group_sizes_E[:, None, None] > 0, d_weights, 0)


def _tiling(rows: int, width: int, inner: int) -> tuple[int, int, int]:
    return next(tile for tile in ROW_TILES if rows % tile == 0), min(WIDTH_TILE, width), min(WIDTH_TILE, inner)
