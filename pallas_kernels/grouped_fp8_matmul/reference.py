"""A loop over tiles of one group each, dequantised to float32: only the work that there is."""

from __future__ import annotations

import jax

from pallas_kernels.fp8_matmul.reference import dequantised, dequantised_blocks
from pallas_kernels.grouped_matmul import tiled


def product(x_PK: jax.Array, x_scales: jax.Array, w_ENK: jax.Array, w_scales: jax.Array, group_sizes_E: jax.Array,
            alignment: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `api.grouped_fp8_matmul`."""
    w_EKN = dequantised_blocks(w_ENK, w_scales).swapaxes(1, 2)
    return tiled.product(dequantised(x_PK, x_scales), w_EKN, group_sizes_E, alignment).astype(dtype)


def gradient(x_AP: jax.Array, x_scales: jax.Array, y_BP: jax.Array, y_scales: jax.Array, group_sizes_E: jax.Array,
             alignment: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `api.grouped_fp8_wgrad`."""
    x_PA, y_PB = (dequantised(*pair).T for pair in ((x_AP, x_scales), (y_BP, y_scales)))
    return tiled.weight_gradient(x_PA, y_PB, group_sizes_E, alignment).astype(dtype)
