"""DeepSeekMoE: shared experts that see every token, and routed experts that see their own (paper 2, section 2.1.2)."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dsv3_jax.config import Execution, ModelConfig
from dsv3_jax.expert_parallel.exchange import Wire, combine, dispatch
from dsv3_jax.expert_parallel.plan import Traffic, make_plan, traffic
from dsv3_jax.expert_parallel.rounds import Quota, in_rounds, round_quota
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import DEVICES, EXPERT_AXES, FAST_AXES, TOKENS, on_each_device
from dsv3_jax.nn.linear import FeedForward, normal_param
from dsv3_jax.nn.router import NodeLimitedRouter, Routing, expert_load, sequence_balance_loss
from dsv3_jax.precision.linear import GROUP_ALIGNMENT, linear, swiglu_linear
from dsv3_jax.precision.recipe import PrecisionRecipe

LARGEST_TILE = 128
"""Rows of an expert are padded to a tile of the grouped product: at most this, less where experts get few rows."""


class RouterStats(NamedTuple):
    """What a MoE layer tells about its routing."""

    load_E: jax.Array
    """float32 [E]: tokens sent to each expert, over the whole batch."""
    balance_loss: jax.Array
    """float32 scalar: the sequence-wise balance loss without its weight."""
    rounds: jax.Array
    """int32 scalar: dispatch rounds of the expert-parallel group that needed most; 1 unless some device was sent more
    than `MeshConfig.capacity_factor` allows."""
    traffic: Traffic
    """float32 scalars, sums over all devices."""

    def with_other_half(self, other: RouterStats) -> RouterStats:
        """Of a batch, from those of two halves with equally many sequences."""
        return RouterStats(self.load_E + other.load_E, (self.balance_loss + other.balance_loss) / 2,
                           jnp.maximum(self.rounds, other.rounds),
                           jax.tree.map(jnp.add, self.traffic, other.traffic))

    def over_devices(self) -> RouterStats:
        """Of all, from those of each: leaves have a leading dimension."""
        return RouterStats(jnp.sum(self.load_E, axis=0), jnp.mean(self.balance_loss), jnp.max(self.rounds),
                           jax.tree.map(jnp.sum, self.traffic))


class RoutedExperts(nnx.Module):
    """The experts' weights, stacked, and their evaluation for routed tokens.

    Attributes:
      slots: stacked experts on all devices; replicas in serving count too, see `nn.replicated`.
      reach: most nodes that a token's experts are on.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, recipe: PrecisionRecipe = PrecisionRecipe()):
        self.recipe = recipe
        experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.slots = experts
        self.reach = min(config.num_experts_per_tok, config.topk_group if config.n_group > 1 else experts)
        std = config.initializer_range
        self.gate_up_proj = normal_param(rngs, (experts, width, 2 * inner), ("expert", "embed", "mlp"), std,
                                         float8=True)
        self.down_proj = normal_param(rngs, (experts, inner, width), ("expert", "mlp", "embed"), std, float8=True)

    def __call__(self, hidden_BTD: jax.Array, routing: Routing,
                 execution: Execution) -> tuple[jax.Array, jax.Array, Traffic]:
        """[B, T, D] -> [B, T, D], sum over a token's experts of weight * FFN(token); and what `RouterStats` tells."""
        mesh = jax.sharding.get_abstract_mesh()
        arguments = (hidden_BTD, routing.experts_K, routing.weights_K,
                     self.gate_up_proj.get_value(), self.down_proj.get_value())
        topology = Topology(self.slots)
        if not mesh.empty:
            topology = topology._replace(scale_out=mesh.shape["scale_out"],
                                         scale_up=math.prod(mesh.shape[axis] for axis in FAST_AXES))
        run = functools.partial(_routed_ffn, topology=topology, recipe=self.recipe, execution=execution,
                                reach=self.reach)
        weights = PartitionSpec(EXPERT_AXES)
        # Expert weights enter replicated over `data`, and their gradient is summed over it here.
        out_BTD, rounds, sent = on_each_device(run, in_specs=(TOKENS, TOKENS, TOKENS, weights, weights),
                                               out_specs=(TOKENS, DEVICES, DEVICES))(*arguments)
        return out_BTD, jnp.max(rounds), jax.tree.map(jnp.sum, sent)


def _routed_ffn(hidden_BTD: jax.Array, experts_BTK: jax.Array, weights_BTK: jax.Array, gate_up_EDF: jax.Array,
                down_EFD: jax.Array, *, topology: Topology, recipe: PrecisionRecipe, reach: int,
                execution: Execution) -> tuple[jax.Array, jax.Array, Traffic]:
    """One device's part: its tokens in, its tokens out, its experts in between; and [1], what that took."""
    width, top_k = hidden_BTD.shape[-1], experts_BTK.shape[-1]
    hidden_TD, experts_TK = hidden_BTD.reshape(-1, width), experts_BTK.reshape(-1, top_k)
    quota = round_quota(topology, len(hidden_TD), top_k, reach, execution.capacity_factor)
    tile = expert_tile(experts_TK.size / topology.experts_per_device) if recipe.up is None else GROUP_ALIGNMENT
    one_round = functools.partial(_one_round, topology=topology, recipe=recipe, wire=wire_of(recipe, execution),
                                  quota=quota, tile=tile)
    activations, weights = (hidden_TD, weights_BTK.reshape(-1, top_k)), (gate_up_EDF, down_EFD)
    out_TD, delivered, plan = in_rounds(one_round, experts_TK, activations, weights, topology, quota)
    sent = jax.tree.map(lambda x: x[None], traffic(experts_TK, plan.round_TK, delivered, topology))
    return out_TD.astype(hidden_BTD.dtype).reshape(hidden_BTD.shape), plan.rounds[None], sent


def _one_round(experts_TK: jax.Array, hidden_TD: jax.Array, weights_TK: jax.Array, gate_up_EDF: jax.Array,
               down_EFD: jax.Array, *, topology: Topology, recipe: PrecisionRecipe, wire: Wire, quota: Quota,
               tile: int) -> tuple[jax.Array, jax.Array]:
    """See `rounds.OneRound`; the given choices are within the quota."""
    plan = make_plan(experts_TK, weights_TK, topology, quota, tile)
    rows_PD = dispatch(hidden_TD, plan, wire)
    groups: dict[str, Any] = {"group_sizes_E": plan.group_sizes_E, "alignment": tile}
    inner_PF = linear(rows_PD, gate_up_EDF, recipe.up, keep="dispatched", **groups)
    outputs_PD = swiglu_linear(inner_PF, down_EFD, recipe.down, scale_M=plan.weights_P, keep="expert_inner", **groups)
    return combine(outputs_PD, plan, wire), jnp.sum(plan.moves.to_experts.slot_RK >= 0, dtype=jnp.float32)


def wire_of(recipe: PrecisionRecipe, execution: Execution) -> Wire:
    """How rows travel to experts and back."""
    return Wire(recipe.dispatch, recipe.dispatch_gradients, execution.combine, execution.transport)


def expert_tile(rows_per_expert: float) -> int:
    """The power of two, up to LARGEST_TILE, that pads balanced experts by about an eighth.

    Where most experts get nothing and the others one row, as when a few tokens are decoded, rows are not padded.
    """
    if rows_per_expert < 0.5:
        return 1
    tile = 8
    while tile < LARGEST_TILE and 4 * tile < rows_per_expert:
        tile *= 2
    return tile


class MixtureOfExperts(nnx.Module):
    """h = sum of shared FFNs + sum of weighted routed FFNs (equations 12-16)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, recipe: PrecisionRecipe = PrecisionRecipe()):
        self.config = config
        self.gate = NodeLimitedRouter(config, rngs)
        self.experts = RoutedExperts(config, rngs, recipe)
        if config.n_shared_experts:
            self.shared_experts = FeedForward(config.hidden_size,
                                              config.n_shared_experts * config.moe_intermediate_size,
                                              config.initializer_range, rngs, recipe)

    def __call__(self, hidden_BTD: jax.Array, execution: Execution) -> tuple[jax.Array, RouterStats]:
        """[B, T, D] -> ([B, T, D], routing statistics)."""
        routing = self.gate(hidden_BTD)
        out, rounds, sent = self.experts(hidden_BTD, routing, execution)
        if self.config.n_shared_experts:
            out += self.shared_experts(hidden_BTD)
        stats = RouterStats(expert_load(routing.experts_K, self.config.n_routed_experts),
                            sequence_balance_loss(self.config, routing.scores_E), rounds, sent)
        return out, jax.tree.map(jnp.asarray, stats)
