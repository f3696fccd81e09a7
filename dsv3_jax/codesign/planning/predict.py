"""A training step of a layout on a machine: seconds by part, memory, traffic, and what they wait for.

In pipeline stages, chunks are exchanged and computed one after the other, pairs of a forward and a backward beside each
other (`pipelined`). Without stages every exchange stands alone, as the programs of this project run it today, and with
mesh.zero "full" weights are gathered layer by layer beside computing.

Not in it: uneven load of experts (unless asked for), launches, clocks under load, failures, input.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dsv3_jax.codesign.counting import count_parameters, training_flops_per_token
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.memory import kept_activations
from dsv3_jax.codesign.planning.layers import LayerTime, Machine
from dsv3_jax.codesign.planning.layout import Layout
from dsv3_jax.codesign.planning.operations import Layer, Work
from dsv3_jax.codesign.planning.pipelined import (
    COMMUNICATING,
    Components,
    Pipeline,
    components,
    stages_of,
    weights_on_rank,
)
from dsv3_jax.codesign.planning.update import GRADIENT_BYTES, WEIGHT_BYTES, Update, update
from dsv3_jax.codesign.step_buffers import topology_of
from dsv3_jax.codesign.step_traffic import exchange_traffic
from dsv3_jax.codesign.traffic import RowsAToken, random_choices, rows_a_token
from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.expert_parallel.exchange import RowBytes, row_bytes
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.nn.moe import wire_of
from dsv3_jax.pipeline.schedules import make
from dsv3_jax.precision.recipe import COMPUTE_DTYPE, RECIPES

WORKSPACE = 2.3
"""Bytes of activations, buffers and workspace over those kept for the backward: the most that compiled programs have
(`codesign.memory`)."""
MASTER_BYTES = 4 + 2 * 2
"""Of a weight between steps: float32, and two moments in bf16 (paper 2, section 3.3.3)."""
ROUTED_TOKENS = 16_384
"""Of the random router whose choices are counted."""


@dataclass(frozen=True)
class Prediction:
    """Of one training step."""

    layout: Layout
    components: dict[str, float]
    """Seconds; they add up to the step's."""
    resources: dict[str, float]
    """The same seconds by what is waited for."""
    memory: dict[str, float]
    """Bytes of the fullest device."""
    bytes_per_axis: dict[str, float]
    """Sent by one device in a step."""
    times: dict[Layer, LayerTime]
    """Of every kind of layer, one micro-batch."""

    @property
    def seconds(self) -> float:
        return sum(self.components.values())

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    def tokens_per_second(self, config: RunConfig) -> float:
        """Of the whole pod."""
        return config.batch.sequences * config.batch.sequence_length / self.seconds

    def flops_utilisation(self, config: RunConfig, hardware: Hardware, causal: bool = True) -> float:
        """Share of the bf16 peak, FLOPs counted as in paper 1's tables 2 and 4: without prediction modules."""
        flops = training_flops_per_token(config.model, config.batch.sequence_length, causal, mtp=False)
        return self.tokens_per_second(config) * flops / (self.layout.devices * hardware.peak_flops["bf16"])


def rows_of(config: RunConfig) -> RowsAToken:
    """Rows a token with the run's router and experts' places, affinities drawn at random."""
    return _counted(config.model, topology_of(config))


@functools.lru_cache(maxsize=64)
def _counted(model: ModelConfig, topology: Topology) -> RowsAToken:
    return rows_a_token(_choices(model), topology)


@functools.lru_cache(maxsize=4)
def _choices(model: ModelConfig) -> np.ndarray:
    return random_choices(model, ROUTED_TOKENS, seed=0)


def predict(config: RunConfig, layout: Layout, machine: Machine, rows: RowsAToken | None = None,
            imbalance: float = 1.0) -> Prediction:
    """Of a step of `config`'s model and batch.

    Args:
      rows: of a token, `rows_of` if not given.
      imbalance: rows of the fullest device over the mean.

    Raises:
      ConfigError: the layout does not divide, the schedule cannot have its sizes, or float8 where there is none.
    """
    group = layout.group_config(config)
    tokens = group.batch.micro_batch * group.batch.sequence_length / layout.group
    work = Work(config.model, tokens, config.batch.sequence_length, RECIPES[layout.precision].linear is not None,
                layout.recompute, rows or rows_of(group), layout.context, imbalance)
    wire = None
    if layout.expert_parallel > 1:
        itemsize = np.dtype(COMPUTE_DTYPE[layout.precision]).itemsize
        wire = row_bytes(config.model.hidden_size, itemsize, wire_of(RECIPES[layout.precision], group.execution))
    if layout.pipe > 1:
        return _in_stages(group, layout, machine, work, wire)
    return _in_one(group, layout, machine, work, wire)


def _in_stages(group: RunConfig, layout: Layout, machine: Machine, work: Work, wire: RowBytes | None) -> Prediction:
    hardware = machine.hardware
    pipeline = stages_of(work, layout.pipe, machine, wire)
    name = layout.schedule or "1f1b"
    table = make(name, layout.pipe, layout.micro_batches)
    per_layer = weights_of_layers(group.model, layout.expert_parallel)
    experts = weights_on_rank(table, pipeline, {layer: held[0] for layer, held in per_layer.items()})
    # The last stage's heads share one weight, and the first stage has the embedding.
    others = weights_on_rank(table, pipeline, {layer: held[1] for layer, held in per_layer.items()})
    copies = 2 if name == "dualpipe" else 1
    end = update(machine, experts, others, copies * layout.data, copies * layout.group)
    hop = work.tokens * group.model.hidden_size * 2
    slowdown = COMMUNICATING.slowdown if hardware.kind == "gpu" else 1.0
    parts = components(pipeline, name, layout.micro_batches, hop / hardware.scale_out.effective, slowdown, end.seconds)
    chunks = layout.micro_batches / layout.pipe
    traffic = {"pipe": 2 * hop * layout.micro_batches * (layout.pipe - 1) / layout.pipe,
               **{axis: sent * chunks for axis, sent in _exchanged(group.model, pipeline.times).items()},
               "data": end.fast_bytes + end.slow_bytes}
    kept = kept_activations(group, layout.group) / layout.pipe
    in_flight = {"gpipe": layout.micro_batches, "dualpipe": layout.pipe + 1}.get(name, layout.pipe)
    whole, own = experts + others, experts / (copies * layout.data) + others / (copies * layout.group)
    memory = {"weights to compute with": WEIGHT_BYTES * whole, "summed gradients": GRADIENT_BYTES * whole,
              "master weights and moments": MASTER_BYTES * own, "activations in flight": kept * in_flight,
              "buffers and workspace": kept * (WORKSPACE - 1)}
    names = dict(zip(("1F", "1B", "1W", "1F1B", "bubble", "optimizer"), parts, strict=True))
    computing = _computing(group.model, pipeline.times)
    resources = {resource: seconds * chunks for resource, seconds in computing.items()}
    rest = parts.seconds - sum(resources.values()) - parts.bubble - end.seconds
    resources |= {"exchanges, or SMs that they take": rest, "pipeline bubble": parts.bubble, **_waits(end, hardware)}
    return Prediction(layout, names, resources, memory, traffic, pipeline.times)


def _in_one(group: RunConfig, layout: Layout, machine: Machine, work: Work, wire: RowBytes | None) -> Prediction:
    hardware, m, n = machine.hardware, group.model, layout.micro_batches
    pipeline = stages_of(work, 1, machine, wire)
    stage = pipeline.stages[0]
    per_layer = weights_of_layers(m, layout.expert_parallel)
    counts = _counts(m)
    experts, others = (sum(per_layer[layer][which] * number for layer, number in counts.items()) for which in (0, 1))
    end = update(machine, experts, others, layout.data, layout.group)
    gather = 0.0
    sent = {"data": end.fast_bytes + end.slow_bytes}
    if layout.zero == "full":
        # Forward and backward gather weights, and gradients are summed, in every micro-batch; AdamW is left.
        once = update(machine, experts, others, layout.data, layout.group, gathers=2)
        gather = max(0.0, n * once.network - n * stage.computing)
        sent = {"data": n * (once.fast_bytes + once.slow_bytes)}
        end = Update(0.0, 0.0, end.memory, 0.0, 0.0)
    exchange = n * (stage.exchange + stage.exchange_back)
    parts = {"forward": n * stage.forward, "backward": n * stage.input, "weight": n * stage.weight,
             "exchange": exchange, "gather": gather, "optimizer": end.seconds}
    resources = {resource: seconds * n for resource, seconds in _computing(m, pipeline.times).items()}
    exchanged = pipeline.times["experts"].exchange
    if exchanged is not None:
        resources[exchanged.resource] = exchange
    for resource, seconds in {hardware.scale_out.name: gather, **_waits(end, hardware)}.items():
        resources[resource] = resources.get(resource, 0.0) + seconds
    padded = exchange_traffic(group, layout.group) if group.mesh.transport == "padded" else None
    axes = ({axis: size * n for axis, size in _exchanged(m, pipeline.times).items()} if padded is None
            else {"scale_out": padded.between_nodes, "scale_up": padded.inside_node})
    whole, own = experts + others, experts / layout.data + others / layout.group
    kept = kept_activations(group, layout.devices)
    memory = {"weights to compute with": WEIGHT_BYTES * (own if layout.zero == "full" else whole),
              "summed gradients": GRADIENT_BYTES * own * (n > 1), "master weights and moments": MASTER_BYTES * own,
              "activations": kept, "buffers and workspace": kept * (WORKSPACE - 1)}
    return Prediction(layout, parts, resources, memory, axes | sent, pipeline.times)


def weights_of_layers(m: ModelConfig, expert_parallel: int) -> dict[Layer, tuple[float, float]]:
    """(of routed experts, of all else) on one device."""
    d = m.hidden_size
    attention = count_parameters(m).by_part["attention"] / m.num_hidden_layers
    routed = 3.0 * m.n_routed_experts * d * m.moe_intermediate_size / expert_parallel
    beside = attention + 3.0 * d * m.n_shared_experts * m.moe_intermediate_size + d * m.n_routed_experts
    # Both heads share one weight, and the embedding lies on the same ranks or is as large on the others.
    head = m.vocab_size * d / (1 + m.num_nextn_predict_layers) * 2
    return {"dense": (0.0, attention + 3.0 * d * m.intermediate_size), "experts": (routed, beside),
            "prediction": (routed, beside + 2.0 * d * d), "head": (0.0, head)}


def _counts(m: ModelConfig) -> dict[Layer, int]:
    return {"dense": m.first_k_dense_replace, "experts": m.num_moe_layers, "prediction": m.num_nextn_predict_layers,
            "head": 1 + m.num_nextn_predict_layers}


def _computing(m: ModelConfig, times: dict[Layer, LayerTime]) -> dict[str, float]:
    """Seconds of one micro-batch in all layers, by what their operations wait for."""
    found: dict[str, float] = {}
    for layer, number in _counts(m).items():
        for timed in times[layer].operations if number else ():
            found[timed.resource] = found.get(timed.resource, 0.0) + number * timed.seconds
    return found


def _exchanged(m: ModelConfig, times: dict[Layer, LayerTime]) -> dict[str, float]:
    """Bytes of one micro-batch in all layers."""
    number = m.num_moe_layers + m.num_nextn_predict_layers
    exchange = times["experts"].exchange
    if exchange is None:
        return {}
    return {"scale_out": exchange.bytes_out * number, "scale_up": exchange.bytes_up * number}


def _waits(end: Update, hardware: Hardware) -> dict[str, float]:
    """Of the optimizer."""
    link = hardware.scale_out if end.slow >= end.fast else hardware.scale_up
    return {f"{link.name}, optimizer": end.network, "HBM, optimizer": end.memory}


WHAT_IF = ("twice the FLOP/s", "twice the HBM bandwidth", "twice the slow network", "twice the fast network")


def improved(hardware: Hardware, change: str) -> Hardware:
    """Hardware with one thing doubled."""
    if change == WHAT_IF[0]:
        return dataclasses.replace(hardware, peak_flops={kind: 2 * peak for kind, peak in hardware.peak_flops.items()})
    if change == WHAT_IF[1]:
        return dataclasses.replace(hardware, hbm_bandwidth=2 * hardware.hbm_bandwidth)
    axis = "scale_out" if change == WHAT_IF[2] else "scale_up"
    link = getattr(hardware, axis)
    faster = dataclasses.replace(link, bandwidth=2 * link.bandwidth, effective=2 * link.effective)
    return dataclasses.replace(hardware, **{axis: faster})


def what_if(config: RunConfig, layout: Layout, machine: Machine, rows: RowsAToken | None = None,
            imbalance: float = 1.0) -> dict[str, float]:
    """Seconds that a step takes with one thing of the hardware doubled."""
    rows = rows or rows_of(layout.group_config(config))
    return {change: predict(config, layout, dataclasses.replace(machine, hardware=improved(machine.hardware, change)),
                            rows, imbalance).seconds for change in WHAT_IF}
