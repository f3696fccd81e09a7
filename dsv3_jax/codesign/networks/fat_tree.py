"""Fat trees of two and three layers, and the two ways to put nodes of several NICs on those of two.

In both, node n has endpoints n*8 to n*8 + 7 if it has eight NICs; NIC i of every node is "rail" i. A multi-plane fat
tree (paper 1, section 5.1) gives every rail a tree of its own, so that planes meet only inside nodes. A multi-rail fat
tree is one tree whose leaves each take one rail, so that equal rails meet on a leaf and unequal ones above it.
"""

from __future__ import annotations

import numpy as np

from dsv3_jax.codesign.checks import at_least, at_most, even_ports
from dsv3_jax.codesign.networks.graph import Network


def two_layer(ports: int, endpoints: int | None = None) -> Network:
    """FT2: `ports`/2 endpoints on a leaf, one after the other, and as many cables up; as many spines as those need.

    Args:
      endpoints: all that fit, `ports`^2/2, if not given. Those of one leaf need no spine.
    """
    even_ports(ports)
    most = ports * ports // 2
    endpoints = most if endpoints is None else endpoints
    at_least(1, endpoints=endpoints)
    at_most("endpoints", endpoints, most, f"two layers of {ports}-port switches hold ports^2/2")
    leaf_E = np.arange(endpoints) // (ports // 2)
    return _over_leaves(f"two-layer fat tree, {endpoints} endpoints", ports, leaf_E)


def multi_plane(ports: int, nodes: int, planes: int = 8) -> Network:
    """MPFT: a two-layer fat tree a plane, in which node n is endpoint n.

    Raises:
      ConfigError: odd ports, or more nodes than a plane has endpoints.
    """
    at_least(1, planes=planes)
    even_ports(ports)
    at_least(1, nodes=nodes)
    at_most("nodes", nodes, ports * ports // 2, f"a plane of two layers of {ports}-port switches holds ports^2/2")
    plane = two_layer(ports, nodes)
    count = len(plane.level_S)
    shift_P = count * np.arange(planes)
    switch_E = (plane.switch_E[:, None] + shift_P).ravel()
    cables_C2 = (plane.cables_C2[None] + shift_P[:, None, None]).reshape(-1, 2)
    return Network(f"multi-plane fat tree, {nodes} nodes on {planes} planes", ports, switch_E, cables_C2,
                   np.tile(plane.level_S, planes))


def multi_rail(ports: int, nodes: int, rails: int = 8) -> Network:
    """MRFT: one two-layer fat tree; `ports`/2 nodes share a leaf for each rail.

    Raises:
      ConfigError: odd ports, or more nodes than the leaves have room for.
    """
    at_least(1, rails=rails)
    even_ports(ports)
    at_least(1, nodes=nodes)
    groups = ports // rails
    at_most("rails", rails, ports, f"spines of {ports} ports join as many leaves, and every rail needs one")
    at_most("nodes", nodes, groups * (ports // 2), f"spines of {ports} ports join {groups} groups of {rails} leaves, "
            f"each for {ports // 2} nodes")
    node_E, rail_E = np.divmod(np.arange(nodes * rails), rails)
    return _over_leaves(f"multi-rail fat tree, {nodes} nodes on {rails} rails", ports,
                        node_E // (ports // 2) * rails + rail_E)


def _over_leaves(name: str, ports: int, leaf_E: np.ndarray) -> Network:
    """Leaves with spines over them; cables go round the spines, each leaf where the last one stopped."""
    leaves, up = int(leaf_E.max()) + 1, ports // 2
    spines = -(-leaves * up // ports) if leaves > 1 else 0
    below = np.repeat(np.arange(leaves), up) if spines else np.zeros(0, int)
    above = leaves + np.arange(len(below)) % max(spines, 1)
    level_S = np.repeat([0, 1], [leaves, spines])
    return Network(name, ports, leaf_E, np.stack([below, above], axis=1), level_S)


def three_layer(ports: int) -> Network:
    """FT3: `ports` pods of `ports`/2 leaves and as many switches over them, and cores that each see all pods."""
    even_ports(ports)
    half = ports // 2
    pod, low, high = (grid.ravel() for grid in np.indices((ports, half, half)))
    leaves = ports * half
    first = np.stack([pod * half + low, leaves + pod * half + high], axis=1)
    # Switch `low` of a pod's upper layer goes to cores low*half .. low*half + half-1.
    second = np.stack([leaves + pod * half + low, 2 * leaves + low * half + high], axis=1)
    return Network(f"three-layer fat tree, {leaves * half} endpoints", ports, np.arange(leaves * half) // half,
                   np.concatenate([first, second]), np.repeat([0, 1, 2], [leaves, leaves, half * half]))
