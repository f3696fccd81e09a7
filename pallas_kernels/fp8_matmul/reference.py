"""The oracle: dequantised to float32, one product."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128
"""Terms of the sum that share a scale, and columns of a weight's block."""


def dequantised(values_XK: jax.Array, scales: jax.Array) -> jax.Array:
    """Values times the scales of their 1x128 tiles, float32. [..., X, K], [..., X, ceil(K/128)]."""
    return values_XK.astype(jnp.float32) * jnp.repeat(scales, BLOCK, axis=-1)[..., :values_XK.shape[-1]]


def dequantised_blocks(w_NK: jax.Array, scales: jax.Array) -> jax.Array:
    """Weights times the scales of their 128x128 blocks, float32. [..., N, K], [..., ceil(N/128), ceil(K/128)]."""
    return dequantised(w_NK, jnp.repeat(scales, BLOCK, axis=-2)[..., :w_NK.shape[-2], :])


def product(x_MK: jax.Array, x_scales: jax.Array, w_NK: jax.Array, w_scales: jax.Array,
            dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `api.fp8_matmul`."""
    return jax.lax.dot_general(dequantised(x_MK, x_scales), dequantised_blocks(w_NK, w_scales),
                               (((1,), (1,)), ((), ())), precision="highest",
                               preferred_element_type=jnp.float32).astype(dtype)
