"""The best that any division of flows over their shortest ways can do: a linear program."""

from __future__ import annotations

import numpy as np
from scipy import optimize, sparse

from dsv3_jax.codesign.checks import at_most
from dsv3_jax.codesign.networks.cluster import Cluster
from dsv3_jax.codesign.networks.routing import Flows, Forward, Legs, legs_of, on_links
from dsv3_jax.codesign.networks.shortest_paths import Share, ShortestPaths

_MOST = 200_000
"""Unknowns."""


def optimal_routes(cluster: Cluster, flows: Flows, forward: Forward = "sender",
                   paths: ShortestPaths | None = None) -> sparse.csc_matrix:
    """float64 [links, F], as `routing.routes`, with parts of ways that make the busiest link's time least.

    What no routing of packets on the fly reaches, which does not know the other flows' bytes. For small networks.

    Raises:
      ConfigError: more ways than the program is made for, or no way for a flow.
    """
    paths = ShortestPaths(cluster.network) if paths is None else paths
    legs = legs_of(cluster, flows, forward, paths)
    leg, ways = _ways(cluster, legs, paths)
    count, legs_count = len(leg), len(legs.flow_N)
    byte_N = flows.bytes_F[legs.flow_N] * legs.share_N
    # Unknowns: the part of its leg that each way carries, and seconds of the busiest link, least.
    cable = np.concatenate(ways) if count else np.zeros(0, int)
    way = np.repeat(np.arange(count), [len(cables) for cables in ways])
    seconds = byte_N[leg[way]] / cluster.capacity_L()[cluster.cable(cable)]
    unit = seconds.max(initial=0.0) or 1.0
    cables = 2 * cluster.network.links
    used = sparse.coo_matrix((seconds / unit, (cable, way)), shape=(cables, count))
    limits = sparse.hstack([used, -np.ones((cables, 1))]).tocsr()
    whole = sparse.hstack([sparse.coo_matrix((np.ones(count), (leg, np.arange(count))), shape=(legs_count, count)),
                           sparse.coo_matrix((legs_count, 1))]).tocsr()
    solved = optimize.linprog(np.append(np.zeros(count), 1.0), A_ub=limits, b_ub=np.zeros(cables),
                              A_eq=whole, b_eq=np.ones(legs_count), bounds=(0, None), method="highs")
    if solved.status != 0:
        raise RuntimeError(f"the linear program of {count} ways was not solved: {solved.message}")
    part = np.maximum(solved.x[:-1], 0.0)
    kept = part[way] > 1e-12
    return on_links(cluster, flows, legs, Share(leg[way][kept], cable[kept], part[way][kept]))


def _ways(cluster: Cluster, legs: Legs, paths: ShortestPaths) -> tuple[np.ndarray, list[np.ndarray]]:
    """The leg of each way, and its cables."""
    start, end = (cluster.network.switch_E[nic] for nic in (legs.source_N, legs.target_N))
    at_most("ways", int(paths.ways_ST[start, paths.column_S[end]].sum()), _MOST, "too many for the linear program; "
            "take fewer flows or a smaller network")
    known = {pair: paths.list_ways(*pair, most=_MOST) for pair in set(zip(start.tolist(), end.tolist(), strict=True))}
    leg, ways = [], []
    for index, pair in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        ways += list(known[pair])
        leg += [index] * len(known[pair])
    return np.array(leg, int), ways
