"""Carries the oracle's flat weights into a model."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn.model import DeepSeekV3


def _assign(node: Any, name: str, value: np.ndarray) -> None:
    """Sets the variable at the dotted `name` below `node`, which must have the same shape."""
    *path, last = name.split(".")
    for part in path:
        node = node[int(part)] if part.isdigit() else getattr(node, part)
    variable = getattr(node, last)
    assert variable.get_value().shape == value.shape, (name, variable.get_value().shape, value.shape)
    variable.set_value(value.astype(np.float32))


def _fused(weights: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """A layer's weights below `prefix`, with the experts' gate and up projections side by side."""
    layer = {name[len(prefix):]: value for name, value in weights.items() if name.startswith(prefix)}
    if "mlp.experts.gate_proj" in layer:
        layer["mlp.experts.gate_up_proj"] = np.concatenate(
            [layer.pop("mlp.experts.gate_proj"), layer.pop("mlp.experts.up_proj")], axis=-1)
    return layer


def model_from_oracle(config: ModelConfig, weights: dict[str, np.ndarray]) -> DeepSeekV3:
    """A model that holds exactly `weights` (see `tests.oracle` for their names); every variable must be given."""
    # All in NumPy, and moved at the end: JAX would compile a program for every shape.
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: DeepSeekV3(config, nnx.Rngs(0))))
    model = nnx.merge(graphdef, jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), shapes))
    for name in ("embed_tokens.weight", "norm.weight"):
        _assign(model, name, weights[name])
    _assign(model, "lm_head.weight", weights["lm_head.weight"].T)
    dense = config.first_k_dense_replace
    for stack, indices in (("dense_layers", range(dense)), ("moe_layers", range(dense, config.num_hidden_layers))):
        layers = [_fused(weights, f"layers.{i}.") for i in indices]
        for name in (layers[0] if layers else ()):
            _assign(model, f"{stack}.{name}", np.stack([layer[name] for layer in layers]))
    for k in range(config.num_nextn_predict_layers):
        own = {name[len(f"mtp.{k}."):]: value for name, value in weights.items()
               if name.startswith(f"mtp.{k}.") and not name.startswith(f"mtp.{k}.block.")}
        own |= {f"block.{name}": value for name, value in _fused(weights, f"mtp.{k}.block.").items()}
        for name, value in own.items():
            _assign(model, f"mtp.{k}.{name}", value)
    return nnx.merge(graphdef, jax.device_put(nnx.state(model)))
