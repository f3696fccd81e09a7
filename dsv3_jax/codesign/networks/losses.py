"""What is left of a network after losing one part, and how long traffic then takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsv3_jax.codesign.networks.cluster import Cluster
from dsv3_jax.codesign.networks.graph import Network
from dsv3_jax.codesign.networks.routing import Flows, Policy, routes
from dsv3_jax.codesign.networks.simulate import complete


def single_losses(network: Network, rails: int) -> dict[str, Network]:
    """The network whole, and without one cable, NIC, spine, leaf or all NICs of one rail: in a multi-plane tree a
    plane. Endpoint e is on rail e % rails; the part lost is the first of its kind."""
    left = {"nothing": network}
    if network.links:
        left["a cable between switches"] = network.without(cables=[0])
    left["a NIC"] = network.without(endpoints=[0])
    above = np.flatnonzero(network.level_S == 1)
    if len(above):
        left["a spine"] = network.without(switches=above[:1].tolist())
    left["a leaf"] = network.without(switches=[int(network.switch_E[0])])
    left["a plane"] = network.without(endpoints=range(0, network.endpoints, rails))
    return left


class Times(NamedTuple):
    """Seconds."""

    last: float
    """Of the last flow: of a job that waits for all."""
    median: float
    """Of the median flow between nodes."""


def times_after(cluster: Cluster, flows: Flows, policy: Policy, seed: int = 0) -> dict[str, Times]:
    """Of the same flows after each of `single_losses`."""
    far_F = flows.source_F // cluster.node_size != flows.target_F // cluster.node_size
    told = {}
    for name, network in single_losses(cluster.network, cluster.node_size).items():
        left = Cluster(network, cluster.rates, cluster.node_size)
        matrix = routes(left, flows, policy, seed=seed)
        done = complete(matrix, left.capacity_L(), flows.bytes_F, resolution=0.02)
        told[name] = Times(done.seconds, float(np.median(done.seconds_F[far_F])))
    return told
