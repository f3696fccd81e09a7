"""Matrix FLOPs of a training step for one token, by what they are for, from the configuration alone.

`model` is what the model needs (`counting`). What the programs here do beyond it: they compute all of attention's
square and mask the half above the diagonal, or, by kernels, scores and their gradients twice in the backward; they
compute again what `RunConfig.recompute` does not keep (paper 2, section 3.2.3), and always scores of long sequences,
chunk by chunk, and logits; devices that share a sequence each project all of its keys and values. Experts are evenly
loaded; the room in padded buffers is counted apart.
"""

from __future__ import annotations

from dsv3_jax.codesign.counting import attention_flops_per_token, training_flops_per_token
from dsv3_jax.codesign.step_buffers import dispatch_slots, tokens_of_device
from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.nn.attention import QUERY_CHUNK
from dsv3_jax.training.loss import LOGITS_AT_ONCE


def flops_by_cause(config: RunConfig) -> dict[str, float]:
    """FLOPs of one token, prediction modules included; keys as in `aot.PodReport.flops_per_token_by_cause`."""
    m, length = config.model, config.batch.sequence_length
    layers, reach = m.num_hidden_layers + m.num_nextn_predict_layers, m.attention_window or length
    causal, seen = (training_flops_per_token(m, length, causal=half) for half in (True, False))
    scores, values = _attention_core(config)
    core = (scores + values) / _keys(config)
    causes = {"model": causal, "recomputation": _recomputation(config),
              "masked_attention": seen - causal + 3 * core * (_keys(config) - min(reach, length)) * layers,
              "context_up_projection": (config.mesh.context - 1) * 3 * _up_projection(m) * layers}
    if config.attention_by == "kernels":
        causes |= {"masked_attention": 0.0, "scores_again": (2 * scores + values) * layers}
    return causes


def padding_flops(config: RunConfig, devices: int) -> float:
    """FLOPs of one token that experts would spend on the room in their buffers, if no kernel skipped it."""
    m, tokens = config.model, tokens_of_device(config, devices)
    even = tokens * m.num_experts_per_tok
    gate_up, down = _expert_products(m)
    again = gate_up if config.recompute in ("experts", "full") else 0.0
    per_layer = m.num_experts_per_tok * (3 * (gate_up + down) + again)
    return per_layer * (m.num_moe_layers + m.num_nextn_predict_layers) * (dispatch_slots(config, devices).experts
                                                                         / even - 1)


def _recomputation(config: RunConfig) -> float:
    """Forward FLOPs of one token that the backward computes again."""
    m, level = config.model, config.recompute
    layers, experts = m.num_hidden_layers + m.num_nextn_predict_layers, m.num_moe_layers + m.num_nextn_predict_layers
    (scores, values), kernels = _attention_core(config), config.attention_by == "kernels"
    in_chunks = not kernels and _queries_at_once(config) < _stretch(config)
    attention = routed = other = 0.0
    if in_chunks:
        attention += scores
    if level != "none":
        up = config.mesh.context * _up_projection(m)
        attention += (up if m.attention == "mla" else 0.0) + _query_up_projection(m)
        attention += 0.0 if in_chunks else scores + values * kernels
        other += 2.0 * m.hidden_size * m.n_routed_experts * experts  # the router's scores
        if not config.mesh.dual:  # else what prediction modules join is kept (`nn.mtp`)
            other += 2.0 * 2 * m.hidden_size ** 2 * m.num_nextn_predict_layers
    if level in ("experts", "full"):
        routed = m.num_experts_per_tok * _expert_products(m)[0]
    if level == "full":
        attention += values * (not kernels) + (scores if in_chunks else 0.0) + _kept_projections(m)
        dense = m.first_k_dense_replace * m.intermediate_size
        other += 2.0 * 2 * m.hidden_size * (dense + experts * m.n_shared_experts * m.moe_intermediate_size)
    return attention * layers + routed * experts + other + _logits_again(config)


def _stretch(config: RunConfig) -> int:
    """Tokens of one sequence on one device."""
    return config.batch.sequence_length // config.mesh.context


def _queries_at_once(config: RunConfig) -> int:
    stretch = _stretch(config)
    return QUERY_CHUNK if stretch > QUERY_CHUNK and stretch % QUERY_CHUNK == 0 else stretch


def _keys(config: RunConfig) -> int:
    """Keys that a query's scores are computed with: all, or what a window's queries at once can see together."""
    window, length = config.model.attention_window, config.batch.sequence_length
    return length if window is None else min(length, _queries_at_once(config) + window - 1)


def _attention_core(config: RunConfig) -> tuple[float, float]:
    """Forward FLOPs of one token in one layer for (scores, values) as the programs compute them."""
    m, keys = config.model, _keys(config) / (1 if config.attention_by == "xla" else 2)
    return (attention_flops_per_token(m.num_attention_heads, m.qk_head_dim, 0, keys),
            attention_flops_per_token(m.num_attention_heads, 0, m.value_head_dim, keys))


def _logits_again(config: RunConfig) -> float:
    """Logits of the main model and the prediction modules, where they are computed chunk by chunk."""
    m, stretch = config.model, _stretch(config)
    if stretch * m.vocab_size <= LOGITS_AT_ONCE or stretch % 2:
        return 0.0
    return 2.0 * m.hidden_size * m.vocab_size * (1 + m.num_nextn_predict_layers)


def _up_projection(m: ModelConfig) -> float:
    """Forward FLOPs of keys and values from the latent, in one layer."""
    if m.attention != "mla":
        return 0.0
    return 2.0 * m.kv_lora_rank * m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim)


def _query_up_projection(m: ModelConfig) -> float:
    """Forward FLOPs of queries from their latent, in one layer."""
    return 2.0 * (m.q_lora_rank or 0) * m.num_attention_heads * m.qk_head_dim if m.attention == "mla" else 0.0


def _kept_projections(m: ModelConfig) -> float:
    """Forward FLOPs in one layer of the projections whose outputs every level but "full" keeps, the output's among
    them: the residual is kept."""
    heads, out = m.num_attention_heads, m.num_attention_heads * m.value_head_dim * m.hidden_size
    if m.attention == "mla":
        query = m.q_lora_rank or heads * m.qk_head_dim
        return 2.0 * (m.hidden_size * (query + m.kv_lora_rank + m.qk_rope_head_dim) + out)
    return 2.0 * (m.hidden_size * (heads + 2 * m.kv_heads) * m.kv_head_dim + out)


def _expert_products(m: ModelConfig) -> tuple[float, float]:
    """Forward FLOPs of (gate and up, down) for one row of one expert."""
    return 4.0 * m.hidden_size * m.moe_intermediate_size, 2.0 * m.moe_intermediate_size * m.hidden_size
