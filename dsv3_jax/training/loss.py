"""Next-token loss, multi-token-prediction loss and balance loss (paper 2, sections 2.1.2 and 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dsv3_jax.config import Execution
from dsv3_jax.mesh import TOKENS, on_each_device
from dsv3_jax.nn.block import gathered
from dsv3_jax.nn.linear import OutputHead
from dsv3_jax.nn.model import DeepSeekV3, ModelOutput

LOGITS_AT_ONCE = 2 ** 26
"""Logits of one sequence held at a time; longer ones go chunk by chunk and are recomputed in the backward."""


class Losses(NamedTuple):
    """Float32 scalars: means over tokens, in nats."""

    main: jax.Array
    mtp: jax.Array
    """Mean over depths; 0 without multi-token prediction."""
    balance: jax.Array
    """Sum over MoE layers, without its weight."""


@jax.custom_vjp
def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """logsumexp(logits) - logits[target] over the last axis, float32.

    Its gradient, softmax minus one-hot, is formed once for both products that use it (left to itself, XLA on CPU
    recomputes the exponentials for each) and without a scatter into all the logits.
    """
    return _cross_entropy_forward(logits, targets)[0]


def _cross_entropy_forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    log_total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0), axis=-1)
    return log_total - chosen, (logits, targets, log_total)


def _cross_entropy_backward(saved: tuple[jax.Array, ...], grads: jax.Array) -> tuple[jax.Array, None]:
    logits, targets, log_total = saved
    target = jnp.arange(logits.shape[-1]) == targets[..., None]
    d_logits = (jnp.exp(logits - log_total[..., None]) - target) * grads[..., None]
    return jax.lax.optimization_barrier(d_logits), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def negative_log_likelihood(head: OutputHead, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log softmax(head(hidden))[target], float32 [B, T], never holding all the logits of a long sequence.

    On a mesh each device sees its own tokens and the whole head, so that the head's gradient is summed over devices
    once and not for each chunk.
    """
    graphdef, weights = nnx.split(head)

    def local(weights: nnx.State, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        return _nll_in_chunks(nnx.merge(graphdef, weights), hidden_BTD, targets_BT)
    return on_each_device(local, (PartitionSpec(), TOKENS, TOKENS), TOKENS)(weights, hidden_BTD, targets_BT)


@jax.named_scope("head")
def _nll_in_chunks(head: OutputHead, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    def nll(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return cross_entropy(head(hidden), targets)

    length, chunk = targets_BT.shape[1], targets_BT.shape[1]
    while chunk * head.weight.shape[0] > LOGITS_AT_ONCE and chunk % 2 == 0:
        chunk //= 2
    if chunk == length:
        return nll(hidden_BTD, targets_BT)

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], length // chunk, chunk, *x.shape[2:]), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda args: nll(*args)), (chunks(hidden_BTD), chunks(targets_BT)))
    return jnp.moveaxis(out, 0, 1).reshape(targets_BT.shape)


def training_losses(model: DeepSeekV3, tokens: jax.Array,
                    execution: Execution = Execution()) -> tuple[Losses, ModelOutput]:
    """All losses of a batch.

    Args:
      tokens: int [B, T + 1 + depth]: T inputs, the last target, and the further targets of each prediction depth.
      execution: how the model is computed.
    """
    depth = len(model.mtp)
    output = model(tokens[:, :-1], execution=execution)
    main, mtp = prediction_losses(gathered(model.lm_head), output.hidden_BTD, output.mtp_hidden, tokens, depth)
    return Losses(main, mtp, jnp.sum(output.stats.balance_loss)), output


def prediction_losses(head: OutputHead, hidden_BTD: jax.Array, mtp_hidden: Sequence[jax.Array], tokens: jax.Array,
                      depth: int) -> tuple[jax.Array, jax.Array]:
    """(`Losses.main`, `Losses.mtp`) of hidden states after their norms; `tokens` as in `training_losses`."""
    length = tokens.shape[1] - 1 - depth
    main = jnp.mean(negative_log_likelihood(head, hidden_BTD, tokens[:, 1:1 + length]))
    ahead = [jnp.mean(negative_log_likelihood(head, hidden, tokens[:, k + 1:k + 1 + length]))
             for k, hidden in enumerate(mtp_hidden, start=1)]
    return main, jnp.asarray(sum(ahead) / depth if depth else jnp.zeros(()))
