"""Rotary positions with YaRN (paper 2, sections 2.1.1 and 4.3): of MLA's decoupled query and key, of all of a GQA
head."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ModelConfig, RopeScaling


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _rotation_index(rotations: float, dims: int, theta: float, context: int) -> float:
    """The (fractional) frequency index that turns `rotations` times over `context` positions."""
    return dims * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position for each of the rotary_dim/2 pairs, float64.

    YaRN keeps frequencies that turn often within the original context, divides the slow ones by `factor`, and ramps
    linearly between.
    """
    dims, theta, scaling = config.rotary_dim, config.rope_theta, config.rope_scaling
    base = theta ** (-np.arange(0, dims, 2) / dims)
    if scaling is None:
        return base
    context = scaling.original_max_position_embeddings
    low = max(math.floor(_rotation_index(scaling.beta_fast, dims, theta, context)), 0)
    high = min(math.ceil(_rotation_index(scaling.beta_slow, dims, theta, context)), dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 1e-3), 0, 1)
    return base * (1 - ramp) + base / scaling.factor * ramp


def amplitude(scaling: RopeScaling | None) -> float:
    """Factor on cos and sin: 1 whenever mscale equals mscale_all_dim, as in every published model."""
    if scaling is None:
        return 1.0
    return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(qk_head_dim), times YaRN's temperature mscale^2 when rope_scaling is set."""
    scaling = config.rope_scaling
    temperature = 1.0 if scaling is None else _mscale(scaling.factor, scaling.mscale_all_dim)
    return config.qk_head_dim ** -0.5 * temperature ** 2


def apply_rope(x: jax.Array, positions: jax.Array, config: ModelConfig) -> jax.Array:
    """Rotates adjacent pairs (2i, 2i+1), the layout of DeepSeek's own code and cache.

    Args:
      x: [..., T, H, rotary_dim].
      positions: int [..., T], broadcastable to x's leading dimensions.

    Returns:
      The same shape and dtype; the rotation itself is float32.
    """
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(config), jnp.float32)
    cos, sin = (amplitude(config.rope_scaling) * f(angles)[..., None, :] for f in (jnp.cos, jnp.sin))
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
