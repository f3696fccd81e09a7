"""The ranks of one hop and what each sends to each: what dispatch and combine share.

Everything here runs inside a `shard_map`. Dimensions: N ranks, C slots a destination, S = N * C slots, R rows of a
rank, K copies of a row at most, D channels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Axis = str | tuple[str, ...]
"""A mesh axis, or several in order that count as one, the last fastest."""


def names_of(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else tuple(axis)


def ranks_of(axis: Axis) -> int:
    return math.prod(jax.lax.axis_size(name) for name in names_of(axis))


def rank_on(axis: Axis) -> jax.Array:
    """This device's rank. Written out, since kernels know the index of one axis at a time."""
    rank = jnp.int32(0)
    for name in names_of(axis):
        rank = rank * jax.lax.axis_size(name) + jax.lax.axis_index(name)
    return rank


def device_of(axis: Axis, rank: Any) -> dict[str, Any]:
    """The mesh coordinates of a rank, as Pallas wants them; along other axes it is on the same place as this one."""
    coordinates: dict[str, Any] = {}
    for name in reversed(names_of(axis)):
        size = jax.lax.axis_size(name)
        coordinates[name], rank = jax.lax.rem(rank, jnp.int32(size)), jax.lax.div(rank, jnp.int32(size))
    return coordinates


class Route(NamedTuple):
    """Which rows of this rank travel where, and how many come here. A combine takes the route of its dispatch."""

    source_S: jax.Array
    """int32 [S]: slot s goes to rank s // C and carries this row; -1 for an empty slot. In the C slots of a
    destination the used ones come first."""
    slot_RK: jax.Array
    """int32 [R, K]: the slots that carry a row, in the order in which combine adds them; -1 for none."""
    sent_N: jax.Array
    """int32 [N]: rows to each rank."""
    received_N: jax.Array
    """int32 [N]: rows from each rank."""


def make_route(source_S: jax.Array, slot_RK: jax.Array, axis: Axis) -> Route:
    """Adds to a plan how many rows come from each rank: the one thing that a rank must ask the others."""
    sent_N = jnp.sum(source_S.reshape(ranks_of(axis), -1) >= 0, axis=1, dtype=jnp.int32)
    return Route(source_S, slot_RK, sent_N, swap(sent_N, axis))


def swap(x: jax.Array, axis: Axis) -> jax.Array:
    """Sends the n-th chunk of x to the n-th rank, padding included; its own inverse."""
    return jax.lax.all_to_all(x, names_of(axis), split_axis=0, concat_axis=0, tiled=True)


def used_slots(counts_N: jax.Array, slots: int) -> jax.Array:
    """bool [S]: which slots are used if chunk n begins with counts_N[n] rows."""
    places = slots // counts_N.shape[0]
    return (jnp.arange(places) < counts_N[:, None]).reshape(slots)
