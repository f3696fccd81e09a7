"""Which links flows take: by NVLink inside nodes, by which NICs out of and into them, by which cables between."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from scipy import sparse

from dsv3_jax.codesign.checks import at_least
from dsv3_jax.codesign.networks.cluster import Cluster
from dsv3_jax.codesign.networks.shortest_paths import Share, ShortestPaths, hashed
from dsv3_jax.config import ConfigError

Policy = Literal["ecmp", "adaptive", "static"]
"""How a flow goes over the cables between switches. ecmp: one shortest way, by a hash at every switch. adaptive: its
packets over all shortest ways alike. static: one shortest way, from a table that parts targets of a leaf (D-mod-k)."""
Forward = Literal["sender", "receiver", "none"]
"""Where a flow changes to the rail of its target. sender: over NVLink before it leaves (NCCL's PXN). receiver: over
NVLink after it came (as DeepEP's dispatch). none: nowhere, it goes from NIC to NIC, which separate planes cannot."""


class Flows(NamedTuple):
    """What is sent, [F] flows."""

    source_F: np.ndarray
    """int: GPU."""
    target_F: np.ndarray
    """int: another GPU."""
    bytes_F: np.ndarray
    """float64."""

    def checked(self, gpus: int) -> Flows:
        """These, if they fit the cluster; `ConfigError` otherwise."""
        for field, gpu_F in (("source_F", self.source_F), ("target_F", self.target_F)):
            if len(gpu_F) and not 0 <= gpu_F.min() <= gpu_F.max() < gpus:
                raise ConfigError(f"{field}: GPUs are 0 to {gpus - 1}, not {gpu_F.min()} to {gpu_F.max()}")
        if np.any(self.source_F == self.target_F):
            raise ConfigError(f"target_F: flow {np.argmax(self.source_F == self.target_F)} goes to where it starts")
        if not np.all(np.isfinite(self.bytes_F) & (self.bytes_F > 0)):
            raise ConfigError("bytes_F must be positive and finite")
        return self


def joined(*flows: Flows) -> Flows:
    """All of them at once."""
    return Flows(*(np.concatenate(parts) for parts in zip(*flows, strict=True)))


class Legs(NamedTuple):
    """Parts of flows that leave their nodes, each by one NIC into one NIC."""

    flow_N: np.ndarray
    share_N: np.ndarray
    source_N: np.ndarray
    """GPU whose NIC sends."""
    target_N: np.ndarray


def routes(cluster: Cluster, flows: Flows, policy: Policy, *, forward: Forward = "sender", seed: int = 0,
           queue_pairs: int = 1, paths: ShortestPaths | None = None) -> sparse.csc_matrix:
    """float64 [links, F]: the part of each flow that each link carries.

    A flow whose NICs have no way between them any more (lost plane, leaf or cable) is divided over all rails that have
    one, by NVLink at both ends; `forward` none forbids that.

    Args:
      seed: of ECMP's hash.
      queue_pairs: for ECMP, parts that a flow is cut into, each hashed alone.
      paths: of the cluster's network, if at hand.

    Raises:
      ConfigError: flows that the cluster does not have GPUs for, or no way for one of them.
    """
    at_least(1, queue_pairs=queue_pairs)
    paths = ShortestPaths(cluster.network) if paths is None else paths
    legs = legs_of(cluster, flows, forward, paths)
    if policy == "ecmp" and queue_pairs > 1:
        legs = Legs(*(np.repeat(part, queue_pairs) for part in legs))._replace(
            share_N=np.repeat(legs.share_N / queue_pairs, queue_pairs))
    return on_links(cluster, flows, legs, _over_cables(cluster, legs, policy, seed, paths))


def on_links(cluster: Cluster, flows: Flows, legs: Legs, cables: Share) -> sparse.csc_matrix:
    """float64 [links, F], given how each leg goes between switches."""
    flow, share = legs.flow_N, legs.share_N
    inside = np.flatnonzero(_inside(cluster, flows))
    parts = [*_over_nvlink(cluster, inside, np.ones(len(inside)), flows.source_F[inside], flows.target_F[inside]),
             *_over_nvlink(cluster, flow, share, flows.source_F[flow], legs.source_N),
             (cluster.up(legs.source_N), flow, share),
             (cluster.cable(cables.cable_N), flow[cables.pair_N], cables.share_N * share[cables.pair_N]),
             (cluster.down(legs.target_N), flow, share),
             *_over_nvlink(cluster, flow, share, legs.target_N, flows.target_F[flow])]
    row, column, value = (np.concatenate(part) for part in zip(*parts, strict=True))
    entries = value, (row.astype(np.int32), column.astype(np.int32))
    return sparse.coo_matrix(entries, shape=(cluster.links, len(flows.bytes_F))).tocsc()


def _inside(cluster: Cluster, flows: Flows) -> np.ndarray:
    """bool [F]: those that stay in their nodes."""
    return flows.source_F // cluster.node_size == flows.target_F // cluster.node_size


def _over_nvlink(cluster: Cluster, flow: np.ndarray, share: np.ndarray, start: np.ndarray,
                 end: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(link, flow, share) of those that change GPU inside their node."""
    moves = start != end
    flow, share = flow[moves], share[moves]
    return [(cluster.out(start[moves]), flow, share), (cluster.into(end[moves]), flow, share)]


def legs_of(cluster: Cluster, flows: Flows, forward: Forward, paths: ShortestPaths) -> Legs:
    """The NICs of flows that leave their nodes."""
    flows.checked(cluster.gpus)
    outside = np.flatnonzero(~_inside(cluster, flows))
    size, switch_E = cluster.node_size, cluster.network.switch_E
    source, target = flows.source_F[outside], flows.target_F[outside]
    nic_source = source // size * size + target % size if forward == "sender" else source
    nic_target = target // size * size + source % size if forward == "receiver" else target
    direct = paths.reach(switch_E[nic_source], switch_E[nic_target])
    lost = np.flatnonzero(~direct)
    if len(lost) and forward == "none":
        raise ConfigError(f"forward none: no way from the NIC of GPU {source[lost[0]]} to that of GPU "
                          f"{target[lost[0]]} in {cluster.network.name}; forward over NVLink")
    # Lost ones: the same rail at both ends, any that is whole.
    rails = np.arange(size)
    by_source = source[lost, None] // size * size + rails
    by_target = target[lost, None] // size * size + rails
    whole = paths.reach(switch_E[by_source.ravel()], switch_E[by_target.ravel()]).reshape(by_source.shape)
    if not whole.any(axis=1).all():
        flow = lost[np.argmin(whole.any(axis=1))]
        raise ConfigError(f"no way from node {source[flow] // size} to node {target[flow] // size} in "
                          f"{cluster.network.name} by any rail")
    row, rail = np.nonzero(whole)
    return Legs(np.concatenate([outside[direct], outside[lost][row]]),
                 np.concatenate([np.ones(direct.sum()), 1 / whole.sum(axis=1)[row]]),
                 np.concatenate([nic_source[direct], by_source[row, rail]]),
                 np.concatenate([nic_target[direct], by_target[row, rail]]))


def _over_cables(cluster: Cluster, legs: Legs, policy: Policy, seed: int, paths: ShortestPaths) -> Share:
    """How each leg goes between switches."""
    start, end = (cluster.network.switch_E[nic] for nic in (legs.source_N, legs.target_N))
    if policy == "adaptive":
        pair, leg_pair = np.unique(np.stack([start, end]), axis=1, return_inverse=True)
        return _spread(paths.all_ways(*pair), leg_pair)
    if policy == "static":
        return paths.one_way(start, end, _place(cluster)[legs.target_N].astype(np.uint64), table=True)
    if policy == "ecmp":
        # The parts of one flow between two NICs differ by their order among the flow's legs.
        order = np.argsort(legs.flow_N, kind="stable")
        count_F = np.bincount(legs.flow_N)
        turn = np.empty(len(order), int)
        turn[order] = np.arange(len(order)) - np.repeat(np.cumsum(count_F) - count_F, count_F)
        choice = hashed(seed, legs.source_N, legs.target_N, legs.flow_N, turn)
        return paths.one_way(start, end, choice, table=False)
    raise ConfigError(f"policy ({policy}) must be ecmp, adaptive or static")


def _place(cluster: Cluster) -> np.ndarray:
    """int [GPUs]: NICs numbered leaf by leaf, so that the first digits tell those of one leaf apart."""
    switch_E = cluster.network.switch_E
    place_E = np.empty(len(switch_E), int)
    place_E[np.lexsort((np.arange(len(switch_E)), switch_E))] = np.arange(len(switch_E))
    return place_E


def _spread(shares: Share, pair_N: np.ndarray) -> Share:
    """Shares of pairs, for everything [N] that goes between them."""
    order = np.argsort(shares.pair_N, kind="stable")
    pairs = int(pair_N.max(initial=-1)) + 1
    count_P = np.bincount(shares.pair_N, minlength=pairs)
    first_P = np.cumsum(count_P) - count_P
    count_N = count_P[pair_N]
    who = np.repeat(np.arange(len(pair_N)), count_N)
    within = np.arange(len(who)) - np.repeat(np.cumsum(count_N) - count_N, count_N)
    entry = order[first_P[pair_N[who]] + within]
    return Share(who, shares.cable_N[entry], shares.share_N[entry])
