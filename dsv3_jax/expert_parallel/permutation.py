"""Copies of rows into slots, and the sum of slots back into rows: each is the other's transpose.

Every stage of expert exchange is one of these: a token's copies for the nodes it goes to, a row's copies for the
devices of a node, a row's copies for the experts of a device. Both directions are gathers, so no stage needs a
scatter of rows, forward or backward.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


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
    in_bucket_NF = flat == jnp.arange(buckets)[:, None]
    ranks_NF = jnp.cumsum(in_bucket_NF, axis=1, dtype=jnp.int32)
    slot_F = jnp.sum(jnp.where(in_bucket_NF, starts_N[:, None] + ranks_NF, 0), axis=0) - 1
    slot = jnp.where(flat < buckets, slot_F, -1)
    slot_S = jnp.arange(slots)
    bucket_S = jnp.sum(slot_S >= starts_N[:, None], axis=0) - 1
    rank_S = slot_S - starts_N[bucket_S]
    choice_S = jnp.where(rank_S < ranks_NF[bucket_S, -1], _choice_of_rank(ranks_NF, bucket_S, rank_S), -1)
    # Named: a backward that recomputes can keep these few integers and spare the search and what led to it.
    return Permutation(checkpoint_name(choice_S.astype(jnp.int32), "plan"),
                       checkpoint_name(slot.astype(jnp.int32).reshape(bucket_RK.shape), "plan"))


def _choice_of_rank(ranks_NF: jax.Array, bucket_S: jax.Array, rank_S: jax.Array) -> jax.Array:
    """The first choice at which a bucket has counted more than `rank` choices, by bisection.

    The inverse of `slot` without a sort, which XLA:TPU takes many seconds to compile, and without a scatter.
    """
    choices = ranks_NF.shape[1]
    ranks, start_S = ranks_NF.reshape(-1), bucket_S * choices

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        before = ranks[start_S + middle] <= rank_S
        return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)
    bounds = (jnp.zeros_like(rank_S), jnp.full_like(rank_S, choices - 1))
    return jax.lax.fori_loop(0, choices.bit_length(), halve, bounds)[0]


def group_counts(bucket_RK: jax.Array, buckets: int) -> jax.Array:
    """int32 [N]: choices that name each bucket."""
    return jnp.sum(bucket_RK.reshape(-1, 1) == jnp.arange(buckets), axis=0, dtype=jnp.int32)


@jax.custom_vjp
def copy_to_slots(rows_RD: jax.Array, plan: Permutation) -> jax.Array:
    """[R, D] -> [S, D]; empty slots are zero."""
    row_S = plan.choice_S // plan.slot_RK.shape[1]
    return jnp.where(plan.choice_S[:, None] >= 0, rows_RD[jnp.maximum(row_S, 0)], 0)


def sum_from_slots(slots_SD: jax.Array, plan: Permutation, dtype: jnp.dtype | None = None) -> jax.Array:
    """[S, D] -> [R, D]: the float32 sum of each row's copies, in the order of its choices, rounded once to `dtype`
    (None: that of the slots)."""
    total = jnp.zeros((plan.slot_RK.shape[0], slots_SD.shape[1]), jnp.float32)
    for k in range(plan.slot_RK.shape[1]):
        slot_R = plan.slot_RK[:, k]
        total += jnp.where(slot_R[:, None] >= 0, slots_SD[jnp.maximum(slot_R, 0)].astype(jnp.float32), 0)
    return total.astype(slots_SD.dtype if dtype is None else dtype)


copy_to_slots.defvjp(lambda rows, plan: (copy_to_slots(rows, plan), plan),
                     lambda plan, grads: (sum_from_slots(grads, plan), None))


def choices_to_slots(values_RK: jax.Array, plan: Permutation) -> jax.Array:
    """One number a choice, [R, K] -> [S]; empty slots are zero."""
    each_choice = Permutation(plan.choice_S, plan.slot_RK.reshape(-1, 1))
    return copy_to_slots(values_RK.reshape(-1, 1), each_choice)[:, 0]
