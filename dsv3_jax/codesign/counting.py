"""Parameters and training FLOPs of a model, counted on the model itself."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.nn.model import DeepSeekV3


class ParameterCount(NamedTuple):
    """Numbers of weights. Router biases are state and not counted."""

    main: int
    """Embedding, layers, final norm and head."""
    activated: int
    """Of `main`, those one token uses: K of the routed experts, and all of embedding and head."""
    activated_without_embedding: int
    """`activated` less the embedding table, of which a token reads one row."""
    mtp: int
    """Weights of the multi-token-prediction modules beyond the shared embedding and head."""
    mtp_layer: int
    """Of `mtp`, those of the transformer layers, without projection and norms: what DeepSeek's weight notes count."""
    mtp_activated: int
    by_part: dict[str, int]
    """Weights by part of the model; sums to main + mtp."""


@functools.cache
def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the weights of the model that `config` builds, without allocating it."""
    state = jax.eval_shape(lambda: nnx.state(DeepSeekV3(config, nnx.Rngs(0)), nnx.Param))
    by_part: dict[str, int] = {}
    activated = {"main": 0, "mtp": 0}
    total = {"main": 0, "mtp": 0}
    mtp_layer = 0
    for path, variable in nnx.to_flat_state(state):
        size = math.prod(variable.get_value().shape)
        side = "mtp" if path[0] == "mtp" else "main"
        routed = "experts" in path
        total[side] += size
        activated[side] += size * config.num_experts_per_tok // config.n_routed_experts if routed else size
        mtp_layer += size if side == "mtp" and "block" in path and len(variable.get_metadata("axes")) > 1 else 0
        part = _part(path)
        by_part[part] = by_part.get(part, 0) + size
    embedding = config.vocab_size * config.hidden_size
    return ParameterCount(total["main"], activated["main"], activated["main"] - embedding, total["mtp"],
                          mtp_layer, activated["mtp"], by_part)


def _part(path: tuple) -> str:
    if path[0] == "mtp":
        return "multi-token prediction"
    names = {"embed_tokens": "embedding", "lm_head": "output head", "self_attn": "attention",
             "experts": "routed experts", "shared_experts": "shared experts", "gate": "routers"}
    for name in (path[0], *reversed(path)):
        if name in names:
            return names[name]
    return "dense feed-forward" if "mlp" in path else "norms"


def training_flops_per_token(config: ModelConfig, sequence_length: int, causal: bool = True, mtp: bool = True) -> float:
    """Forward and backward FLOPs of one token: 6 per activated matrix weight, plus attention scores and values.

    The embedding lookup and recomputation are not counted. `causal` counts the lower triangle of attention only, as
    table 2 of paper 1 does (250 GFLOP for DeepSeek-V3 at 4096 without multi-token prediction); a window cuts a band out
    of it.
    """
    count = count_parameters(config)
    depth = config.num_nextn_predict_layers if mtp else 0
    head = config.vocab_size * config.hidden_size
    weights = count.activated_without_embedding + (count.mtp_activated + depth * head if depth else 0)
    window = min(config.attention_window or sequence_length, sequence_length)
    # The band of W keys less the triangle that the first tokens lack; the whole triangle, T/2, without a window.
    keys = window * (1 - window / (2 * sequence_length)) if causal else window
    attention = attention_flops_per_token(config.num_attention_heads, config.qk_head_dim, config.value_head_dim, keys)
    return 6.0 * weights + 3.0 * attention * (config.num_hidden_layers + depth)


def attention_flops_per_token(heads: int, key_width: int, value_width: int, keys: float) -> float:
    """Forward FLOPs of one token's scores and values in one layer, with `keys` tokens on average."""
    return 2.0 * heads * (key_width + value_width) * keys
