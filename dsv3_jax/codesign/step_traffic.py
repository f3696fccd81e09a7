"""Bytes that a training step's dispatches and combines send over both networks, from the configuration alone.

Of every layer with experts and every micro-batch (paper 2, section 3.2.2; `expert_parallel`): rows go out and come home
in the forward, and their gradients in the backward; with recompute "experts" or "full" they go out once more. The plan
sends three numbers of each choice: its expert, its weight, and the weight's gradient back. Padded exchanges send whole
buffers, `capacity_factor` times the balanced load, ragged ones and kernels the rows in them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsv3_jax.codesign.step_buffers import dispatch_slots, tokens_of_device, topology_of
from dsv3_jax.codesign.traffic import RowsAToken
from dsv3_jax.config import ConfigError, RunConfig
from dsv3_jax.expert_parallel.exchange import row_bytes
from dsv3_jax.nn.moe import wire_of
from dsv3_jax.precision.recipe import COMPUTE_DTYPE, RECIPES


class StepTraffic(NamedTuple):
    """Bytes that one device sends to others in a step."""

    between_nodes: float
    """Over scale_out."""
    inside_node: float
    """Over scale_up and context."""


def row_bytes_of_step(config: RunConfig) -> tuple[int, int]:
    """(bytes of one row's values, bytes of its plan) on either hop in all exchanges of one layer and micro-batch."""
    wire = wire_of(RECIPES[config.precision], config.execution)
    itemsize = np.dtype(COMPUTE_DTYPE[config.precision]).itemsize
    a_row = row_bytes(config.model.hidden_size, itemsize, wire)
    again = a_row.dispatch if config.recompute in ("experts", "full") else 0
    # int32 expert, float32 weight out and its gradient back.
    return sum(a_row) + again, 3 * 4 * config.model.num_experts_per_tok


def exchange_traffic(config: RunConfig, devices: int, rows: RowsAToken | None = None) -> StepTraffic:
    """What a step sends with the transport of its mesh.

    Args:
      rows: of a token as counted (`traffic.rows_a_token`), which transports that are not padded send; the padded ones
        need none.

    Raises:
      ConfigError: a transport whose rows were not given.
    """
    topology, slots = topology_of(config), dispatch_slots(config, devices)
    padded = (slots.between_nodes * (topology.scale_out - 1) / topology.scale_out,
              slots.inside_node * (topology.scale_up - 1) / topology.scale_up)
    sent = padded
    if config.mesh.transport != "padded":
        if rows is None:
            raise ConfigError(f"mesh.transport ({config.mesh.transport}) sends rows as the router chooses: count them "
                              "(traffic.rows_a_token), or use padded")
        tokens = tokens_of_device(config, devices)
        # Kernels serve the fast network only.
        sent = (tokens * rows.slow_rows if config.mesh.transport == "ragged" else padded[0], tokens * rows.fast_rows)
    values, plan = row_bytes_of_step(config)
    layers = config.model.num_moe_layers + config.model.num_nextn_predict_layers
    times = layers * config.batch.micro_batches
    return StepTraffic(*(times * (values * row + plan * slot) for row, slot in zip(sent, padded, strict=True)))
