"""A training step of a layout on a machine: seconds by part, memory, traffic, and what they wait for.

In pipeline stages, chunks are exchanged and computed one after the other, pairs of a forward and a backward beside each
other (`pipelined`). Without stages every exchange stands alone, as the programs of this project run it today; gradients
are summed and, with mesh.zero "full", weights gathered in every micro-batch, beside computing.

Not in it: uneven load of experts (unless asked for), launches, clocks under load, failures, input.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np

from dsv3_jax.codesign.counting import count_parameters, training_flops_per_token
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.memory import kept_activations
from dsv3_jax.codesign.planning.layers import LayerTime, Machine
from dsv3_jax.codesign.planning.layout import Layout
from dsv3_jax.codesign.planning.operations import Layer, Work
from dsv3_jax.codesign.planning.pipelined import (
    COMMUNICATING,
    Pipeline,
    components,
    inputs_kept,
    least_seconds,
    stages_of,
    weights_on_rank,
)
from dsv3_jax.codesign.planning.update import GRADIENT_BYTES, WEIGHT_BYTES, Update, update
from dsv3_jax.codesign.step_buffers import topology_of
from dsv3_jax.codesign.step_traffic import exchange_traffic
from dsv3_jax.codesign.traffic import RowsAToken, random_choices, rows_a_token
from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.expert_parallel.exchange import row_bytes
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.nn.moe import wire_of
from dsv3_jax.pipeline.account import moves
from dsv3_jax.pipeline.schedule import Schedule
from dsv3_jax.precision.recipe import COMPUTE_DTYPE, RECIPES

WORKSPACE = 2.0
"""Bytes of activations, buffers and workspace over those kept for the backward: of compiled programs 1.7 to 2.3
(`codesign.memory`), so that a plan may be 15% off; compile_for_pod.py tells."""
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


@dataclass(frozen=True)
class Draft:
    """A layout as far as it is known without running its schedule."""

    layout: Layout
    machine: Machine
    group: RunConfig
    work: Work
    pipeline: Pipeline
    end: Update
    memory: dict[str, float]

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def slowdown(self) -> float:
        """Of computing beside an exchange, on GPUs' SMs."""
        return COMMUNICATING.slowdown if self.machine.hardware.kind == "gpu" else 1.0

    @property
    def least_seconds(self) -> float:
        """No step is shorter."""
        layout = self.layout
        end = self.end.memory if layout.zero == "full" else self.end.seconds
        return end + least_seconds(self.pipeline, layout.schedule, layout.pipe, layout.micro_batches, self.slowdown)


def draft(config: RunConfig, layout: Layout, machine: Machine, rows: RowsAToken | None = None,
          imbalance: float = 1.0) -> Draft:
    """Layers' times and memory of a layout, without running its schedule.

    Args:
      rows: of a token, `rows_of` if not given.
      imbalance: rows of the fullest device over the mean.

    Raises:
      ConfigError: the layout does not divide, the schedule cannot have its sizes, or float8 where there is none.
    """
    group = layout.group_config(config)
    table = layout.table
    tokens = group.batch.micro_batch * group.batch.sequence_length / layout.group
    work = Work(config.model, tokens, config.batch.sequence_length, RECIPES[layout.precision].linear is not None,
                layout.recompute, rows or rows_of(group), layout.context, layout.scale_up * layout.context, imbalance)
    wire = None
    if layout.expert_parallel > 1:
        itemsize = np.dtype(COMPUTE_DTYPE[layout.precision]).itemsize
        wire = row_bytes(config.model.hidden_size, itemsize, wire_of(RECIPES[layout.precision], group.execution))
    pipeline = stages_of(work, table.stages if table else 1, machine, wire)
    per_layer = weights_of_layers(config.model, layout.expert_parallel)
    experts, others = (weights_on_rank(pipeline, table, {layer: held[which] for layer, held in per_layer.items()})
                       for which in (0, 1))
    copies = layout.data * (2 if layout.schedule == "dualpipe" else 1)
    # A pipeline sums gradients of all micro-batches in float32 at the end; else each micro-batch's are (`_in_one`).
    end = update(machine, experts, others, copies, layout.expert_parallel,
                 WEIGHT_BYTES + (GRADIENT_BYTES if table else 0))
    own = experts / copies + others / (copies * layout.expert_parallel)
    largest = max(sum(held) for held in per_layer.values())
    return Draft(layout, machine, group, work, pipeline, end, _memory(group, layout, experts + others, own, largest))


def _memory(group: RunConfig, layout: Layout, whole: float, own: float, largest: float) -> dict[str, float]:
    """Bytes of a device with `whole` weights, `largest` in one layer, and `own` as its part of the optimizer's."""
    table = layout.table
    kept = kept_activations(group, layout.group) / (table.stages if table else 1)
    in_flight = inputs_kept(layout.schedule, layout.pipe, layout.micro_batches) if layout.schedule else 1
    # Gradients are summed where weights are whole in a pipeline, else where they are spread.
    summed = whole if layout.pipe > 1 else own * (layout.micro_batches > 1)
    gathered = 2 * WEIGHT_BYTES * largest if layout.zero == "full" else 0.0  # a layer, and the next
    return {"weights to compute with": WEIGHT_BYTES * (own if layout.zero == "full" else whole),
            "summed gradients": GRADIENT_BYTES * summed, "master weights and moments": MASTER_BYTES * own,
            "activations kept": kept * in_flight, "buffers and workspace": max(kept * (WORKSPACE - 1), gathered)}


def predict(config: RunConfig, layout: Layout, machine: Machine, rows: RowsAToken | None = None,
            imbalance: float = 1.0) -> Prediction:
    """Of a step of `config`'s model and batch; arguments and errors as of `draft`."""
    return finish(draft(config, layout, machine, rows, imbalance))


def finish(known: Draft) -> Prediction:
    """Runs the schedule."""
    table = known.layout.table
    return _in_one(known) if table is None else _in_stages(known, table)


def _in_stages(known: Draft, table: Schedule) -> Prediction:
    layout, end, pipeline, hardware = known.layout, known.end, known.pipeline, known.machine.hardware
    model = known.group.model
    hop = known.work.tokens * model.hidden_size * 2
    parts = components(pipeline, table, hop / hardware.scale_out.effective, known.slowdown, end.seconds)
    chunks = layout.micro_batches / layout.pipe
    hops = sum(len(slot.sends) for slots in moves(table) for slot in slots) / table.ranks
    traffic = {"pipe": hop * hops,
               **{axis: sent * chunks for axis, sent in _exchanged(model, pipeline.times).items()},
               "data": end.fast_bytes + end.slow_bytes}
    names = dict(zip(("1F", "1B", "1W", "1F1B", "bubble", "optimizer"), parts, strict=True))
    resources = {resource: seconds * chunks for resource, seconds in _computing(model, pipeline.times).items()}
    rest = parts.seconds - sum(resources.values()) - parts.bubble - end.seconds
    resources |= {"exchanges, or SMs that they take": rest, "pipeline bubble": parts.bubble, **_waits(end, hardware)}
    return Prediction(layout, names, resources, known.memory, traffic, pipeline.times)


def _in_one(known: Draft) -> Prediction:
    layout, end, group, machine = known.layout, known.end, known.group, known.machine
    hardware, m, n, times = machine.hardware, known.group.model, known.layout.micro_batches, known.pipeline.times
    stage = known.pipeline.stages[0]
    # Every micro-batch sums its gradients, in bf16 and beside computing; fully sharded, its forward and its backward
    # gather weights, too, and the end of the step sends nothing.
    experts, others = (sum(weights_of_layers(m, layout.expert_parallel)[layer][which] * number
                           for layer, number in _counts(m).items()) for which in (0, 1))
    each = update(machine, experts, others, layout.data, layout.expert_parallel,
                  WEIGHT_BYTES * (3 if layout.zero == "full" else 1))
    gather = n * max(0.0, each.network - stage.computing)
    if layout.zero == "full":
        end = Update(0.0, 0.0, end.memory, 0.0, 0.0)
    sent = n * (each.fast_bytes + each.slow_bytes) + end.fast_bytes + end.slow_bytes
    exchange = n * (stage.exchange + stage.exchange_back)
    parts = {"forward": n * stage.forward, "backward": n * stage.input, "weight": n * stage.weight,
             "exchange": exchange, "gather": gather, "optimizer": end.seconds}
    resources = {resource: seconds * n for resource, seconds in _computing(m, times).items()}
    exchanged = times["experts"].exchange
    waits = {hardware.scale_out.name: gather, **_waits(end, hardware)}
    if exchanged is not None:
        resources[exchanged.resource] = exchange
    for resource, seconds in waits.items():
        resources[resource] = resources.get(resource, 0.0) + seconds
    if group.mesh.transport == "padded" and layout.expert_parallel > 1:
        padded = exchange_traffic(group, layout.group)
        axes = {"scale_out": padded.between_nodes, "scale_up": padded.inside_node}
    else:
        axes = {axis: size * n for axis, size in _exchanged(m, times).items()}
    return Prediction(layout, parts, {name: seconds for name, seconds in resources.items() if seconds}, known.memory,
                      axes | {"data": sent}, times)


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
