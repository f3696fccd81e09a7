"""How long a small message takes: what its two ends need, every switch on its way, and forwarding inside nodes.

Two figures of paper 1's table 5 for a link layer (one switch on the way, and three) are just enough for its two
constants, so the table itself is calibrated, and only what it does not print is predicted.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from dsv3_jax.codesign.checks import at_least, not_negative, positive
from dsv3_jax.codesign.networks.graph import Network
from dsv3_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class LinkLayer:
    """Seconds of a 64-byte message's parts."""

    ends: float
    """Software and NICs of both ends, and their cables."""
    switch: float
    """A switch, and the cable to it."""

    def __post_init__(self) -> None:
        positive(ends=self.ends)
        not_negative(switch=self.switch)

    def message(self, switches: float) -> float:
        """Seconds over so many switches (a mean may be fractional)."""
        not_negative(switches=switches)
        return self.ends + switches * self.switch


def fit(same_leaf: float, cross_leaf: float) -> LinkLayer:
    """From seconds over one switch, and over a leaf, a spine and a leaf."""
    if not 0 < same_leaf <= cross_leaf:
        raise ConfigError(f"cross_leaf ({cross_leaf}) must be at least same_leaf ({same_leaf}), and both positive")
    switch = (cross_leaf - same_leaf) / 2
    return LinkLayer(same_leaf - switch, switch)


INFINIBAND = fit(2.8e-6, 3.7e-6)
ROCE = fit(3.6e-6, 5.6e-6)
NVLINK_SECONDS = 3.33e-6
"""Paper 1, table 5, all three: measured from the CPUs' side, 64 bytes."""


def forwarded(layer: LinkLayer, switches: float, hops: int = 1, nvlink: float = NVLINK_SECONDS) -> float:
    """Seconds of a message that also goes over NVLink `hops` times, in its own node or the other's: across planes.

    Each part is a whole message, received before the next begins.
    """
    at_least(0, hops=hops)
    positive(nvlink=nvlink)
    return layer.message(switches) + hops * nvlink


def switch_distances(network: Network, sample: int = 64, seed: int = 0) -> np.ndarray:
    """Switches that a message passes between two endpoints of the network: shares [n] of pairs that pass n of them.

    All pairs of different endpoints count alike. Pairs without a way between them, such as those of different planes,
    are left out, so that shares then sum to less than 1.

    Args:
      sample: switches to start from; all if there are fewer, and else so many at random.
    """
    count_S = np.bincount(network.switch_E[network.switch_E >= 0], minlength=len(network.level_S))
    starts = np.flatnonzero(count_S)
    if len(starts) > sample:
        starts = np.sort(np.random.default_rng(seed).choice(starts, sample, replace=False))
    a, b = network.cables_C2.T
    joined = sparse.csr_matrix((np.ones(len(a)), (a, b)), shape=(len(count_S),) * 2)
    pairs_N = np.zeros(2)
    for start in starts:  # one row at a time: a row of all switches is little, all rows are not
        hops_S = csgraph.dijkstra(joined, directed=False, indices=start, unweighted=True)
        reached = np.isfinite(hops_S)
        hops = hops_S[reached].astype(int) + 1
        found_N = np.bincount(hops, weights=count_S[reached] * float(count_S[start]), minlength=len(pairs_N))
        found_N[:len(pairs_N)] += pairs_N
        found_N[1] -= count_S[start]  # with itself
        pairs_N = found_N
    return pairs_N / (count_S[starts].sum() * (network.endpoints - 1.0)) if network.endpoints > 1 else pairs_N


def mean_message(network: Network, layer: LinkLayer) -> float:
    """Mean seconds between two endpoints that a way leads between."""
    shares_N = switch_distances(network)
    return layer.message(float(shares_N @ np.arange(len(shares_N)) / shares_N.sum()))
