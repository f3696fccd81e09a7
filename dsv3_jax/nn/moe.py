"""DeepSeekMoE: shared experts that see every token, and routed experts that see their own (paper 2, section 2.1.2)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.expert_parallel.exchange import Topology, combine, dispatch
from dsv3_jax.mesh import BATCH_AXES, EXPERT_AXES
from dsv3_jax.nn.linear import FeedForward, normal_param, swiglu
from dsv3_jax.nn.router import NodeLimitedRouter, Routing, expert_load, sequence_balance_loss
from pallas_kernels.grouped_matmul import grouped_matmul

LARGEST_TILE = 128
"""Rows of an expert are padded to a tile of the grouped product: at most this, less where experts get few rows."""


class RouterStats(NamedTuple):
    """What a MoE layer tells about its routing, float32."""

    load_E: jax.Array
    """[E]: tokens sent to each expert, over the whole batch."""
    balance_loss: jax.Array
    """Scalar: the sequence-wise balance loss without its weight."""


class RoutedExperts(nnx.Module):
    """The experts' weights, stacked, and their evaluation for routed tokens."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        std = config.initializer_range
        self.gate_up_proj = normal_param(rngs, (experts, width, 2 * inner), ("expert", "embed", "mlp"), std)
        self.down_proj = normal_param(rngs, (experts, inner, width), ("expert", "mlp", "embed"), std)

    def __call__(self, hidden_BTD: jax.Array, routing: Routing) -> jax.Array:
        """[B, T, D] -> [B, T, D]: sum over a token's experts of weight * FFN(token)."""
        mesh = jax.sharding.get_abstract_mesh()
        axes = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
        arguments = (hidden_BTD, routing.experts_K, routing.weights_K,
                     self.gate_up_proj[...], self.down_proj[...])
        if mesh.empty or mesh.size == 1:
            return _routed_ffn(*arguments, topology=Topology(self.config.n_routed_experts))
        topology = Topology(self.config.n_routed_experts, mesh.shape["scale_out"], mesh.shape["scale_up"])
        tokens, weights = PartitionSpec(BATCH_AXES), PartitionSpec(EXPERT_AXES)
        # check_vma off: expert weights enter replicated over `data`, and their gradient is summed over it here.
        return jax.shard_map(lambda *args: _routed_ffn(*args, topology=topology), axis_names=axes, check_vma=False,
                             in_specs=(tokens, tokens, tokens, weights, weights), out_specs=tokens)(*arguments)


def _routed_ffn(hidden_BTD: jax.Array, experts_BTK: jax.Array, weights_BTK: jax.Array, gate_up_EDF: jax.Array,
                down_EFD: jax.Array, *, topology: Topology) -> jax.Array:
    """One device's part: its tokens in, its tokens out, its experts in between."""
    top_k = experts_BTK.shape[-1]
    tile = _tile(experts_BTK.size / topology.experts_per_device)
    rows_PD, plan = dispatch(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), experts_BTK.reshape(-1, top_k),
                             weights_BTK.reshape(-1, top_k), topology, tile)
    rows_PD = checkpoint_name(rows_PD, "dispatched")
    inner_PF = grouped_matmul(rows_PD, gate_up_EDF, plan.group_sizes_E, alignment=tile)
    inner_PF = swiglu(checkpoint_name(inner_PF, "ffn_inner"))
    outputs_PD = grouped_matmul(inner_PF, down_EFD, plan.group_sizes_E, alignment=tile)
    return combine(checkpoint_name(outputs_PD, "expert_out"), plan).reshape(hidden_BTD.shape)


def _tile(rows_per_expert: float) -> int:
    """The power of two, up to LARGEST_TILE, that pads balanced experts by about an eighth."""
    tile = 8
    while tile < LARGEST_TILE and 4 * tile < rows_per_expert:
        tile *= 2
    return tile


class MixtureOfExperts(nnx.Module):
    """h = sum of shared FFNs + sum of weighted routed FFNs (equations 12-16)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.gate = NodeLimitedRouter(config, rngs)
        self.experts = RoutedExperts(config, rngs)
        if config.n_shared_experts:
            self.shared_experts = FeedForward(config.hidden_size,
                                              config.n_shared_experts * config.moe_intermediate_size,
                                              config.initializer_range, rngs)

    def __call__(self, hidden_BTD: jax.Array) -> tuple[jax.Array, RouterStats]:
        """[B, T, D] -> ([B, T, D], routing statistics)."""
        routing = self.gate(hidden_BTD)
        out = self.experts(hidden_BTD, routing)
        if self.config.n_shared_experts:
            out += self.shared_experts(hidden_BTD)
        stats = RouterStats(expert_load(routing.experts_K, self.config.n_routed_experts),
                            sequence_balance_loss(self.config, routing.scores_E))
        return out, jax.tree.map(jnp.asarray, stats)
