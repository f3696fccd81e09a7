"""The node-limited router: which experts a token goes to, and with what weight (paper 2, section 2.1.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.mesh import TOKENS, on_each_device
from dsv3_jax.nn.linear import normal_param


class RouterBias(nnx.Variable):
    """The balancing bias b [E], float32: state that `training.step` moves, not a parameter the optimizer sees."""


class Routing(NamedTuple):
    """A router's decision for tokens [..., D]."""

    experts_K: jax.Array
    """int32 [..., K], best first."""
    weights_K: jax.Array
    """float32 [..., K], from the unbiased scores."""
    scores_E: jax.Array
    """float32 [..., E], unbiased: sigmoid or softmax of the affinities."""


class NodeLimitedRouter(nnx.Module):
    """Scores every expert, keeps the best `topk_group` groups, and takes the best K experts in them.

    The bias moves the choice and never the weight (equations 15-16). All of it is float32.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        experts = config.n_routed_experts
        self.weight = normal_param(rngs, (config.hidden_size, experts), ("embed", "router"),
                                   config.initializer_range, float32=True)
        self.e_score_correction_bias = RouterBias(jnp.zeros((experts,), jnp.float32), axes=("router",))

    @jax.named_scope("router")
    def __call__(self, hidden_BTD: jax.Array) -> Routing:
        """[..., D] -> `Routing`."""
        affinities = jnp.matmul(hidden_BTD.astype(jnp.float32), self.weight[...],
                                precision=jax.lax.Precision.HIGHEST)
        scores_E = (jax.nn.sigmoid(affinities) if self.config.scoring_func == "sigmoid"
                    else jax.nn.softmax(affinities, axis=-1))
        return choose_experts(self.config, scores_E, self.e_score_correction_bias[...])


def choose_experts(config: ModelConfig, scores_E: jax.Array, bias_E: jax.Array) -> Routing:
    """The choice and the weights, given scores float32 [..., E] and bias [E]; ties go to the lowest index."""
    biased_E = scores_E + bias_E if config.topk_method == "noaux_tc" else scores_E

    def best(biased_E: jax.Array) -> jax.Array:
        return jax.lax.top_k(_within_best_groups(config, biased_E), config.num_experts_per_tok)[1]
    # Kept for the backward at every level of recomputation: a near-tie that fell the other way the second time would
    # pair a weight's gradient with another expert.
    experts_K = checkpoint_name(_of_own_tokens(best, jax.lax.stop_gradient(biased_E)), "plan")
    weights_K = jnp.take_along_axis(scores_E, experts_K, axis=-1)
    if config.norm_topk_prob:
        weights_K /= jnp.sum(weights_K, axis=-1, keepdims=True) + 1e-20
    return Routing(experts_K, weights_K * config.routed_scaling_factor, scores_E)


def _of_own_tokens(rank: Callable[[jax.Array], jax.Array], scores_E: jax.Array) -> jax.Array:
    """`rank(scores_E)` for each device's own tokens, if scores are [B, T, E] on a mesh.

    Left to itself, XLA gathers the scores of all tokens on every device to sort where B and T both are split.
    """
    return on_each_device(rank, TOKENS, TOKENS)(scores_E) if scores_E.ndim == 3 else rank(scores_E)


def _within_best_groups(config: ModelConfig, scores_E: jax.Array) -> jax.Array:
    """Masks the scores of experts outside the `topk_group` best groups."""
    if config.n_group == 1:
        return scores_E
    grouped = scores_E.reshape(*scores_E.shape[:-1], config.n_group, -1)
    best = 2 if config.topk_method == "noaux_tc" else 1
    ranks_G = jnp.sum(jax.lax.top_k(grouped, best)[0], axis=-1)
    kept_groups = jax.lax.top_k(ranks_G, config.topk_group)[1]
    kept_G = jnp.any(kept_groups[..., None] == jnp.arange(config.n_group), axis=-2)
    return jnp.where(kept_G[..., None], grouped, float(config.masked_group_score)).reshape(scores_E.shape)


@jax.named_scope("expert_load")
def expert_load(experts_K: jax.Array, experts: int) -> jax.Array:
    """Tokens sent to each expert, float32 [E], from choices [..., K] (exact up to 2^24 tokens an expert)."""
    return jnp.sum(jax.nn.one_hot(experts_K, experts, dtype=jnp.float32), axis=tuple(range(experts_K.ndim)))


@jax.named_scope("balance_loss")
def sequence_balance_loss(config: ModelConfig, scores_BTE: jax.Array) -> jax.Array:
    """sum_i f_i P_i, averaged over sequences, without its weight alpha (equations 17-20).

    f counts the K best of the unbiased scores of all experts, as the equation has it, not the router's actual choice.
    """
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    best_BTK = _of_own_tokens(lambda scores_E: jax.lax.top_k(scores_E, top_k)[1], jax.lax.stop_gradient(scores_BTE))
    chosen_BTE = jnp.sum(jax.nn.one_hot(best_BTK, experts, dtype=jnp.float32), axis=-2)
    f_BE = jnp.mean(chosen_BTE, axis=1) * experts / top_k
    p_BE = jnp.mean(scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True), axis=1)
    return jnp.mean(jnp.sum(f_BE * p_BE, axis=-1))
