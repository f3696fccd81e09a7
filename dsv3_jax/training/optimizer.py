"""AdamW whose moments are kept in bf16 beside float32 master weights (paper 2, section 3.3.3)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsv3_jax.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW's direction. The caller multiplies by minus the learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.gradient_clip),
        _state_in(jnp.dtype(config.moment_dtype), optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)),
        optax.add_decayed_weights(config.weight_decay, mask=_matrices))


def _matrices(params: Any) -> Any:
    """True for weights that decay: those with two or more dimensions in one layer. Norm gains do not."""
    return jax.tree.map(lambda variable: variable.replace(len(variable.get_metadata("axes")) > 1), params,
                        is_leaf=lambda x: isinstance(x, nnx.Variable))


def _state_in(dtype: jnp.dtype, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with its floating-point state stored as `dtype` and updated in float32 (optax casts only the first
    moment)."""
    def cast(state: Any, to: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(grads, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)
    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)
