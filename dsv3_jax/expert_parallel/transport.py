"""How the slots of one hop get to their ranks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv3_jax.config import Transport
from dsv3_jax.expert_parallel.plan import Axis, Hop, swap


def exchange(slots: jax.Array, hop: Hop, axis: Axis, transport: Transport) -> jax.Array:
    """[N * C, ...] -> the same shape: chunk n goes to rank n of `axis`, and what comes from rank n becomes chunk n.

    "padded" sends whole chunks and "ragged" the used slots alone, both by XLA, which for CPU has no ragged exchange.
    Only the first `hop.sent_N` slots of a chunk count. What the others hold on arrival, the plan never reads.
    """
    if transport == "padded":
        return swap(slots, axis)
    ranks = hop.sent_N.shape[0]
    each = slots.shape[0] // ranks
    starts_N = each * jnp.arange(ranks, dtype=jnp.int32)
    at_receiver_N = jnp.full((ranks,), each * jax.lax.axis_index(axis), jnp.int32)
    return jax.lax.ragged_all_to_all(slots, jnp.zeros_like(slots), starts_N, hop.sent_N, at_receiver_N,
                                     hop.received_N, axis_name=axis)
