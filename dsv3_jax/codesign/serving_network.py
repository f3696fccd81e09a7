"""The network's part of a compiled decoding step, and the time per token it implies, beside paper 1's (section 2.3.2).

The paper counts eight routed experts and the shared one as rows of their own, all over one network. The program sends a
token once to each node that has an expert of it, from there once to each device, and computes the shared expert at
home; in buffers with room for more than an even load.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv3_jax.codesign.decode_limits import Workload, exchange_bytes
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.serving_aot import ServingReport
from dsv3_jax.codesign.traffic import random_choices, rows_a_token
from dsv3_jax.config import Execution, ModelConfig, Precision
from dsv3_jax.expert_parallel.exchange import row_bytes
from dsv3_jax.expert_parallel.replica_choice import choose_replicas
from dsv3_jax.expert_parallel.replicas import Deployment, Placement
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.nn.moe import wire_of
from dsv3_jax.precision.recipe import COMPUTE_DTYPE, RECIPES
from dsv3_jax.presets import ServingDeployment

SAMPLE = 65536
"""Tokens that rows are counted of."""


class PerToken(NamedTuple):
    """Bytes that a device sends for one of its tokens in one layer with experts, there and back."""

    slow: float
    fast: float


class Limit(NamedTuple):
    """Of one pass, if nothing but the networks takes time; seconds."""

    slow: float
    fast: float
    tokens_per_second: float
    """Of one sequence, accepted drafts included, where one network's time hides the other's."""


def as_compiled(report: ServingReport, rows: PerToken) -> PerToken:
    """What the program's exchanges send: padded ones their empty room too, ragged ones `rows`, of `of_rows`."""
    padded = [sent for sent in report.collectives if sent.kind == "all-to-all"]
    ragged = [sent for sent in report.collectives if sent.kind == "ragged-all-to-all"]
    over = report.tokens * report.expert_layers
    slow = sum(each.slow_bytes for each in padded) / over
    fast = sum(each.bytes for each in padded) / over - slow
    return PerToken(slow + rows.slow * any(each.slow_bytes for each in ragged),
                    fast + rows.fast * any(each.bytes > each.slow_bytes for each in ragged))


def of_rows(model: ModelConfig, deployment: ServingDeployment, precision: Precision, seed: int = 0) -> PerToken:
    """Of the rows alone, counted from random choices of the model's router; experts lie in order, and a device's tokens
    are at random places of their sequences."""
    placement = Placement.in_order(1, Deployment(
        model.n_routed_experts, model.n_routed_experts + deployment.redundant, deployment.devices, deployment.nodes,
        model.n_group if deployment.by_group else 1))
    number_T = np.random.default_rng(seed).integers(0, 2 ** 30, SAMPLE)
    arrays = (random_choices(model, SAMPLE, seed), number_T, placement.replicas_LE[0], placement.replica_slots_LER[0])
    slots_TK = np.asarray(choose_replicas(*map(jnp.asarray, arrays)))
    rows = rows_a_token(slots_TK, Topology(placement.deployment.slots, deployment.nodes,
                                           deployment.devices // deployment.nodes))
    each = row_bytes(model.hidden_size, jnp.dtype(COMPUTE_DTYPE[precision]).itemsize,
                     wire_of(RECIPES[precision], Execution()))
    return PerToken(*((each.dispatch + each.combine) * count for count in (rows.slow_rows, rows.fast_rows)))


def of_paper(model: ModelConfig) -> float:
    """Bytes of the paper's formula for one token and layer: (1 + 2) x 9 x hidden, over the one network."""
    return exchange_bytes(Workload(model, tokens=1))


def limit(per_token: PerToken, report: ServingReport, hardware: Hardware, tokens_per_pass: float = 1.0) -> Limit:
    """What a pass of the report's tokens takes at nominal bandwidths, without latency."""
    tokens = report.tokens * report.expert_layers
    slow, fast = (tokens * sent / link.bandwidth
                  for sent, link in zip(per_token, (hardware.scale_out, hardware.scale_up), strict=True))
    return Limit(slow, fast, tokens_per_pass / max(slow, fast))
