"""The plan of an exchange: who sends which rows where, at both hops, and how rows lie at their experts.

Node-limited dispatch has two hops (paper 1, section 4.3; paper 2, section 3.2.2). One copy of a token goes to each node
that has an expert of it, over scale_out; that node forwards one copy to each of its devices concerned, in one hop over
scale_up and context; the device makes one copy for each of its experts. Combine is the same path backwards: summed on
the device, then inside the node, then at home, so the slow network carries one row for a (token, node) pair either way.

The plan is made once from the router's choice, with an exchange of a few numbers a row. Dispatch, combine and the
gradients of both follow it (`exchange`).
"""

from __future__ import annotations

import functools
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
)
from dsv3_jax.expert_parallel.rounds import Quota
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import FAST_AXES
from pallas_kernels.peers import Axis, swap


class Hop(NamedTuple):
    """One exchange between N ranks. Slots are N chunks of equal size; the used slots of a chunk come first."""

    copies: Permutation
    """Slots to send, chunk n to rank n; those that come back have the same places."""
    sent_N: jax.Array
    """int32: rows for each rank."""
    received_N: jax.Array
    """int32: rows from each rank."""


class Moves(NamedTuple):
    """Where rows go, from home to their experts. A hop over an axis of size one is None."""

    node_hop: Hop | None
    """Over scale_out."""
    device_hop: Hop | None
    """Over scale_up and context."""
    to_experts: Permutation


class Plan(NamedTuple):
    """All that a dispatch and its combine need."""

    moves: Moves
    weights_P: jax.Array
    """float32 [P]: the router's weight of each expert row; zero for padding. Its gradient goes back to the router."""
    group_sizes_E: jax.Array
    """int32 [experts_per_device]: rows of each expert, padding to the alignment included."""


@jax.named_scope("plan")
def make_plan(experts_TK: jax.Array, weights_TK: jax.Array, topology: Topology, quota: Quota,
              alignment: int = 1) -> Plan:
    """Runs inside a `shard_map` over the expert axes where they exceed one.

    Args:
      experts_TK: int32 [T, K], distinct experts of each token, numbered over the model; -1 is no choice. They must keep
        to `quota`, which is not checked here.
      weights_TK: float32 [T, K].
      topology: sizes of the two hops.
      quota: what any device of the group sends to one node and to one device; it sets the size of all buffers.
      alignment: every expert's rows are padded to a multiple of it.
    """
    weights, experts = weights_TK, experts_TK
    node_hop = device_hop = None
    if topology.scale_out > 1:
        owner = _owner(experts, topology.experts_per_node, topology.scale_out)
        node_hop = _hop(owner, topology.scale_out, quota.node_rows, "scale_out")
        weights, experts = _send(weights, experts, node_hop, "scale_out")
        experts = _local(experts, "scale_out", topology.experts_per_node)
    if topology.scale_up > 1:
        owner = _owner(experts, topology.experts_per_device, topology.scale_up)
        rows_each = min(experts.shape[0], topology.scale_out * quota.device_choices)
        device_hop = _hop(owner, topology.scale_up, rows_each, FAST_AXES)
        weights, experts = _send(weights, experts, device_hop, FAST_AXES)
        experts = _local(experts, FAST_AXES, topology.experts_per_device)

    here = topology.experts_per_device
    experts, weights = _compact(experts, weights, here)
    bucket = jnp.where(experts >= 0, experts, here)
    sizes_E = -(-group_counts(bucket, here) // alignment) * alignment
    choices = min(topology.devices * quota.device_choices, experts.size)
    slots = -(-(choices + here * (alignment - 1)) // alignment) * alignment
    to_experts = permutation(bucket, jnp.cumsum(sizes_E) - sizes_E, slots)
    return Plan(Moves(node_hop, device_hop, to_experts),
                checkpoint_name(choices_to_slots(weights, to_experts), "plan"), checkpoint_name(sizes_E, "plan"))


class Traffic(NamedTuple):
    """What a dispatch sends, before what a wire's padding adds. Its combine brings as much back."""

    choices: jax.Array
    """Of an expert by a token."""
    delivered: jax.Array
    """Choices of any device that reached their experts on this one. Over all devices as many as choices: none is
    dropped."""
    tokens: jax.Array
    """That choose any expert."""
    nodes: jax.Array
    """Nodes they go to, their own included; over `tokens`, the mean that the router's limit bounds."""
    scale_out_rows: jax.Array
    """Rows sent to other nodes."""
    scale_up_rows: jax.Array
    """Rows sent to other devices of the node."""


def traffic(experts_TK: jax.Array, round_TK: jax.Array, delivered: jax.Array, topology: Topology) -> Traffic:
    """float32 scalars, of this device's tokens but for `delivered`; runs where the plan is made.

    Args:
      experts_TK: int32 [T, K]; -1 is no choice.
      round_TK: int32 [T, K], the round that each choice travels in; a token goes to a node once a round.
    """
    chosen_TK = experts_TK >= 0
    device_TK = experts_TK // topology.experts_per_device
    node_TK, up_TK = device_TK // topology.scale_up, device_TK % topology.scale_up
    own_node = jax.lax.axis_index("scale_out") if topology.scale_out > 1 else 0
    own_up = jax.lax.axis_index(FAST_AXES) if topology.scale_up > 1 else 0

    def count(first_TK: jax.Array) -> jax.Array:
        return jnp.sum(first_TK & chosen_TK, dtype=jnp.float32)
    to_node_TK = _first_of_its_kind(node_TK, round_TK)
    return Traffic(count(chosen_TK), delivered, jnp.sum(jnp.any(chosen_TK, axis=1), dtype=jnp.float32),
                   count(_first_of_its_kind(node_TK)),
                   count(to_node_TK & (node_TK != own_node)),
                   # A token enters each node at the device with its own device's place there.
                   count(_first_of_its_kind(device_TK, round_TK) & (up_TK != own_up)))


def _first_of_its_kind(*kinds_TK: jax.Array) -> jax.Array:
    """bool [T, K]: whether no earlier choice of the token is alike in all `kinds`."""
    same_TKK = functools.reduce(jnp.logical_and, (kind[:, :, None] == kind[:, None, :] for kind in kinds_TK))
    return ~jnp.any(jnp.tril(same_TKK, -1), axis=2)


def _hop(owner_RK: jax.Array, owners: int, rows_each: int, axis: Axis) -> Hop:
    """Row r goes once to each owner that its choices name (`owners` = nowhere).

    Every column of the plan costs gathers of rows, so they are the owners or the choices, whichever are fewer.
    """
    if owners <= owner_RK.shape[1]:
        wanted_RN = jnp.any(owner_RK[:, :, None] == jnp.arange(owners), axis=1)
        bucket = jnp.where(wanted_RN, jnp.arange(owners), owners)
    else:
        named_before_RK = jnp.any(jnp.tril(owner_RK[:, :, None] == owner_RK[:, None, :], -1), axis=2)
        bucket = jnp.where(named_before_RK, owners, owner_RK)
    sent_N = checkpoint_name(group_counts(bucket, owners), "plan")
    return Hop(permutation(bucket, rows_each * jnp.arange(owners), owners * rows_each), sent_N,
               checkpoint_name(swap(sent_N, axis), "plan"))


def _send(weights_RK: jax.Array, experts_RK: jax.Array, hop: Hop, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """Choices and weights of rows, as the rows themselves will go; empty slots choose nothing."""
    experts = jnp.where(hop.copies.choice_S[:, None] >= 0, copy_to_slots(experts_RK, hop.copies), -1)
    return swap(copy_to_slots(weights_RK, hop.copies), axis), swap(experts, axis)


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
