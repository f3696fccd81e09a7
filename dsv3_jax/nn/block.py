"""One transformer layer, and a stack of equal layers run by a scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import Execution, ModelConfig, Recompute
from dsv3_jax.mesh import constrain_batch, gather_for_compute
from dsv3_jax.nn.attention import MultiHeadLatentAttention
from dsv3_jax.nn.grouped_query_attention import GroupedQueryAttention
from dsv3_jax.nn.linear import FeedForward
from dsv3_jax.nn.moe import MixtureOfExperts, RouterStats
from dsv3_jax.nn.norm import RMSNorm
from dsv3_jax.precision.recipe import PrecisionRecipe

# What the backward keeps at each level of recomputation. "plan" is the dispatch's few integers: to compute them again
# would search and communicate again. "paper" computes again norms, up-projections from the latents and SwiGLU
# (paper 2, section 3.2.3) and keeps the outputs of other matrix products and of communication. "experts" keeps those of
# attention and of the dense and shared feed-forward only, so it dispatches again: a routed row is kept by the device it
# was sent to, num_experts_per_tok times and with the room of the buffers.
_KEPT_BY_EXPERTS = ("plan", "latent", "query_key_value", "attention_out", "residual", "ffn_inner")
_KEPT = {"paper": (*_KEPT_BY_EXPERTS, "dispatched", "expert_inner"), "experts": _KEPT_BY_EXPERTS,
         "full": ("plan",)}

SHORT_STACK = 4
"""Up to this many layers a stack is unrolled: a scan copies every layer's residuals into stacked arrays and back,
which took 15% of the quickstart's step on CPU."""
LAYERS_AT_ONCE = 2
"""Of longer stacks that run two halves of a batch: what the last exchange of one layer waits for is in the next."""


def recomputed(function: Callable, recompute: Recompute) -> Callable:
    """`function` with the activations that its backward keeps chosen by `recompute`."""
    if recompute == "none":
        return function
    return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(*_KEPT[recompute]))


def gathered(module: Any) -> Any:
    """`module` with its weights laid out for use, see `mesh.gather_for_compute`."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, gather_for_compute(state))


def make_attention(config: ModelConfig, rngs: nnx.Rngs, recipe: PrecisionRecipe = PrecisionRecipe(),
                   ) -> MultiHeadLatentAttention | GroupedQueryAttention:
    """The kind of attention that the configuration names."""
    kind = MultiHeadLatentAttention if config.attention == "mla" else GroupedQueryAttention
    return kind(config, rngs, recipe)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)); the feed-forward is dense or a mixture of experts."""

    def __init__(self, config: ModelConfig, moe: bool, rngs: nnx.Rngs, recipe: PrecisionRecipe = PrecisionRecipe()):
        self.input_layernorm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps)
        self.self_attn = make_attention(config, rngs, recipe)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, "embed", config.rms_norm_eps)
        self.mlp = (MixtureOfExperts(config, rngs, recipe) if moe else
                    FeedForward(config.hidden_size, config.intermediate_size, config.initializer_range, rngs, recipe))

    def __call__(self, hidden_BTD: jax.Array, positions_T: jax.Array,
                 execution: Execution) -> tuple[jax.Array, RouterStats | None]:
        """[B, T, D] -> ([B, T, D], routing statistics or None for a dense layer)."""
        hidden_BTD += self.self_attn(self.input_layernorm(hidden_BTD), positions_T)
        return self.feed_forward(jax.ad_checkpoint.checkpoint_name(constrain_batch(hidden_BTD), "residual"), execution)

    def feed_forward(self, hidden_BTD: jax.Array, execution: Execution) -> tuple[jax.Array, RouterStats | None]:
        """The second half: x + ffn(norm(x)), and routing statistics or None for a dense layer."""
        normed = self.post_attention_layernorm(hidden_BTD)
        out, stats = (self.mlp(normed, execution) if isinstance(self.mlp, MixtureOfExperts)
                      else (self.mlp(normed), None))
        return constrain_batch(hidden_BTD + out), stats


def stack_of(layers: int, make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> Any:
    """`layers` modules as one whose weights have a leading layer dimension."""
    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)
    return build(rngs)


def run_stack(blocks: Block, hidden_BTD: jax.Array, positions_T: jax.Array,
              execution: Execution) -> tuple[jax.Array, RouterStats | None]:
    """Runs a stack of blocks; statistics gain a leading layer dimension."""
    graphdef, layers = nnx.split(blocks)
    short = len(jax.tree.leaves(layers)[0]) <= SHORT_STACK
    layer = layer_of(graphdef, positions_T, execution)
    if not execution.dual:
        return jax.lax.scan(layer, hidden_BTD, layers, unroll=short)
    both, stats = jax.lax.scan(layer, halves(hidden_BTD), layers, unroll=short or LAYERS_AT_ONCE)
    return joined(both), stats


def layer_of(graphdef: nnx.GraphDef, positions_T: jax.Array, execution: Execution) -> Callable:
    """(hidden [B, T, D], weights of one block) -> (hidden, its statistics), with the activations kept that
    `execution.recompute` says; if `execution.dual`, of two halves of a batch at once."""
    def step(hidden: Any, layer: nnx.State) -> tuple[Any, RouterStats | None]:
        block = nnx.merge(graphdef, gather_for_compute(layer))
        return on_both(lambda hidden_BTD: block(hidden_BTD, positions_T, execution), hidden)
    return recomputed(step, execution.recompute)


Halves = tuple[jax.Array, jax.Array]
"""Every other sequence of a batch, [B/2, T, ...] each: two micro-batches that depend on each other in nothing, so that
one's exchanges can run while the other computes (paper 1, section 2.3.1; paper 2, section 3.4)."""


def halves(x_BTD: jax.Array) -> Halves:
    """Each device has as many sequences of one as of the other."""
    pairs = x_BTD.reshape(-1, 2, *x_BTD.shape[1:])
    return constrain_batch(pairs[:, 0]), constrain_batch(pairs[:, 1])


def joined(both: Halves) -> jax.Array:
    """The batch again."""
    pairs = jnp.stack(both, axis=1)
    return constrain_batch(pairs.reshape(-1, *pairs.shape[2:]))


def on_both(function: Callable[[jax.Array], tuple[jax.Array, RouterStats | None]], hidden: jax.Array | Halves) -> Any:
    """`function` of a batch, or of its halves, with the statistics of the whole."""
    if isinstance(hidden, jax.Array):
        return function(hidden)
    (one, stats), (other, other_stats) = (function(half) for half in hidden)
    if stats is None or other_stats is None:
        return (one, other), None
    return (one, other), stats.with_other_half(other_stats)
