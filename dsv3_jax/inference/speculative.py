"""Speculative decoding by the model's own multi-token-prediction modules (paper 2, section 2.2; paper 1, 2.3.3).

One step: each module drafts one token more, one pass of the main model over all drafts verifies them, and the row
keeps the drafts up to the first rejected one and one token that the main model gives. Acceptance is speculative
sampling (arXiv 2211.17192, 2302.01318): what comes out has exactly the distribution of sampling token by token, filters
included, and at temperature 0 it is the same tokens.

Names: K drafts = prediction modules, Q = K + 1 tokens verified, n tokens in the cache before the step; t_n, the last
token known, is not in it yet. Module k's cache at position i depends on token t_{i+k}, which at the end of the row was
a draft. A step that adds a <= K + 1 tokens leaves a - 1 of its drafts standing; of the entries it wrote, the last k
rested on one that does not. So the next step runs the modules over the last K + 1 positions, which hold those entries
and the a new positions.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import Execution, ModelConfig
from dsv3_jax.inference.cache import LatentCache
from dsv3_jax.inference.forward import Span, decode, predict_ahead
from dsv3_jax.inference.sampling import ACCEPT, DRAFT, TARGET, RowSampling, draw, probabilities, uniform
from dsv3_jax.nn.block import gathered
from dsv3_jax.nn.model import DeepSeekV3


class Window(NamedTuple):
    """The last K + 1 positions of each row, n-K-1 .. n-1: what the prediction modules read."""

    hidden_BWD: jax.Array
    """`CachedOutput.mtp_input_BQD` at these positions; anything where the row is shorter."""
    tokens_BW: jax.Array
    """int32: the token after each position, so the last is t_n."""


class Drafts(NamedTuple):
    """Proposed tokens, and the distributions they were drawn from."""

    tokens_BK: jax.Array
    """int32."""
    probabilities_BKV: jax.Array
    """float32, after the filters."""


class Verified(NamedTuple):
    """What a step adds to each row."""

    tokens_BQ: jax.Array
    """int32: accepted drafts, then one token more; anything after that."""
    accepted_B: jax.Array
    """int32: drafts accepted, 0..K."""


def window_size(config: ModelConfig) -> int:
    """W = K + 1 positions."""
    return config.num_nextn_predict_layers + 1


def window_of(hidden_BTD: jax.Array, tokens_BT: jax.Array, size: int, ends_B: jax.Array) -> Window:
    """The last `size` columns of each row before column ends_B, of arrays that belong together."""
    columns_BW = ends_B[:, None] - size + jnp.arange(size)
    at_BW = jnp.maximum(columns_BW, 0)
    return Window(jnp.take_along_axis(hidden_BTD, at_BW[..., None], axis=1),
                  jnp.take_along_axis(tokens_BT, at_BW, axis=1))


def draft(model: DeepSeekV3, window: Window, seen_BV: jax.Array, cache: LatentCache, active_B: jax.Array,
          rows: RowSampling, execution: Execution = Execution()) -> tuple[Drafts, LatentCache]:
    """One token from each module, each reading the ones before it."""
    head, n_B = gathered(model.lm_head), cache.lengths_B
    positions_BW = n_B[:, None] + jnp.arange(-window.tokens_BW.shape[1], 0)
    # A position before the row's start stands nowhere: it is written nowhere, and no other sees it.
    span = Span(positions_BW, (positions_BW >= 0) & active_B[:, None], n_B, fresh=False)
    hidden_BWD, tokens_BW, tokens, distributions = window.hidden_BWD, window.tokens_BW, [], []
    for k in range(1, len(model.mtp) + 1):
        hidden_BWD, cache = predict_ahead(model, k, hidden_BWD, tokens_BW, span, cache, execution)
        logits_BV = head(gathered(model.mtp[k - 1].norm)(hidden_BWD[:, -1]))
        distributions.append(probabilities(logits_BV, seen_BV, rows))
        tokens.append(draw(distributions[-1], rows.seed, n_B + k, DRAFT))
        seen_BV = with_token(seen_BV, tokens[-1])
        tokens_BW = jnp.concatenate([tokens_BW[:, 1:], tokens[-1][:, None]], axis=1)
    return Drafts(jnp.stack(tokens, axis=1), jnp.stack(distributions, axis=1)), cache


def verify(drafts: Drafts, targets_BQV: jax.Array, seed_B: jax.Array, first_B: jax.Array) -> Verified:
    """Speculative sampling: accept draft d with probability min(1, p(d)/q(d)); in place of the first rejected one, draw
    from max(p - q, 0); after the last accepted one, from p.

    Args:
      targets_BQV: float32, the main model's distributions p at each draft and after the last.
      seed_B: each row's seed.
      first_B: int32, the position of the first draft in its row.
    """
    drafts_BK, q_BKV = drafts
    p_BK, q_BK = (jnp.take_along_axis(x_BKV, drafts_BK[..., None], axis=-1)[..., 0]
                  for x_BKV in (targets_BQV[:, :-1], q_BKV))
    u_BK = jnp.stack([uniform(seed_B, first_B + k, ACCEPT) for k in range(drafts_BK.shape[1])], axis=1)
    accepted_B = jnp.sum(jnp.cumprod((u_BK * q_BK < p_BK).astype(jnp.int32), axis=1), axis=1)

    q_BQV = jnp.pad(q_BKV, ((0, 0), (0, 1), (0, 0)))  # after the last draft nothing was proposed
    p_BV, q_BV = (jnp.take_along_axis(x_BQV, accepted_B[:, None, None], axis=1)[:, 0] for x_BQV in (targets_BQV, q_BQV))
    left_BV = jnp.maximum(p_BV - q_BV, 0)
    # Of equal distributions nothing is left but rounding, and nothing is rejected.
    left_BV = jnp.where(jnp.sum(left_BV, axis=-1, keepdims=True) > 0, left_BV, p_BV)
    token_B = draw(left_BV, seed_B, first_B + accepted_B, TARGET)
    column_Q = jnp.arange(targets_BQV.shape[1])
    tokens_BQ = jnp.where(column_Q < accepted_B[:, None], jnp.pad(drafts_BK, ((0, 0), (0, 1))), token_B[:, None])
    return Verified(tokens_BQ, accepted_B)


def speculative_step(model: DeepSeekV3, window: Window, seen_BV: jax.Array, cache: LatentCache, active_B: jax.Array,
                     rows: RowSampling, execution: Execution = Execution(),
                     ) -> tuple[Verified, Window, jax.Array, LatentCache]:
    """Draft, verify and keep.

    Args:
      seen_BV: bool, tokens that each row has, t_n included.
      active_B: bool; a row that is not stays as it is.

    Returns:
      What was added, and window, seen tokens and cache after it.
    """
    n_B, size = cache.lengths_B, window.tokens_BW.shape[1]
    drafts, cache = draft(model, window, seen_BV, cache, active_B, rows, execution)
    tokens_BQ = jnp.concatenate([window.tokens_BW[:, -1:], drafts.tokens_BK], axis=1)
    out = decode(model, tokens_BQ, cache, jnp.where(active_B, tokens_BQ.shape[1], 0), execution)
    logits_BQV = gathered(model.lm_head)(out.hidden_BQD)
    targets, seen = [], seen_BV
    for q in range(tokens_BQ.shape[1]):
        seen = with_token(seen, tokens_BQ[:, q])
        targets.append(probabilities(logits_BQV[:, q], seen, rows))
    verified = verify(drafts, jnp.stack(targets, axis=1), rows.seed, n_B + 1)

    added_B = jnp.where(active_B, verified.accepted_B + 1, 0)
    for q in range(tokens_BQ.shape[1]):
        seen_BV = jnp.where((q < added_B)[:, None], with_token(seen_BV, verified.tokens_BQ[:, q]), seen_BV)
    window = window_of(jnp.concatenate([window.hidden_BWD, out.mtp_input_BQD], axis=1),
                       jnp.concatenate([window.tokens_BW, verified.tokens_BQ], axis=1), size, size + added_B)
    return verified, window, seen_BV, dataclasses.replace(out.cache, lengths_B=n_B + added_B)


def with_token(seen_BV: jax.Array, token_B: jax.Array) -> jax.Array:
    """seen_BV and one token more of each row."""
    return seen_BV | (jnp.arange(seen_BV.shape[1]) == token_B[:, None])
