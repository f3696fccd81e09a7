"""What a step tells of its routing, against numbers counted on paper."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import BatchConfig, MeshConfig, RunConfig
from dsv3_jax.mesh import batch_sharding, make_mesh
from dsv3_jax.presets import MODELS, RUNS
from dsv3_jax.training import loop
from dsv3_jax.training.loss import Losses
from dsv3_jax.training.metrics import step_record
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.state import init_state
from dsv3_jax.training.step import StepMetrics, make_train_step

WIDE, NARROW = (0, 2, 8, 10), (0, 1, 2, 3)
LAYERS = (NARROW, WIDE, WIDE, NARROW, WIDE)
"""The experts of all tokens in each layer."""
RUN = dataclasses.replace(
    RUNS["tiny"], recompute="none", batch=BatchConfig(sequences=16, sequence_length=16, micro_batches=2),
    mesh=MeshConfig(scale_out=2, scale_up=4, capacity_factor=1.125),
    model=dataclasses.replace(MODELS["tiny"], num_hidden_layers=len(LAYERS), first_k_dense_replace=0,
                              num_nextn_predict_layers=0))


def _step(config: RunConfig) -> StepMetrics:
    """Of one step whose routers' biases leave them no choice; without losses and norms, so that nothing but the forward
    is compiled."""
    mesh, batch = make_mesh(config.mesh), config.batch
    forced_LE = np.zeros((len(LAYERS), config.model.n_routed_experts), np.float32)
    np.put_along_axis(forced_LE, np.array(LAYERS), 10, axis=1)
    state = init_state(config, mesh)
    state.router_bias = jax.tree.map(lambda bias: jax.device_put(forced_LE, bias.sharding), state.router_bias)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (
        batch.micro_batches, batch.micro_batch, batch.sequence_length + 1)).astype(np.int32)

    def told(*arguments) -> StepMetrics:
        zero, (_, metrics) = np.float32(0), make_train_step(config)(*arguments)
        return metrics._replace(losses=Losses(zero, zero, zero), grad_norm=zero)
    with jax.set_mesh(mesh):
        return jax.jit(told)(state, jax.device_put(tokens, batch_sharding(mesh, leading=1)),
                             jnp.int32(batch.micro_batches), StepSettings(*map(jnp.float32, (3e-3, 1e-3, 0.3))))


def _record(metrics: StepMetrics) -> dict:
    return step_record(1, metrics, learning_rate=3e-3, seconds=1.0, tokens=256, bytes_per_token=None, peak_flops=None,
                       flops_per_token=1.0, bytes_per_row=loop._bytes_per_row(RUN))


@pytest.mark.slow
def test_step_tells_what_it_sends():
    """2 nodes of 4 devices, each with 2 experts and 16 tokens of a micro-batch; a device takes 9 choices of each sender
    in a round.

    WIDE: experts on the first two devices of both nodes, 16 choices for each from every sender: 2 rounds. All 128
    tokens cross to the other node. They enter both nodes at the place of their own device, and from there go to the
    first two: 2 rows of a token that lives on the first or second place, 4 of others.

    NARROW: 2 experts on each of the first two devices of the first node, 32 choices from every sender: rounds of 9, 9,
    9 and 5. The first and the third end between the two choices of a token, which goes again: 18 rows of 16 tokens.
    From the second node's 4 devices they cross. Then they go to one other device if they live on the first or second
    place, and else to two.
    """
    metrics = _step(RUN)
    record = _record(metrics)
    assert record["dispatch_rounds"] == 4
    assert record["dropped_choices"] == 0
    assert float(metrics.traffic.choices) == 2 * 5 * 128 * 4
    assert record["nodes_per_token"] == pytest.approx((3 * 2 + 2 * 1) / 5)
    row = 4 * 64 * 4  # there and back, forward and backward: 64 float32 numbers
    assert record["scale_out_bytes"] == 2 * (3 * 128 + 2 * 4 * 18) * row
    assert record["scale_up_bytes"] == 2 * (3 * 64 * (2 + 4) + 2 * 4 * 18 * (1 + 2)) * row
    assert record["load_max_over_mean"] == 16 / 4
    assert record["dead_experts"] == 5 * 12
    lost = metrics.traffic._replace(delivered=metrics.traffic.delivered - 3)
    assert _record(metrics._replace(traffic=lost))["dropped_choices"] == 3


@pytest.mark.parametrize(("changes", "row"), [
    ({}, 256 + 256 + 256 + 256),
    ({"precision": "bf16"}, 128 + 128 + 128 + 128),
    ({"precision": "bf16", "mesh": MeshConfig(combine="float32")}, 128 + 256 + 128 + 256),
    ({"precision": "bf16", "recompute": "experts"}, 128 + 128 + 128 + 128 + 128),
    ({"precision": "fp8", "recompute": "full"}, 68 + 128 + 68 + 128 + 68),  # a scale beside 64 values
], ids=str)
def test_bytes_of_a_row_in_a_step(changes, row):
    """There, back, in the backward there, and back; and there again for a backward that recomputes."""
    assert loop._bytes_per_row(dataclasses.replace(RUN, **changes)) == row
