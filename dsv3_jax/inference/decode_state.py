"""Rows that are being decoded, and one step of them all."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import Execution
from dsv3_jax.inference.cache import LatentCache
from dsv3_jax.inference.forward import decode
from dsv3_jax.inference.sampling import TARGET, RowSampling, draw, probabilities
from dsv3_jax.inference.speculative import Window, speculative_step, with_token
from dsv3_jax.nn.block import gathered
from dsv3_jax.nn.model import DeepSeekV3


class DecodeState(NamedTuple):
    """What lies on the devices between steps; donated to the next."""

    cache: LatentCache
    last_B: jax.Array
    """int32: the last token of each row, not in the cache yet."""
    seen_BV: jax.Array
    """bool: tokens that each row has, prompt included."""
    window: Window | None
    """For the prediction modules; None in plain decoding."""


def advance(model: DeepSeekV3, state: DecodeState, active_B: jax.Array, rows: RowSampling,
            execution: Execution = Execution()) -> tuple[DecodeState, jax.Array, jax.Array]:
    """One pass of the main model, with drafts if the state has a window.

    Args:
      active_B: bool; a row that is not stays as it is.

    Returns:
      The state after it, int32 [B, Q] new tokens and int32 [B], how many of them each row got.
    """
    cache, last_B, seen_BV, window = state
    if window is not None:
        verified, window, seen_BV, cache = speculative_step(model, window, seen_BV, cache, active_B, rows, execution)
        return (DecodeState(cache, window.tokens_BW[:, -1], seen_BV, window), verified.tokens_BQ,
                jnp.where(active_B, verified.accepted_B + 1, 0))
    out = decode(model, last_B[:, None], cache, active_B, execution)
    logits_BV = gathered(model.lm_head)(out.hidden_BQD[:, 0])
    token_B = draw(probabilities(logits_BV, seen_BV, rows), rows.seed, out.cache.lengths_B, TARGET)
    token_B = jnp.where(active_B, token_B, last_B)
    return (DecodeState(out.cache, token_B, with_token(seen_BV, token_B), None), token_B[:, None],
            active_B.astype(jnp.int32))
