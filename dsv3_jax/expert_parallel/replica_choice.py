"""Which of an expert's replicas a token goes to: equal shares, from the token's own number alone.

Taking turns among the tokens that chose an expert would share them more evenly still, but then a token's replica, and
with it the order in which its experts' outputs are added on the way home, would depend on what else is in the batch.
Here both are the token's own, whatever it is batched with.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

GOLDEN = 2654435769
"""2^32 over the golden ratio. Multiples of that ratio, without their whole parts, are spread over [0, 1) as evenly as
multiples of any number: n successive ones put n times its length, give or take a few, into any interval."""
APART = 3242174889
"""2^32 over the plastic number, to the same end: experts begin at places spread over [0, 1), so that the first replicas
of all don't get the same tokens."""


def choose_replicas(experts_TK: jax.Array, number_T: jax.Array, replicas_E: jax.Array,
                    replica_slots_ER: jax.Array) -> jax.Array:
    """int32 [T, K]: a slot that holds each chosen expert; -1 where that is no choice, -1.

    The replicas of an expert share evenly the tokens of any run of successive numbers, or of numbers with equal steps;
    of tokens that choose it at random, as evenly as if each were drawn by lot.

    Args:
      experts_TK: int32 [T, K], experts of the model.
      number_T: int [T], of each token, such as its place in its sequence plus a number of the sequence's own. Tokens
        with the same number go to the same replica, so sequences that decode side by side must not all have the same.
      replicas_E: one layer's `Placement.replicas_LE`.
      replica_slots_ER: one layer's `Placement.replica_slots_LER`.
    """
    chosen_TK = jnp.maximum(experts_TK, 0)
    place_TK = (number_T.astype(jnp.uint32)[:, None] * jnp.uint32(GOLDEN)
                + chosen_TK.astype(jnp.uint32) * jnp.uint32(APART))
    # The upper 16 bits are a fraction of one; times the number of replicas it stays below 2^32.
    turn_TK = ((place_TK >> 16) * replicas_E[chosen_TK].astype(jnp.uint32)) >> 16
    return jnp.where(experts_TK >= 0, replica_slots_ER[chosen_TK, turn_TK.astype(jnp.int32)], -1)
