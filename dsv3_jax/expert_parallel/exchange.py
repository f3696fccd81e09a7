"""Node-limited dispatch and combine in two hops (paper 1, section 4.3; paper 2, section 3.2.2).

Dispatch sends one copy of a token to each node that has an expert of it, over scale_out; that node forwards one copy
to each of its devices concerned, over scale_up; the device makes one copy for each of its experts. Combine is the same
path backwards: summed on the device, then inside the node, then at home, so the slow network carries one row for a
(token, node) pair either way.

This transport uses XLA's padded all-to-all with room for the worst case, so no token is ever dropped: a device's
receive buffer has a row for every token of its expert-parallel group.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.expert_parallel.permutation import (
    Permutation,
    choices_to_slots,
    copy_to_slots,
    group_counts,
    permutation,
    sum_from_slots,
)


class Topology(NamedTuple):
    """How experts are spread: expert e lives on node e // (experts/scale_out), and so on inside the node."""

    experts: int
    scale_out: int = 1
    scale_up: int = 1

    @property
    def experts_per_node(self) -> int:
        return self.experts // self.scale_out

    @property
    def experts_per_device(self) -> int:
        return self.experts_per_node // self.scale_up


class Plan(NamedTuple):
    """A dispatch that was made, and all that its combine needs. A hop over an axis of size one is None."""

    node_hop: Permutation | None
    device_hop: Permutation | None
    to_experts: Permutation
    weights_P: jax.Array
    """float32 [P]: the router's weight of each expert row."""
    group_sizes_E: jax.Array
    """int32 [experts_per_device]: rows of each expert, padding to the alignment included."""


def _hop(axis: str, size: int, owner_RK: jax.Array) -> Permutation:
    """The plan of one hop: row r goes once to each owner that its choices name (size = nowhere)."""
    wanted_RN = jnp.any(owner_RK[:, :, None] == jnp.arange(size), axis=1)
    bucket_RN = jnp.where(wanted_RN, jnp.arange(size), size)
    rows = owner_RK.shape[0]
    return permutation(bucket_RN, rows * jnp.arange(size), size * rows)


def _swap(x: jax.Array, axis: str) -> jax.Array:
    """Sends the n-th chunk of rows to the n-th rank of `axis`; its own inverse and its own transpose."""
    return jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)


def _send(rows: jax.Array, weights_RK: jax.Array, experts_RK: jax.Array, hop: Permutation,
          axis: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows with their choices and weights, copied by `hop` and exchanged over `axis`; empty slots choose nothing."""
    experts = jnp.where(hop.choice_S[:, None] >= 0, copy_to_slots(experts_RK, hop), -1)
    return _swap(copy_to_slots(rows, hop), axis), _swap(copy_to_slots(weights_RK, hop), axis), _swap(experts, axis)


def _local(experts_RK: jax.Array, axis: str, size: int) -> jax.Array:
    """Experts counted from the first of this rank along `axis`; -1 for those of other ranks, `size` a rank."""
    local = experts_RK - size * jax.lax.axis_index(axis)
    return jnp.where((experts_RK >= 0) & (local >= 0) & (local < size), local, -1)


def _owner(experts_RK: jax.Array, size: int, ranks: int) -> jax.Array:
    return jnp.where(experts_RK >= 0, experts_RK // size, ranks)


@jax.named_scope("dispatch")
def dispatch(hidden_TD: jax.Array, experts_TK: jax.Array, weights_TK: jax.Array, topology: Topology,
             alignment: int = 1) -> tuple[jax.Array, Plan]:
    """Brings tokens to their experts. Runs inside a `shard_map` over scale_out and scale_up where they exceed one.

    Args:
      hidden_TD: this device's tokens, [T, D].
      experts_TK: int32 [T, K], distinct experts of each token, numbered over the model.
      weights_TK: float32 [T, K].
      topology: sizes of the two hops.
      alignment: every expert's rows are padded to a multiple of it.

    Returns:
      rows_PD, grouped by this device's experts (padding rows are zero), and the plan for `combine`.
    """
    rows, weights, experts = hidden_TD, weights_TK, experts_TK
    node_hop = device_hop = None
    if topology.scale_out > 1:
        node_hop = _hop("scale_out", topology.scale_out,
                        _owner(experts, topology.experts_per_node, topology.scale_out))
        rows, weights, experts = _send(rows, weights, experts, node_hop, "scale_out")
        experts = _local(experts, "scale_out", topology.experts_per_node)
    if topology.scale_up > 1:
        device_hop = _hop("scale_up", topology.scale_up,
                          _owner(experts, topology.experts_per_device, topology.scale_up))
        rows, weights, experts = _send(rows, weights, experts, device_hop, "scale_up")
        experts = _local(experts, "scale_up", topology.experts_per_device)

    here = topology.experts_per_device
    bucket = jnp.where(experts >= 0, experts, here)
    sizes_E = -(-group_counts(bucket, here) // alignment) * alignment
    choices = rows.shape[0] * min(experts.shape[1], here)
    slots = -(-(choices + here * (alignment - 1)) // alignment) * alignment
    to_experts = permutation(bucket, jnp.cumsum(sizes_E) - sizes_E, slots)
    plan = Plan(node_hop, device_hop, to_experts, choices_to_slots(weights, to_experts), sizes_E)
    return copy_to_slots(rows, to_experts), plan


@jax.named_scope("combine")
def combine(outputs_PD: jax.Array, plan: Plan) -> jax.Array:
    """Weights the experts' outputs and brings their sum home: [P, D] -> [T, D], in the outputs' dtype.

    Sums are float32 at each level and rounded to the outputs' dtype for the network: device, node, home.
    """
    rows = sum_from_slots((outputs_PD * plan.weights_P[:, None]).astype(outputs_PD.dtype), plan.to_experts)
    if plan.device_hop is not None:
        rows = sum_from_slots(_swap(rows, "scale_up"), plan.device_hop)
    if plan.node_hop is not None:
        rows = sum_from_slots(_swap(rows, "scale_out"), plan.node_hop)
    return rows
