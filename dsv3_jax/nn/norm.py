"""Root-mean-square normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * gain, computed in float32 whatever the type of x (paper 2, section 3.3.1)."""

    def __init__(self, width: int, axis: str, eps: float):
        self.weight = nnx.Param(jnp.ones((width,), jnp.float32), axes=(axis,), float32=True)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> the same shape and dtype."""
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * inverse_rms * self.weight[...]).astype(x.dtype)
