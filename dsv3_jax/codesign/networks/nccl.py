"""All-to-all and ring collectives, with the bandwidths that nccl-tests would print.

Its *algorithm bandwidth* is a GPU's buffer over time (nccl-tests, doc/PERFORMANCE.md). An all-to-all's buffer holds a
part for every GPU, one's own and the node's included: on n nodes of NICs that reach B it is B n/(n-1). A gather's
buffer is what all members end up with, of which a member has its own part already.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from dsv3_jax.codesign.checks import at_least, not_negative, positive
from dsv3_jax.codesign.networks import patterns
from dsv3_jax.codesign.networks.cluster import Cluster
from dsv3_jax.codesign.networks.routing import Flows, Policy, routes
from dsv3_jax.codesign.networks.shortest_paths import ShortestPaths
from dsv3_jax.codesign.networks.simulate import complete
from dsv3_jax.config import ConfigError


def all_to_all_bandwidth(cluster: Cluster, nodes: int, policy: Policy = "adaptive", seed: int = 0) -> float:
    """Algorithm bandwidth in bytes/s on the first `nodes` nodes, forwarded over NVLink (PXN), for large buffers.

    Raises:
      ConfigError: more nodes than there are.
    """
    if not 1 <= nodes <= cluster.nodes:
        raise ConfigError(f"nodes ({nodes}) must be 1 to {cluster.nodes}")
    flows = patterns.all_to_all(nodes, cluster.node_size, 1.0)
    done = complete(routes(cluster, flows, policy, seed=seed), cluster.capacity_L(), flows.bytes_F, resolution=0.05)
    return nodes * cluster.node_size / done.seconds


def message_bandwidth(buffer_bytes: float, bandwidth: float, startup: float) -> float:
    """Bytes/s of a buffer that takes `startup` seconds beyond its bytes."""
    positive(buffer_bytes=buffer_bytes, bandwidth=bandwidth)
    not_negative(startup=startup)
    return buffer_bytes / (startup + buffer_bytes / bandwidth)


class Rings(NamedTuple):
    """Rings of data-parallel groups: local GPUs j, j + tp, ... of all nodes are group j."""

    flows: Flows
    """One byte each; every ring is a loop of them."""
    ring_F: np.ndarray
    """int: group * rings of a group + ring."""
    groups: int
    rings: int
    """Of a group: one for each of its GPUs on a node, each entering and leaving nodes by NICs of its own."""
    members: int
    """GPUs of a group."""


def data_parallel_rings(node_order: np.ndarray, node_size: int, tp: int) -> Rings:
    """Rings through nodes in `node_order`, in each through all GPUs of the group, if every node has `tp`-way tensor
    parallelism inside: its node_size/tp replicas gather and scatter together.

    Raises:
      ConfigError: tp does not divide a node, or the group has one member.
    """
    at_least(1, node_size=node_size, tp=tp)
    if node_size % tp:
        raise ConfigError(f"tp ({tp}) must divide the {node_size} GPUs of a node")
    nodes, local = len(node_order), node_size // tp
    at_least(2, members=nodes * local)
    group, ring, node, place = (grid.ravel() for grid in np.indices((tp, local, nodes, local)))
    # Ring r visits a node's local members r, r+1, ..., r-1 and goes on to member r of the next node.
    leaves = place == local - 1
    here = np.asarray(node_order)[node] * node_size + group + tp * ((ring + place) % local)
    there_node = np.asarray(node_order)[np.where(leaves, (node + 1) % nodes, node)]
    there = there_node * node_size + group + tp * ((ring + place + 1) % local)
    moves = here != there
    return Rings(Flows(here[moves], there[moves], np.ones(int(moves.sum()))), (group * local + ring)[moves], tp, local,
                 nodes * local)


def ring_bandwidths(cluster: Cluster, rings: Rings, policy: Policy, *, seed: int = 0, queue_pairs: int = 1,
                    paths: ShortestPaths | None = None) -> np.ndarray:
    """float64 [groups], bytes/s: algorithm bandwidth of an all-gather, all groups at once; a reduce-scatter moves the
    same bytes over the same links.

    Data goes round, so a ring is as fast as its slowest link; a group divides its buffer over its rings beforehand, so
    it is as slow as the slowest of them.
    """
    matrix_LF = routes(cluster, rings.flows, policy, forward="none", seed=seed, queue_pairs=queue_pairs, paths=paths)
    count = rings.groups * rings.rings
    member_FR = sparse.csc_matrix((np.ones(len(rings.ring_F)), (np.arange(len(rings.ring_F)), rings.ring_F)),
                                  shape=(len(rings.ring_F), count))
    sent = (rings.members - 1) / rings.members / rings.rings
    done = complete((matrix_LF @ member_FR).tocsc(), cluster.capacity_L(), np.full(count, sent))
    return 1 / done.seconds_F.reshape(rings.groups, rings.rings).max(axis=1)
