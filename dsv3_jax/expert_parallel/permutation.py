"""Copies of rows into slots, and the sum of slots back into rows: each is the other's gradient.

Every stage of expert exchange is one of these: a token's copies for the nodes it goes to, a row's copies for the
devices of a node, a row's copies for the experts of a device. Both directions are gathers, so no stage needs a
scatter of rows, forward or backward.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Permutation(NamedTuple):
    """Where copies go. Row t has up to K copies, one for each of its choices."""

    choice_S: jax.Array
    """int32 [S]: slot s holds choice t*K + k, that is row t = choice // K; -1 for an empty slot."""
    slot_RK: jax.Array
    """int32 [R, K]: the slot of each choice; -1 for a choice that goes nowhere."""


def permutation(bucket_RK: jax.Array, starts_N: jax.Array, slots: int) -> Permutation:
    """Places choices in the bucket each names, in row order.

    Args:
      bucket_RK: int32 [R, K] in [0, N]; N means the choice goes nowhere.
      starts_N: int32 [N], ascending from 0, the first slot of each bucket. Buckets must be large enough: nothing is
        dropped here.
      slots: S, static.
    """
    flat, buckets = bucket_RK.reshape(-1), starts_N.shape[0]
    ranks = jnp.cumsum(flat[:, None] == jnp.arange(buckets), axis=0, dtype=jnp.int32)
    rank = jnp.take_along_axis(ranks, jnp.minimum(flat, buckets - 1)[:, None], axis=1)[:, 0] - 1
    slot = jnp.where(flat < buckets, starts_N[jnp.minimum(flat, buckets - 1)] + rank, -1)
    # The inverse by sorting: a scatter would run row by row on CPU.
    in_order = jnp.argsort(flat, stable=True)
    counts_N = ranks[-1]
    slot_S = jnp.arange(slots)
    bucket_S = jnp.searchsorted(starts_N, slot_S, side="right") - 1
    rank_S = slot_S - starts_N[bucket_S]
    choice_S = in_order[jnp.minimum((jnp.cumsum(counts_N) - counts_N)[bucket_S] + rank_S, flat.shape[0] - 1)]
    choice_S = jnp.where(rank_S < counts_N[bucket_S], choice_S, -1)
    return Permutation(choice_S.astype(jnp.int32), slot.astype(jnp.int32).reshape(bucket_RK.shape))


def group_counts(bucket_RK: jax.Array, buckets: int) -> jax.Array:
    """int32 [N]: choices that name each bucket."""
    return jnp.sum(bucket_RK.reshape(-1, 1) == jnp.arange(buckets), axis=0, dtype=jnp.int32)


@jax.custom_vjp
def copy_to_slots(rows_RD: jax.Array, plan: Permutation) -> jax.Array:
    """[R, D] -> [S, D]; empty slots are zero."""
    row_S = plan.choice_S // plan.slot_RK.shape[1]
    return jnp.where(plan.choice_S[:, None] >= 0, rows_RD[jnp.maximum(row_S, 0)], 0)


@jax.custom_vjp
def sum_from_slots(slots_SD: jax.Array, plan: Permutation) -> jax.Array:
    """[S, D] -> [R, D]: the float32 sum of each row's copies, in the dtype of the slots."""
    total = jnp.zeros((plan.slot_RK.shape[0], slots_SD.shape[1]), jnp.float32)
    for k in range(plan.slot_RK.shape[1]):
        slot_R = plan.slot_RK[:, k]
        total += jnp.where(slot_R[:, None] >= 0, slots_SD[jnp.maximum(slot_R, 0)], 0).astype(jnp.float32)
    return total.astype(slots_SD.dtype)


copy_to_slots.defvjp(lambda rows, plan: (copy_to_slots(rows, plan), plan),
                     lambda plan, grads: (sum_from_slots(grads, plan), None))
sum_from_slots.defvjp(lambda slots, plan: (sum_from_slots(slots, plan), plan),
                      lambda plan, grads: (copy_to_slots(grads, plan), None))


def choices_to_slots(values_RK: jax.Array, plan: Permutation) -> jax.Array:
    """One number a choice, [R, K] -> [S]; empty slots are zero."""
    each_choice = Permutation(plan.choice_S, plan.slot_RK.reshape(-1, 1))
    return copy_to_slots(values_RK.reshape(-1, 1), each_choice)[:, 0]
