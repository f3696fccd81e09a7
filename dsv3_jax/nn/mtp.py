"""Multi-token prediction: one more layer for each further token (paper 2, section 2.2, equations 21-25)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import Execution, ModelConfig
from dsv3_jax.nn.block import Block, layer_of
from dsv3_jax.nn.dual import halves, joined, run_layers
from dsv3_jax.nn.linear import Linear
from dsv3_jax.nn.moe import RouterStats
from dsv3_jax.nn.norm import RMSNorm
from dsv3_jax.precision.recipe import PrecisionRecipe


class MTPModule(nnx.Module):
    """h^k = TRM(M [norm(Emb(t_{i+k})); norm(h^{k-1}_i)]): predicts k tokens further than the main model.

    The embedding half comes first, as in the published weights. Embedding and output head are the main model's and
    are not held here; `norm` is the published `shared_head.norm`.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, recipe: PrecisionRecipe = PrecisionRecipe()):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(width, "embed", eps)
        self.hnorm = RMSNorm(width, "embed", eps)
        self.eh_proj = Linear(2 * width, width, ("mlp", "embed"), config.initializer_range, rngs,
                              recipe.linear)
        self.block = Block(config, moe=True, rngs=rngs, recipe=recipe)
        self.norm = RMSNorm(width, "embed", eps)

    def __call__(self, hidden_BTD: jax.Array, ahead_BTD: jax.Array, positions_T: jax.Array,
                 execution: Execution) -> tuple[jax.Array, RouterStats | None]:
        """Previous depth's h and the embeddings k tokens ahead -> (h^k before `norm`, routing statistics)."""
        inputs_BTD = self.join(hidden_BTD, ahead_BTD)
        if not execution.dual:
            return self.block(inputs_BTD, positions_T, execution)
        graphdef, weights = nnx.split(self.block)
        both, (stats,) = run_layers(lambda positions_T: layer_of(graphdef, positions_T, execution), halves(inputs_BTD),
                                    [weights], positions_T)
        return joined(both), stats

    def join(self, hidden_BTD: jax.Array, ahead_BTD: jax.Array) -> jax.Array:
        """M [norm(Emb); norm(h)], what the module's layer reads: [B, T, D]."""
        return self.eh_proj(jnp.concatenate([self.enorm(ahead_BTD), self.hnorm(hidden_BTD)], axis=-1))
