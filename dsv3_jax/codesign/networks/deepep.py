"""Dispatch and combine as DeepEP measures them (its V1, the kernels of the papers), from flows on a cluster.

DeepEP's bandwidth of internode kernels is *logical*: rows that a GPU sends to nodes, one a node, its own node among
them, over the kernel's time (tests/test_internode.py: `num_rdma_token_sent`). What stays in the node never meets a
NIC, so on n nodes the NIC carries about (n-1)/n of it, and figures above the NIC's 50 GB/s are no contradiction.
Between two nodes half stays, the NIC idles half the time, and NVLink, which brings every row to each GPU with an expert
for it, is what is full. Of one node the figure is rows that GPUs receive, what they have from themselves included.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from scipy import sparse

from dsv3_jax.codesign.checks import at_least, not_negative
from dsv3_jax.codesign.networks import patterns
from dsv3_jax.codesign.networks.cluster import Cluster, Rates
from dsv3_jax.codesign.networks.fat_tree import multi_plane, multi_rail
from dsv3_jax.codesign.networks.routing import Flows, routes
from dsv3_jax.codesign.networks.simulate import complete
from dsv3_jax.codesign.traffic import RowsAToken, random_choices, rows_a_token
from dsv3_jax.config import ConfigError
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.presets import MODELS

NODE = 8
"""GPUs."""
EXPERTS = MODELS["deepseek_v3"].n_routed_experts
NODE_LIMIT = 4
"""Nodes a token may go to (paper 1, section 4.3), as far as there are so many."""


class Kernel(NamedTuple):
    """One figure for dispatch and one for combine."""

    dispatch: float
    combine: float


PUBLISHED = {8: Kernel(153e9, 158e9), 16: Kernel(43.05e9, 42.47e9), 32: Kernel(58.02e9, 56.96e9),
             64: Kernel(50.58e9, 48.54e9), 128: Kernel(45.34e9, 41.6e9)}
"""Bytes/s a GPU by GPUs, 4,096 tokens each: paper 1, figure 7, printed on the chart; 8: DeepEP docs/legacy.md."""
LOW_LATENCY = {8: Kernel(77e-6, 114e-6), 16: Kernel(118e-6, 195e-6), 32: Kernel(155e-6, 273e-6),
               64: Kernel(173e-6, 314e-6), 128: Kernel(192e-6, 369e-6), 256: Kernel(194e-6, 360e-6)}
"""Seconds, 128 tokens a GPU, rows of 7168: DeepEP docs/legacy.md."""
LOW_LATENCY_ROW = Kernel(7168 + 4 * 7168 // 128, 2 * 7168)
"""Bytes: E4M3 with a float32 scale for 128 values, and bf16."""


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """A group's dispatch, for rows of one byte."""

    gpus: int
    tokens_a_gpu: int
    rows: RowsAToken
    received: float
    """GPUs that have an expert of a token, its own included: a mean over tokens."""
    flows: Flows
    matrix_LF: sparse.csc_matrix
    back_LF: sparse.csc_matrix
    """Of the combine."""

    @property
    def counted_rows(self) -> float:
        """Rows a token in DeepEP's figure."""
        return self.rows.nodes if self.gpus > NODE else self.received

    def bandwidth(self, rates: Rates) -> Kernel:
        """Logical bytes/s a GPU, at the rates of NIC and NVLink."""
        capacity_L = _cluster(self.gpus // NODE, rates).capacity_L()
        rows = self.counted_rows * self.tokens_a_gpu
        return Kernel(*(rows / complete(matrix, capacity_L, self.flows.bytes_F, resolution=0.02).seconds
                        for matrix in (self.matrix_LF, self.back_LF)))


def _cluster(nodes: int, rates: Rates) -> Cluster:
    return Cluster(multi_plane(64, nodes, NODE), rates, NODE)


def choices(nodes: int, tokens: int, seed: int = 0) -> np.ndarray:
    """int32 [tokens, 8]: V3's router at random, a node a group, at most `NODE_LIMIT` of them."""
    model = dataclasses.replace(MODELS["deepseek_v3"], n_group=nodes, topk_group=min(NODE_LIMIT, nodes))
    sizes = [65_536] * (tokens // 65_536) + [tokens % 65_536] * (tokens % 65_536 > 0)
    return np.concatenate([random_choices(model, size, seed + part) for part, size in enumerate(sizes)])


@functools.lru_cache(maxsize=16)
def exchange(nodes: int, tokens_a_gpu: int = 4096, seed: int = 0) -> Exchange:
    """Of a group on `nodes` nodes that share a leaf of every plane."""
    if nodes < 1 or EXPERTS % (nodes * NODE):
        raise ConfigError(f"nodes ({nodes}) of {NODE} GPUs must divide {EXPERTS} experts")
    at_least(1, tokens_a_gpu=tokens_a_gpu)
    topology = Topology(EXPERTS, nodes, NODE)
    experts_TK = choices(nodes, tokens_a_gpu * topology.devices, seed)
    flows = patterns.dispatch(experts_TK, topology, 1.0, np.arange(topology.devices))
    cluster = _cluster(nodes, Rates(1, 1, 1))
    _, device_TD = patterns.sent(experts_TK, topology)
    back = patterns.backwards(flows)
    return Exchange(topology.devices, tokens_a_gpu, rows_a_token(experts_TK, topology), float(device_TD.sum(1).mean()),
                    flows, routes(cluster, flows, "adaptive"), routes(cluster, back, "adaptive"))


def calibrated(tokens_a_gpu: int = 4096) -> Rates:
    """What NIC and NVLink must reach for two published figures: dispatch on 64 GPUs, which the NIC bounds, and on 8,
    which NVLink alone serves. All other figures are then predictions."""
    inside, outside = exchange(1, tokens_a_gpu), exchange(8, tokens_a_gpu)
    guess = Rates(40e9, 160e9, 50e9)
    return Rates(guess.nic * PUBLISHED[64].dispatch / outside.bandwidth(guess).dispatch,
                 guess.nvlink * PUBLISHED[8].dispatch / inside.bandwidth(guess).dispatch, guess.cable)


def low_latency(gpus: int, rates: Rates, startup: Kernel = Kernel(0, 0), tokens_a_gpu: int = 128,
                draws: int = 2) -> Kernel:
    """Seconds of kernels that send every choice on its own, by RDMA straight to its expert's GPU or by NVLink.

    From any NIC to any: on a multi-rail tree, since planes would need forwarding.

    Args:
      startup: seconds before and after bytes flow.
      draws: of random choices, averaged.

    Raises:
      ConfigError: GPUs that are no whole nodes, or among which 256 experts cannot be divided.
    """
    if gpus < NODE or EXPERTS % gpus:
        raise ConfigError(f"gpus ({gpus}) must be whole nodes of {NODE} and divide {EXPERTS} experts")
    at_least(1, draws=draws)
    not_negative(startup=min(startup))
    topology = Topology(EXPERTS, gpus // NODE, NODE)
    cluster = Cluster(multi_rail(64, gpus // NODE, NODE), rates, NODE)
    model = dataclasses.replace(MODELS["deepseek_v3"], n_group=1, topk_group=1)
    seconds_a_byte = np.zeros(2)
    for seed in range(draws):
        there = patterns.one_by_one(random_choices(model, tokens_a_gpu * gpus, seed), topology, 1.0, np.arange(gpus))
        for way, flows in enumerate((there, patterns.backwards(there))):
            matrix = routes(cluster, flows, "adaptive", forward="none")
            done = complete(matrix, cluster.capacity_L(), flows.bytes_F, resolution=0.05)
            seconds_a_byte[way] += done.seconds / draws
    return Kernel(*(float(wait + row * each)
                    for wait, row, each in zip(startup, LOW_LATENCY_ROW, seconds_a_byte, strict=True)))


def calibrated_startup(rates: Rates) -> Kernel:
    """What the published seconds on 8 GPUs have beyond their bytes over NVLink."""
    bytes_only = low_latency(NODE, rates)
    return Kernel(*(published - moved for published, moved in zip(LOW_LATENCY[NODE], bytes_only, strict=True)))
