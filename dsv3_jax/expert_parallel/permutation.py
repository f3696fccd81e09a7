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
      starts_N: int32 [N], first slot of each bucket. Buckets must be large enough: nothing is dropped here.
      slots: S, static.
    """
    flat = bucket_RK.reshape(-1)
    member = flat[:, None] == jnp.arange(starts_N.shape[0])
    rank_in_bucket = jnp.sum(jnp.where(member, jnp.cumsum(member, axis=0, dtype=jnp.int32) - 1, 0), axis=1)
    goes = flat < starts_N.shape[0]
    slot = jnp.where(goes, jnp.append(starts_N, 0)[flat] + rank_in_bucket, -1).astype(jnp.int32)
    choice_S = jnp.full((slots,), -1, jnp.int32).at[jnp.where(goes, slot, slots)].set(
        jnp.arange(flat.shape[0], dtype=jnp.int32), mode="drop", unique_indices=True)
    return Permutation(choice_S, slot.reshape(bucket_RK.shape))


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
