"""Who sends what to whom in the tests of dispatch and combine, and what must come of it, counted out in NumPy.

A row's payload is a hash of its global number and the channel, so that no row passes for another.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from pallas_kernels.all_to_all_dispatch import make_route

AXIS = ("up", "context")


class Traffic(NamedTuple):
    """The routes of all N ranks."""

    source_NS: np.ndarray
    slot_NRK: np.ndarray
    places: int

    @property
    def ranks(self) -> int:
        return self.source_NS.shape[0]


def traffic(owners_NRK: np.ndarray, places: int) -> Traffic:
    """Copy k of row r of rank n goes to rank owners[n, r, k], at most one to each; -1 goes nowhere."""
    ranks = owners_NRK.shape[0]
    source, slot = np.full((ranks, ranks * places), -1, np.int32), np.full(owners_NRK.shape, -1, np.int32)
    for n in range(ranks):
        count = np.zeros(ranks, int)
        for (row, k), owner in np.ndenumerate(owners_NRK[n]):
            if owner >= 0:
                slot[n, row, k] = owner * places + count[owner]
                source[n, slot[n, row, k]] = row
                count[owner] += 1
        assert count.max() <= places
    return Traffic(source, slot, places)


def cases(ranks: int, rows: int, copies: int, places: int) -> dict[str, Traffic]:
    rng = np.random.default_rng(0)
    even = np.stack([np.stack([rng.permutation(ranks)[:copies] for _ in range(rows)]) for _ in range(ranks)])
    masked = np.where(rng.random(even.shape) < 0.4, -1, even)
    uneven = np.where(np.arange(rows)[:, None] < np.arange(ranks)[:, None, None] * rows // (ranks - 1), masked, -1)
    one = np.full(even.shape, -1)
    one[:, :, copies // 2] = ranks - 3
    return {name: traffic(owners, places) for name, owners in {
        "even": even, "masked": masked, "uneven, and none from rank 0": uneven, "all to one rank": one,
        "nothing at all": np.full(even.shape, -1)}.items()}


def payload(ranks: int, rows: int, width: int) -> np.ndarray:
    """Whole numbers of at most 8 bits, exact in bfloat16, [N, R, D]."""
    token, channel = np.arange(ranks * rows)[:, None], np.arange(width)
    return ((token * 7919 ^ channel * 104729) % 255 - 127.0).reshape(ranks, rows, width).astype(np.float32)


def dispatched(rows_NRD: np.ndarray, t: Traffic) -> np.ndarray:
    """[N, S, D]"""
    out = np.zeros((t.ranks, t.source_NS.shape[1], rows_NRD.shape[2]), rows_NRD.dtype)
    for sender, slot in zip(*np.nonzero(t.source_NS >= 0), strict=True):
        receiver, place = divmod(slot, t.places)
        out[receiver, sender * t.places + place] = rows_NRD[sender, t.source_NS[sender, slot]]
    return out


def combined(slots_NSD: np.ndarray, t: Traffic, weights_NRK: np.ndarray | None = None) -> np.ndarray:
    """float32 [N, R, D], added in the order of k."""
    out = np.zeros((*t.slot_NRK.shape[:2], slots_NSD.shape[2]), np.float32)
    for k in range(t.slot_NRK.shape[2]):
        for home, row in np.ndindex(out.shape[:2]):
            slot = t.slot_NRK[home, row, k]
            if slot >= 0:
                owner, place = divmod(slot, t.places)
                copy = slots_NSD[owner, home * t.places + place].astype(np.float32)
                out[home, row] += copy if weights_NRK is None else copy * weights_NRK[home, row, k]
    return out


@functools.cache
def mesh(up: int, context: int, data: int = 1) -> Mesh:
    devices = np.array(jax.devices()[:data * up * context]).reshape(data, up, context)
    return Mesh(devices, ("data", *AXIS), axis_types=(AxisType.Auto,) * 3)


def on_ranks(mesh: Mesh, function, t: Traffic, *arrays):
    """`function(route, *arrays of the rank)` on every rank; arrays and results have a leading dimension N. With a data
    axis, every replica has the same."""
    return program(mesh, function, t)(*arrays)


def program(mesh: Mesh, function, t: Traffic):
    """The function of the arrays that `on_ranks` calls, compiled once."""
    def local(source, slot, *parts):
        out = function(make_route(source[0], slot[0], AXIS), *(part[0] for part in parts))
        return jax.tree.map(lambda x: x[None], out)
    spec = PartitionSpec(AXIS)
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    return lambda *arrays: run(jnp.asarray(t.source_NS), jnp.asarray(t.slot_NRK), *arrays)

