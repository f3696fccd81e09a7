"""Node-limited dispatch and combine in two hops (paper 1, section 4.3; paper 2, section 3.2.2).

Dispatch sends one copy of a token to each node that has an expert of it, over scale_out; that node forwards one copy
to each of its devices concerned, in one hop over scale_up and context; the device makes one copy for each of its
experts. Combine is the same path backwards: summed on the device, then inside the node, then at home, so the slow
network carries one row for a (token, node) pair either way.

This transport uses XLA's padded all-to-all. Its buffers hold what a round's quota allows (`rounds`), and a caller that
keeps to the quota loses no token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.expert_parallel.permutation import (
    Permutation,
    choices_to_slots,
    copy_to_slots,
    group_counts,
    permutation,
    sum_from_slots,
    weighted_sum_from_slots,
)
from dsv3_jax.expert_parallel.rounds import Quota
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import FAST_AXES

Axis = str | tuple[str, ...]
"""A mesh axis, or several in order that count as one, the last fastest."""


class Plan(NamedTuple):
    """A dispatch that was made, and all that its combine needs. A hop over an axis of size one is None."""

    node_hop: Permutation | None
    device_hop: Permutation | None
    to_experts: Permutation
    weights_P: jax.Array
    """float32 [P]: the router's weight of each expert row."""
    group_sizes_E: jax.Array
    """int32 [experts_per_device]: rows of each expert, padding to the alignment included."""


def _hop(owner_RK: jax.Array, owners: int, rows_each: int) -> Permutation:
    """The plan of one hop: row r goes once to each owner that its choices name (`owners` = nowhere).

    Every column of the plan costs gathers of rows, so they are the owners or the choices, whichever are fewer.
    """
    if owners <= owner_RK.shape[1]:
        wanted_RN = jnp.any(owner_RK[:, :, None] == jnp.arange(owners), axis=1)
        bucket = jnp.where(wanted_RN, jnp.arange(owners), owners)
    else:
        named_before_RK = jnp.any(jnp.tril(owner_RK[:, :, None] == owner_RK[:, None, :], -1), axis=2)
        bucket = jnp.where(named_before_RK, owners, owner_RK)
    return permutation(bucket, rows_each * jnp.arange(owners), owners * rows_each)


def _swap(x: jax.Array, axis: Axis) -> jax.Array:
    """Sends the n-th chunk of rows to the n-th rank of `axis`; its own inverse and its own transpose."""
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)


def _send(rows: jax.Array, weights_RK: jax.Array, experts_RK: jax.Array, hop: Permutation,
          axis: Axis) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows with their choices and weights, copied by `hop` and exchanged over `axis`; empty slots choose nothing."""
    experts = jnp.where(hop.choice_S[:, None] >= 0, copy_to_slots(experts_RK, hop), -1)
    return _swap(copy_to_slots(rows, hop), axis), _swap(copy_to_slots(weights_RK, hop), axis), _swap(experts, axis)


def _local(experts_RK: jax.Array, axis: Axis, size: int) -> jax.Array:
    """Experts counted from the first of this rank along `axis`; -1 for those of other ranks, `size` a rank."""
    local = experts_RK - size * jax.lax.axis_index(axis)
    return jnp.where((experts_RK >= 0) & (local >= 0) & (local < size), local, -1)


def _compact(experts_RK: jax.Array, weights_RK: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """The choices of each row moved to the front, in order, and cut to the `most` columns that can hold any.

    A row's choices are spread over K columns of which a device owns few, and each column costs its own gather of rows.
    """
    if most >= experts_RK.shape[1]:
        return experts_RK, weights_RK
    place_RK = checkpoint_name(jnp.where(experts_RK >= 0, jnp.cumsum(experts_RK >= 0, axis=1) - 1, -1), "plan")
    moved_RJK = place_RK[:, None, :] == jnp.arange(most)[:, None]
    return (jnp.max(jnp.where(moved_RJK, experts_RK[:, None, :], -1), axis=2),
            jnp.sum(jnp.where(moved_RJK, weights_RK[:, None, :], 0), axis=2))


def _owner(experts_RK: jax.Array, size: int, ranks: int) -> jax.Array:
    return jnp.where(experts_RK >= 0, experts_RK // size, ranks)


@jax.named_scope("dispatch")
def dispatch(hidden_TD: jax.Array, experts_TK: jax.Array, weights_TK: jax.Array, topology: Topology, quota: Quota,
             alignment: int = 1) -> tuple[jax.Array, Plan]:
    """Brings tokens to their experts. Runs inside a `shard_map` over the expert axes where they exceed one.

    Args:
      hidden_TD: this device's tokens, [T, D].
      experts_TK: int32 [T, K], distinct experts of each token, numbered over the model; -1 is no choice. They must keep
        to `quota`, which is not checked here.
      weights_TK: float32 [T, K].
      topology: sizes of the two hops.
      quota: what any device of the group sends to one node and to one device; it sets the size of all buffers.
      alignment: every expert's rows are padded to a multiple of it.

    Returns:
      rows_PD, grouped by this device's experts (padding rows are zero), and the plan for `combine`.
    """
    rows, weights, experts = hidden_TD, weights_TK, experts_TK
    node_hop = device_hop = None
    if topology.scale_out > 1:
        owner = _owner(experts, topology.experts_per_node, topology.scale_out)
        node_hop = _hop(owner, topology.scale_out, quota.node_rows)
        rows, weights, experts = _send(rows, weights, experts, node_hop, "scale_out")
        experts = _local(experts, "scale_out", topology.experts_per_node)
    if topology.scale_up > 1:
        owner = _owner(experts, topology.experts_per_device, topology.scale_up)
        rows_each = min(rows.shape[0], topology.scale_out * quota.device_choices)
        device_hop = _hop(owner, topology.scale_up, rows_each)
        rows, weights, experts = _send(rows, weights, experts, device_hop, FAST_AXES)
        experts = _local(experts, FAST_AXES, topology.experts_per_device)

    here = topology.experts_per_device
    experts, weights = _compact(experts, weights, here)
    bucket = jnp.where(experts >= 0, experts, here)
    sizes_E = -(-group_counts(bucket, here) // alignment) * alignment
    choices = min(topology.devices * quota.device_choices, experts.size)
    slots = -(-(choices + here * (alignment - 1)) // alignment) * alignment
    to_experts = permutation(bucket, jnp.cumsum(sizes_E) - sizes_E, slots)
    plan = Plan(node_hop, device_hop, to_experts, choices_to_slots(weights, to_experts),
                checkpoint_name(sizes_E, "plan"))
    return copy_to_slots(rows, to_experts), plan


@jax.named_scope("combine")
def combine(outputs_PD: jax.Array, plan: Plan) -> jax.Array:
    """Weights the experts' outputs and brings their sum home: [P, D] -> float32 [T, D].

    Sums are float32 at each level (device, node, home) and rounded to the outputs' dtype for the network between them.
    """
    hops: list[tuple[Axis, Permutation | None]] = [(FAST_AXES, plan.device_hop), ("scale_out", plan.node_hop)]
    levels = [(axis, hop) for axis, hop in hops if hop is not None]
    dtypes = [outputs_PD.dtype] * len(levels) + [jnp.dtype(jnp.float32)]
    rows = weighted_sum_from_slots(outputs_PD, plan.weights_P, plan.to_experts, dtypes[0])
    for (axis, hop), dtype in zip(levels, dtypes[1:], strict=True):
        rows = sum_from_slots(_swap(rows, axis), hop, dtype)
    return rows
