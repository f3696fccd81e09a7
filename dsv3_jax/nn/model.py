"""The whole model: embedding, dense layers, MoE layers, output head, and the multi-token-prediction modules."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import Execution, ModelConfig, Precision
from dsv3_jax.mesh import constrain_batch, context_size, gather_for_compute
from dsv3_jax.nn.block import Block, gathered, recomputed, run_stack, stack_of
from dsv3_jax.nn.linear import Embedding, OutputHead
from dsv3_jax.nn.moe import RouterStats
from dsv3_jax.nn.mtp import MTPModule
from dsv3_jax.nn.norm import RMSNorm
from dsv3_jax.nn.router import RouterBias
from dsv3_jax.precision.recipe import RECIPES, PrecisionRecipe


class ModelOutput(NamedTuple):
    """Hidden states ready for the output head, and routing statistics."""

    hidden_BTD: jax.Array
    """After the final norm."""
    mtp_hidden: tuple[jax.Array, ...]
    """[B, T, D] for each depth, after that depth's norm."""
    stats: RouterStats
    """Leading dimension: MoE layers in order, then MTP depths."""


class DeepSeekV3(nnx.Module):
    """A DeepSeek-V3-class language model; attribute names follow the published weights."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, recipe: PrecisionRecipe = PrecisionRecipe()):
        self.config = config
        c = config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.initializer_range, rngs)
        if c.first_k_dense_replace:
            self.dense_layers = stack_of(c.first_k_dense_replace, lambda r: Block(c, False, r, recipe), rngs)
        self.moe_layers = stack_of(c.num_moe_layers, lambda r: Block(c, True, r, recipe), rngs)
        self.norm = RMSNorm(c.hidden_size, "embed", c.rms_norm_eps)
        self.lm_head = OutputHead(c.vocab_size, c.hidden_size, c.initializer_range, rngs)
        self.mtp = nnx.List([MTPModule(c, rngs, recipe) for _ in range(c.num_nextn_predict_layers)])

    def __call__(self, tokens: jax.Array, *, mtp: bool = True, execution: Execution = Execution()) -> ModelOutput:
        """Runs the model.

        Args:
          tokens: int [B, T + depth] with mtp, [B, T] without: T positions and, for multi-token prediction, the depth
            tokens that follow them. (The paper shortens each depth's loss instead; with the look-ahead every depth
            predicts at all T positions.)
          mtp: whether to run the multi-token-prediction modules.
          execution: how it is computed.
        """
        depth = len(self.mtp) if mtp else 0
        positions_T = jnp.arange(tokens.shape[1] - depth)
        hidden_BTD, *ahead_BTD = embed_with_depths(self.embed_tokens, tokens, depth)
        if self.config.first_k_dense_replace:
            hidden_BTD, _ = run_stack(self.dense_layers, hidden_BTD, positions_T, execution)
        hidden_BTD, stats = run_stack(self.moe_layers, hidden_BTD, positions_T, execution)
        normed = self.norm(hidden_BTD)
        previous = hidden_BTD if self.config.mtp_hidden == "pre_norm" else normed
        mtp_hidden, mtp_stats = run_prediction_modules(list(self.mtp)[:depth], previous, ahead_BTD, positions_T,
                                                       execution)
        stats = jax.tree.map(lambda *parts: jnp.concatenate(parts), stats, *mtp_stats)
        return ModelOutput(normed, mtp_hidden, stats)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """[..., D] -> [..., V], float32; serves the main model and every depth."""
        return self.lm_head(hidden_BTD)


def split_model(config: ModelConfig, key: jax.Array | int = 0,
                precision: Precision = "bf16") -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(structure, parameters, router biases) of a new model; call under `jit` or `eval_shape` to allocate nothing.

    Structures in different precisions take the same parameters, and bf16's is float32's too (`compute_weights`).
    """
    model = DeepSeekV3(config, nnx.Rngs(key), RECIPES[precision])
    structure, params, *others = nnx.split(model, nnx.Param, RouterBias)
    return structure, params, others[0]


@functools.cache
def model_structure(config: ModelConfig, precision: Precision = "bf16") -> nnx.GraphDef:
    """The static half of the model, for `nnx.merge` with parameters and router biases."""
    structure = []

    def trace() -> None:
        structure.append(split_model(config, precision=precision)[0])
    jax.eval_shape(trace)
    return structure[0]


def embed_with_depths(table: Embedding, tokens: jax.Array, depth: int) -> list[jax.Array]:
    """int [B, T + depth] -> depth + 1 times [B, T, D]: the vectors of each position's token, of the next, and so on."""
    embed, length = gathered(table), tokens.shape[1] - depth
    if context_size() == 1:
        embedded = constrain_batch(embed(tokens))
        return [embedded[:, k:k + length] for k in range(depth + 1)]
    # T + depth columns do not divide over devices, and to shift vectors from device to device is an exchange: each
    # device looks up its positions' tokens of every depth, in one gather, so that the gradient is one scatter.
    ids_BTK = jnp.stack([tokens[:, k:k + length] for k in range(depth + 1)], axis=2)
    embedded_BTKD = constrain_batch(embed(constrain_batch(ids_BTK)))
    return [embedded_BTKD[:, :, k] for k in range(depth + 1)]


def run_prediction_modules(modules: Sequence[MTPModule], hidden_BTD: jax.Array, ahead_BTD: Sequence[jax.Array],
                           positions_T: jax.Array, execution: Execution
                           ) -> tuple[tuple[jax.Array, ...], list[RouterStats]]:
    """The chain of multi-token-prediction modules.

    Args:
      hidden_BTD: of the main model, before or after its norm as `ModelConfig.mtp_hidden` says.
      ahead_BTD: [B, T, D] for each module: the vectors of the tokens 1, 2, ... further on.

    Returns:
      [B, T, D] of each module after its norm; and its statistics with a leading dimension of one layer.
    """
    outputs, stats, previous = [], [], hidden_BTD
    for module, embedded in zip(modules, ahead_BTD, strict=True):
        previous, layer_stats = _run_mtp(module, previous, embedded, positions_T, execution)
        outputs.append(module.norm(previous))
        stats.append(jax.tree.map(lambda x: x[None], layer_stats))
    return tuple(outputs), stats


def _run_mtp(module: MTPModule, hidden_BTD: jax.Array, ahead_BTD: jax.Array, positions_T: jax.Array,
             execution: Execution) -> tuple[jax.Array, RouterStats | None]:
    graphdef, state = nnx.split(module)

    def run(state: nnx.State, hidden_BTD: jax.Array, ahead_BTD: jax.Array) -> tuple[jax.Array, RouterStats | None]:
        return nnx.merge(graphdef, gather_for_compute(state))(hidden_BTD, ahead_BTD, positions_T, execution)
    return recomputed(run, execution.recompute)(state, hidden_BTD, ahead_BTD)
