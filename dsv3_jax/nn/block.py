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
from dsv3_jax.nn.dual import KEPT, Halves, halves, joined, on_both, run_layers
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
_KEPT = {"paper": (*_KEPT_BY_EXPERTS, "dispatched", "expert_inner", KEPT), "experts": (*_KEPT_BY_EXPERTS, KEPT),
         "full": ("plan", KEPT)}

SHORT_STACK = 4
"""Up to this many layers a stack is unrolled: a scan copies every layer's residuals into stacked arrays and back,
which took 15% of the quickstart's step on CPU."""
LAYERS_AT_ONCE = 2
"""Of stacks that run two halves of a batch: beside the last exchange of the group there is less to compute."""


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
        normed, attention = self.input_layernorm(hidden_BTD), self.self_attn
        hidden_BTD += (attention(normed, positions_T, execution.attention_by)
                       if isinstance(attention, MultiHeadLatentAttention) else attention(normed, positions_T))
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
    if execution.dual:
        return _run_halves(graphdef, layers, hidden_BTD, positions_T, execution)
    short = len(jax.tree.leaves(layers)[0]) <= SHORT_STACK
    return jax.lax.scan(layer_of(graphdef, positions_T, execution), hidden_BTD, layers, unroll=short)


def _run_halves(graphdef: nnx.GraphDef, layers: nnx.State, hidden_BTD: jax.Array, positions_T: jax.Array,
                execution: Execution) -> tuple[jax.Array, RouterStats | None]:
    """A few layers at a time, see `LAYERS_AT_ONCE`."""
    def some(both: Halves, group: nnx.State) -> tuple[Halves, RouterStats | None]:
        weights = [jax.tree.map(lambda x: x[number], group) for number in range(len(jax.tree.leaves(group)[0]))]  # noqa: B023
        both, stats = run_layers(lambda positions_T: layer_of(graphdef, positions_T, execution), both, weights,
                                 positions_T)
        return both, jax.tree.map(lambda *each: jnp.stack(each), *stats)
    count = len(jax.tree.leaves(layers)[0])
    groups, rest = divmod(count, LAYERS_AT_ONCE)
    both, parts = halves(hidden_BTD), []
    if groups:
        whole = jax.tree.map(lambda x: x[:count - rest].reshape(groups, LAYERS_AT_ONCE, *x.shape[1:]), layers)
        both, stats = jax.lax.scan(some, both, whole, unroll=groups == 1)
        parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stats))
    if rest:
        both, stats = some(both, jax.tree.map(lambda x: x[count - rest:], layers))
        parts.append(stats)
    return joined(both), jax.tree.map(lambda *each: jnp.concatenate(each), *parts)


def layer_of(graphdef: nnx.GraphDef, positions_T: jax.Array, execution: Execution) -> Callable:
    """(hidden [B, T, D], weights of one block) -> (hidden, its statistics), with the activations kept that
    `execution.recompute` says; if `execution.dual`, of two halves of a batch at once."""
    def step(hidden: Any, layer: nnx.State) -> tuple[Any, RouterStats | None]:
        block = nnx.merge(graphdef, gather_for_compute(layer))
        return on_both(lambda hidden_BTD: block(hidden_BTD, positions_T, execution), hidden)
    return recomputed(step, execution.recompute)
