"""Bytes that a model takes on one device, for any layout, format and length, without a compiler.

Training: state, compute weights and summed gradients are what the layout table gives, to the byte what compiled
programs report (experiments/results/pods). Of activations only those are counted that the backward needs; the
programs hold 1.7 to 2.3 times as much, for what is computed at the moment, buffers of exchanges, gathered weights and
copies of the compiler's, none of which is modelled. So the sum is a lower bound.

Inference: weights and cache. The working memory of a step is not counted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from dsv3_jax.codesign.checks import at_least, positive
from dsv3_jax.codesign.counting import count_parameters
from dsv3_jax.codesign.step_buffers import dispatch_slots
from dsv3_jax.config import ConfigError, MeshConfig, ModelConfig, RunConfig
from dsv3_jax.inference.cache import CacheFormat, bytes_per_token, cached_entries
from dsv3_jax.mesh import AXES, COMPUTE, STORAGE, mesh_shape, shardings
from dsv3_jax.precision.recipe import COMPUTE_DTYPE, RECIPES
from dsv3_jax.training.pipelined import cut_of
from dsv3_jax.training.state import abstract_state


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """The mesh of `config` over that many devices, which need not exist.

    Raises:
      ConfigError: the axes do not multiply to `devices`.
    """
    shape = mesh_shape(config, devices)
    if math.prod(shape) != devices:
        raise ConfigError(f"mesh {'*'.join(AXES)} ({'*'.join(map(str, shape))}={math.prod(shape)}) must be the "
                          f"{devices} devices: change an axis, or leave mesh.data unset")
    return AbstractMesh(shape, AXES)


def state_bytes(config: RunConfig, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Bytes of one device that follow from the layout: master weights, optimizer and average, which last; and weights
    in the type they are computed with and summed gradients, which a step makes. Compute weights are the whole model's:
    with mesh.zero "full" still spread, else gathered; or of a pipeline those of a rank, with room for the MoE layers of
    the stages that have most, and gradients are then summed whole."""
    state = abstract_state(config, mesh)

    def held(tree: Any) -> int:
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                   for leaf in jax.tree.leaves(tree))
    in_use = shardings(state.params, mesh, STORAGE if config.mesh.zero == "full" else COMPUTE)
    places = _moe_places(config)
    compute = gradients = 0
    for (path, variable), (_, use) in zip(nnx.to_flat_state(state.params), nnx.to_flat_state(in_use), strict=True):
        weight = variable.get_value()
        size = 4 if config.precision == "float32" or variable.get_metadata("float32") else 2
        whole = math.prod(use.get_value().shard_shape(weight.shape))
        if places is not None and path[0] == "moe_layers":
            whole = whole * places // weight.shape[0]
        compute += size * whole
        if places is not None:
            gradients += 4 * whole
        elif config.batch.micro_batches > 1:
            gradients += 4 * math.prod(weight.sharding.shard_shape(weight.shape))
    return {"weights": held(state.params), "optimizer": held(state.optimizer), "average": held(state.ema),
            "compute_weights": compute, "summed_gradients": gradients}


def _moe_places(config: RunConfig) -> int | None:
    """MoE layers that a rank of the pipeline has room for; None without one."""
    return math.prod(cut_of(config).layer_RCL.shape[1:]) if config.mesh.pipe > 1 else None


class TrainingMemory(NamedTuple):
    """Bytes of one device."""

    weights: int
    optimizer: int
    average: int
    compute_weights: int
    summed_gradients: int
    kept_activations: int
    """Of one micro-batch, for its backward. At the least so much: see the module."""

    @property
    def total(self) -> int:
        return sum(self)


def training_memory(config: RunConfig, devices: int) -> TrainingMemory:
    """What a step of `config` on that many devices needs at the least.

    Raises:
      ConfigError: a mesh of another size, or recompute "none", whose activations are not modelled.
    """
    state = state_bytes(config, abstract_mesh(config.mesh, devices))
    return TrainingMemory(**state, kept_activations=kept_activations(config, devices))


def kept_activations(config: RunConfig, devices: int) -> int:
    """Bytes of what the backward of one micro-batch finds on one device: of every layer its input, and the outputs that
    `RunConfig.recompute` names (`nn.block`). The plan's integers, a few thousandths, are left out."""
    m, tokens = config.model, config.batch.micro_batch * config.batch.sequence_length / devices
    dense, depth = m.first_k_dense_replace, m.num_nextn_predict_layers
    shared = _kept_of_layer(config, 2 * m.n_shared_experts * m.moe_intermediate_size)
    per_token = (dense * _kept_of_layer(config, 2 * m.intermediate_size) + (m.num_moe_layers + depth) * shared
                 # A prediction module keeps the embedding that it joins, too.
                 + depth * m.hidden_size * _itemsize(config))
    rows = dispatch_slots(config, devices).experts * (m.num_moe_layers + depth) * _kept_of_row(config)
    return round(tokens * per_token + rows)


def _kept_of_layer(config: RunConfig, ffn_inner: int) -> float:
    """Bytes a token of one layer, routed experts aside."""
    m, wide, float8 = config.model, _itemsize(config), RECIPES[config.precision].linear is not None
    if config.recompute == "none":
        raise ConfigError("recompute (none) is not modelled, for the compiler chooses what to keep: take paper, "
                          "experts or full, or compile (experiments/compile_for_pod.py)")
    if config.recompute == "full":
        return m.hidden_size * wide
    heads = m.num_attention_heads
    if m.attention == "mla":
        projected = (m.q_lora_rank or heads * m.qk_head_dim) + m.kv_lora_rank + m.qk_rope_head_dim
    else:
        projected = (heads + 2 * m.kv_heads) * m.kv_head_dim
    attended = heads * m.value_head_dim
    # In float8: E5M6 after attention, E4M3 before SwiGLU, both with a float32 scale for 128 values.
    after = (attended * 1.5 + 4 * -(-attended // 128)) if float8 else attended * wide
    inner = (ffn_inner + 4 * -(-ffn_inner // 128)) if float8 else ffn_inner * wide
    return (2 * m.hidden_size + projected) * wide + after + inner


def _kept_of_row(config: RunConfig) -> float:
    """Bytes of one row of a device's experts: as dispatched, and before SwiGLU."""
    if config.recompute != "paper":
        return 0.0
    width, inner = config.model.hidden_size, 2 * config.model.moe_intermediate_size
    if RECIPES[config.precision].linear is not None:
        return width + inner + 4 * (-(-width // 128) + -(-inner // 128))
    return (width + inner) * _itemsize(config)


def _itemsize(config: RunConfig) -> int:
    return np.dtype(COMPUTE_DTYPE[config.precision]).itemsize


def cache_bytes(config: ModelConfig, rows: int, tokens: int, kind: CacheFormat = "bf16", mtp: bool = False) -> int:
    """Bytes of the cache of `rows` sequences of `tokens`: layers * values * bytes a token (paper 1, table 1: 70,272 of
    V3 in bf16), no more tokens than a window needs."""
    return rows * cached_entries(config, tokens, mtp) * bytes_per_token(config, kind, mtp)


class ServingMemory(NamedTuple):
    """Bytes of one device."""

    experts: float
    """Routed, spread over the expert-parallel group."""
    other_weights: float
    """On every device."""
    cache: float

    @property
    def total(self) -> float:
        return sum(self)


def serving_memory(config: ModelConfig, expert_devices: int, rows: int, tokens: int, weight_bytes: float = 1,
                   kind: CacheFormat = "bf16") -> ServingMemory:
    """What each of `expert_devices` devices holds that share the routed experts, in whole ones, and have all other
    weights, for `rows` sequences of `tokens` of its own.

    Args:
      weight_bytes: of one weight; 1 is float8, in which embedding and head stay in bf16 (paper 2, section 3.3.1).

    Raises:
      ConfigError: a number makes no sense.
    """
    at_least(1, expert_devices=expert_devices, rows=rows, tokens=tokens)
    positive(weight_bytes=weight_bytes)
    here = math.ceil(config.n_routed_experts / expert_devices)
    parts = dict(count_parameters(config).by_part)
    parts.pop("multi-token prediction", None)
    experts, wide = parts.pop("routed experts"), parts.pop("embedding") + parts.pop("output head")
    return ServingMemory(experts / config.n_routed_experts * here * weight_bytes,
                         sum(parts.values()) * weight_bytes + wide * max(weight_bytes, 2),
                         cache_bytes(config, rows, tokens, kind))
