"""Sizes that a training step's exchange with experts is compiled with: the room of its buffers."""

from __future__ import annotations

import math
from typing import NamedTuple

from dsv3_jax.config import RunConfig
from dsv3_jax.expert_parallel.rounds import round_quota
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.nn.moe import expert_tile
from dsv3_jax.precision.linear import GROUP_ALIGNMENT
from dsv3_jax.precision.recipe import RECIPES


class Slots(NamedTuple):
    """Rows that one device's buffers hold, one layer and micro-batch; capacity_factor times the balanced load, and no
    more than the worst case."""

    between_nodes: int
    """For all nodes, one's own included; 0 where there is one."""
    inside_node: int
    """For all devices of the node, itself included; 0 where there is one."""
    experts: int
    """Before the experts, each one's rows padded to a tile."""


def topology_of(config: RunConfig) -> Topology:
    """How the run's experts are spread."""
    return Topology(config.model.n_routed_experts, config.mesh.scale_out, config.mesh.scale_up * config.mesh.context)


def tokens_of_device(config: RunConfig, devices: int) -> int:
    """Of one micro-batch."""
    return config.batch.micro_batch * config.batch.sequence_length // devices


def dispatch_slots(config: RunConfig, devices: int) -> Slots:
    """The buffers of `expert_parallel.plan.make_plan` under the quota of `nn.moe`; those of both halves."""
    parts = 1 + config.mesh.dual
    m, topology, tokens = config.model, topology_of(config), tokens_of_device(config, devices) // parts
    top_k = m.num_experts_per_tok
    reach = min(top_k, m.topk_group if m.n_group > 1 else m.n_routed_experts)
    quota = round_quota(topology, tokens, top_k, reach, config.mesh.capacity_factor)
    between = topology.scale_out * quota.node_rows if topology.scale_out > 1 else 0
    rows = between or tokens
    inside = 0
    if topology.scale_up > 1:
        inside = topology.scale_up * min(rows, topology.scale_out * quota.device_choices)
        rows = inside
    here = topology.experts_per_device
    tile = GROUP_ALIGNMENT if RECIPES[config.precision].up is not None else expert_tile(tokens * top_k / here)
    choices = min(topology.devices * quota.device_choices, rows * min(top_k, here))
    experts = math.ceil((choices + here * (tile - 1)) / tile) * tile
    return Slots(parts * between, parts * inside, parts * experts)
