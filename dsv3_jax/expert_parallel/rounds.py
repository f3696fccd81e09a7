"""Bounded buffers without dropped tokens: what exceeds a round's quota goes in a further round.

Buffers are sized for the balanced load times a capacity factor. All devices of an expert-parallel group agree on the
number of rounds, one unless routing is far out of balance. A round is a dispatch, the experts and a combine of its
own. The first is differentiated as usual; the further ones run in a loop that keeps nothing for the backward, which
computes them again, so memory does not grow with their number.

Dimensions here besides the project's: N nodes, M devices of the expert-parallel group, W waves (see `assign_rounds`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import FAST_AXES
from dsv3_jax.precision.deferral import all_at_once, apart

Arrays = tuple[jax.Array, ...]
OneRound = Callable[..., tuple[jax.Array, jax.Array]]
"""(experts_TK, *activations, *weights) -> (float32 [T, D], what the choices in experts_TK contribute; float32 scalar,
choices that reached their experts on this device). -1 is no choice."""


class Quota(NamedTuple):
    """What one device may send in one round, which sets the size of all buffers."""

    node_rows: int
    """Tokens to one node."""
    device_choices: int
    """(Token, expert) choices to one device. Buffers that rows of several senders meet in have room for the sum, so
    what is to travel in one round altogether need not keep to it sender by sender."""

    def is_never_exceeded(self, topology: Topology, tokens: int, top_k: int) -> bool:
        """Whether one round takes any routing at all."""
        return self.node_rows == tokens and self.device_choices == tokens * min(top_k, topology.experts_per_device)


def round_quota(topology: Topology, tokens: int, top_k: int, reach: int, capacity_factor: float) -> Quota:
    """The balanced load times `capacity_factor`, and no more than the worst case.

    Args:
      tokens: of one device.
      reach: nodes that one token may be sent to, if there are so many (the node limit M of paper 2, section 2.1.2).
    """
    nodes, here = topology.scale_out, topology.experts_per_device
    if topology.devices == 1:
        return Quota(tokens, tokens * min(top_k, here))
    node_rows = min(tokens, math.ceil(capacity_factor * tokens * min(reach, nodes) / nodes))
    return Quota(node_rows, min(node_rows * min(top_k, here),
                                math.ceil(capacity_factor * tokens * top_k / topology.devices)))


class Rounds(NamedTuple):
    """In which round each choice travels."""

    round_TK: jax.Array
    """int32 [T, K]; -1 for a choice of no expert."""
    rounds: jax.Array
    """int32 scalar, at least 1, the same on all devices of the expert-parallel group."""


@jax.named_scope("rounds")
def assign_rounds(experts_TK: jax.Array, topology: Topology, quota: Quota) -> Rounds:
    """Spreads this device's choices over rounds so that all buffers hold them, in token order.

    If they hold the choices of all devices together, there is one round. Else no device exceeds `quota` in any: a
    token's visit to a node is in that node's wave v if v * node_rows earlier tokens visit it. The choices of one wave
    that go to one device are cut into parts of device_choices. A round is one part of one wave, for all nodes and
    devices; a wave has as many parts as the fullest device of any sender needs.
    """
    tokens, nodes, devices = experts_TK.shape[0], topology.scale_out, topology.devices
    device_TK = jnp.where(experts_TK >= 0, experts_TK // topology.experts_per_device, devices)
    chosen_TM = jnp.sum(device_TK[:, :, None] == jnp.arange(devices), axis=1, dtype=jnp.int32)
    visits_TN = jnp.any(chosen_TM.reshape(tokens, nodes, -1) > 0, axis=-1).astype(jnp.int32)
    wave_TN = _before(visits_TN) // quota.node_rows
    wave_TM = jnp.repeat(wave_TN, topology.scale_up, axis=1)

    waves = jnp.arange(-(-tokens // quota.node_rows))
    count_WM = jnp.sum(jnp.where(wave_TM == waves[:, None, None], chosen_TM, 0), axis=1)
    parts_W = jnp.max(-(-count_WM // quota.device_choices), axis=1)
    if topology.axes:
        parts_W = jax.lax.pmax(parts_W, topology.axes)

    # A node's waves follow each other in token order, so the rank in a wave is the rank in all, less earlier waves.
    before_TM = _before(chosen_TM) - jnp.take_along_axis(_before(count_WM), wave_TM, axis=0)
    same_TKK = device_TK[:, :, None] == device_TK[:, None, :]
    before_TK = jnp.sum(jnp.tril(same_TKK, -1), axis=2, dtype=jnp.int32)
    at_TK = jnp.minimum(device_TK, devices - 1)
    rank_TK = jnp.take_along_axis(before_TM, at_TK, axis=1) + before_TK
    wave_TK = jnp.take_along_axis(wave_TM, at_TK, axis=1)
    in_turn_TK = _before(parts_W)[wave_TK] + rank_TK // quota.device_choices
    at_once = _fit_in_one_round(chosen_TM, visits_TN, topology, quota)
    round_TK = jnp.where(device_TK < devices, jnp.where(at_once, 0, in_turn_TK), -1)
    return Rounds(checkpoint_name(round_TK, "plan"),
                  checkpoint_name(jnp.where(at_once, 1, jnp.maximum(jnp.sum(parts_W), 1)), "plan"))


def _fit_in_one_round(chosen_TM: jax.Array, visits_TN: jax.Array, topology: Topology, quota: Quota) -> jax.Array:
    """Whether the buffers that `make_plan` would make hold the choices of all devices together; the same for all.

    Of a few thousand choices some sender has more for some device than the mean by chance, while the sums over senders
    hardly vary. Those are what the buffers must hold after the first hop.
    """
    choices_M = jnp.sum(chosen_TM, axis=0)
    rows_M = jnp.sum(chosen_TM > 0, axis=0, dtype=jnp.int32)
    crowded = jnp.any(jnp.sum(visits_TN, axis=0) > quota.node_rows).astype(jnp.int32)
    own_up = jax.lax.axis_index(FAST_AXES) if topology.scale_up > 1 else 0
    # Rows for a device pass through the device of its node that has their home's place there.
    through_UM = jnp.where(jnp.arange(topology.scale_up)[:, None] == own_up, rows_M, 0)
    if topology.axes:
        choices_M, through_UM, crowded = jax.lax.psum((choices_M, through_UM, crowded), topology.axes)
    return ((crowded == 0) & jnp.all(choices_M <= topology.devices * quota.device_choices)
            & jnp.all(through_UM <= topology.scale_out * quota.device_choices))


def _before(count_TN: jax.Array) -> jax.Array:
    """The sum of all earlier rows: cumsum without the row itself."""
    return jnp.cumsum(count_TN, axis=0, dtype=jnp.int32) - count_TN


def in_rounds(one_round: OneRound, experts_TK: jax.Array, activations: Arrays, weights: Arrays, topology: Topology,
              quota: Quota) -> tuple[jax.Array, jax.Array, Rounds]:
    """The sums of both results of `one_round(choices of the round, *activations, *weights)` over all rounds, and which
    those are.

    The first can be differentiated in all arrays. `one_round` must not close over traced values. Where one round takes
    any routing, no loop is compiled.
    """
    if quota.is_never_exceeded(topology, *experts_TK.shape):
        only = Rounds(jnp.where(experts_TK >= 0, 0, -1), jnp.ones((), jnp.int32))
        return *one_round(experts_TK, *activations, *weights), only
    plan = assign_rounds(experts_TK, topology, quota)
    first = one_round(_choices_of(0, experts_TK, plan), *activations, *weights)
    return *_add_further_rounds(one_round, first, experts_TK, plan, activations, weights), plan


def _choices_of(index: jax.Array | int, experts_TK: jax.Array, plan: Rounds) -> jax.Array:
    return jnp.where(plan.round_TK == index, experts_TK, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_further_rounds(one_round: OneRound, first: tuple[jax.Array, jax.Array], experts_TK: jax.Array, plan: Rounds,
                        activations: Arrays, weights: Arrays) -> tuple[jax.Array, jax.Array]:
    """The results of the first round plus those of rounds 1, 2, ... of the plan."""
    def add(carry: tuple[jax.Array, tuple]) -> tuple[jax.Array, tuple]:
        index, total = carry
        new = one_round(_choices_of(index, experts_TK, plan), *activations, *weights)
        return index + 1, jax.tree.map(jnp.add, total, new)
    with jax.named_scope("further_rounds"):
        return jax.lax.while_loop(lambda carry: carry[0] < plan.rounds, add, (jnp.int32(1), first))[1]


def _forward(one_round: OneRound, first: tuple[jax.Array, jax.Array], experts_TK: jax.Array, plan: Rounds,
             activations: Arrays, weights: Arrays) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    out = _add_further_rounds(one_round, first, experts_TK, plan, activations, weights)
    return out, (experts_TK, plan, activations, weights)


def _backward(one_round: OneRound, saved: tuple, grads: tuple[jax.Array, jax.Array]) -> tuple:
    """Adds the gradients of rounds 1, 2, ... of the plan.

    Those of weights are not put off, else all of the backward's inputs were kept for them, and there were collectives
    where a pipeline has products to cover its transfers.
    """
    experts_TK, plan, *arrays = saved

    def add(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        index, total = carry

        def out(arrays: list[Arrays]) -> jax.Array:
            activations, weights = arrays
            return one_round(_choices_of(index, experts_TK, plan), *activations, *weights)[0]
        with all_at_once():
            (own,) = jax.vjp(out, arrays)[1](grads[0])
        return index + 1, jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, own)

    def further() -> list[Arrays]:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), arrays)
        with jax.named_scope("further_rounds"):
            _, total = jax.lax.while_loop(lambda carry: carry[0] < plan.rounds, add, (jnp.int32(1), zeros))
        return jax.tree.map(lambda g, x: g.astype(x.dtype), total, arrays)

    # With one round, the usual case, the float32 sums of all expert matrices are not even written.
    d_activations, d_weights = jax.lax.cond(plan.rounds > 1, further, lambda: jax.tree.map(jnp.zeros_like, arrays))
    return grads, None, None, d_activations, apart(d_weights)


_add_further_rounds.defvjp(_forward, _backward)
