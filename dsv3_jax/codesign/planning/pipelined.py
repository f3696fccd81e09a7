"""A training step in pipeline stages, as paper 1's table 4 splits it, from the schedule's own table of work."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.codesign.planning.layers import LayerTime, Machine, layer_time
from dsv3_jax.codesign.planning.operations import Layer, Work
from dsv3_jax.codesign.sm_tax import Multiprocessors
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.expert_parallel.exchange import RowBytes
from dsv3_jax.pipeline.schedule import Schedule, Slot, kinds_of, run
from dsv3_jax.pipeline.schedules import make

COMMUNICATING = Multiprocessors()
"""A GPU's SMs while an exchange runs beside computing: 20 of 132 (paper 1, section 4.4.1)."""


class Stage(NamedTuple):
    """Seconds of one micro-batch in one stage, computing alone, and its exchanges."""

    forward: float
    input: float
    weight: float
    exchange: float
    exchange_back: float

    @property
    def computing(self) -> float:
        return self.forward + self.input + self.weight


class Components(NamedTuple):
    """Paper 1's table 4, seconds, means over ranks: chunks on their own by phase, pairs that cover each other's
    exchanges, waiting, and the optimizer."""

    forward: float
    backward: float
    """1B: of inputs."""
    weight: float
    """1W: also of whole backwards."""
    together: float
    """1F1B."""
    bubble: float
    optimizer: float

    @property
    def seconds(self) -> float:
        return sum(self)


def units(model: ModelConfig) -> list[tuple[Layer, ...]]:
    """What cannot be cut, in order. Prediction modules lie with both heads, which share the main model's weights
    (paper 2, section 3.2.3)."""
    end: tuple[Layer, ...] = ("head",) + ("prediction", "head") * model.num_nextn_predict_layers
    layers: list[tuple[Layer, ...]] = [("dense",)] * model.first_k_dense_replace
    return [*layers, *([("experts",)] * model.num_moe_layers), end]


def split(costs: Sequence[float], stages: int) -> list[int]:
    """How many of `costs` each stage takes, in order, so that the dearest stage is cheapest.

    Raises:
      ConfigError: fewer costs than stages.
    """
    if len(costs) < stages:
        raise ConfigError(f"pipe ({stages}) must be at most {len(costs)}, the layers that can be divided")
    total = np.concatenate([[0.0], np.cumsum(costs)])

    @functools.cache
    def best(begin: int, left: int) -> tuple[float, int]:
        """(dearest stage, end of the first)"""
        if left == 1:
            return total[-1] - total[begin], len(costs)
        ends = range(begin + 1, len(costs) - left + 2)
        return min((max(total[end] - total[begin], best(end, left - 1)[0]), end) for end in ends)

    sizes, begin = [], 0
    for left in range(stages, 0, -1):
        end = best(begin, left)[1]
        sizes.append(end - begin)
        begin = end
    return sizes


class Pipeline(NamedTuple):
    """Stages with what they hold."""

    stages: tuple[Stage, ...]
    layers: tuple[tuple[Layer, ...], ...]
    times: dict[Layer, LayerTime]


def stages_of(work: Work, pipe: int, machine: Machine, wire: RowBytes | None) -> Pipeline:
    """The model cut into `pipe` stages of about equal computing."""
    times: dict[Layer, LayerTime] = {}
    pieces = units(work.model)
    for piece in pieces:
        for layer in piece:
            if layer not in times:
                times[layer] = layer_time(work, layer, machine, wire)
    costs = [sum(_stage((layer,), times).computing for layer in piece) for piece in pieces]
    held, begin = [], 0
    for size in split(costs, pipe):
        held.append(tuple(layer for piece in pieces[begin:begin + size] for layer in piece))
        begin += size
    return Pipeline(tuple(_stage(layers, times) for layers in held), tuple(held), times)


def _stage(layers: Sequence[Layer], times: dict[Layer, LayerTime]) -> Stage:
    def total(phase: str) -> float:
        return sum(times[layer].computing(phase) for layer in layers)  # type: ignore[arg-type]
    exchanges = [exchange for layer in layers if (exchange := times[layer].exchange) is not None]
    return Stage(total("forward"), total("input"), total("weight"), sum(one.forward for one in exchanges),
                 sum(one.backward for one in exchanges))


def slot_seconds(slot: Slot, stages: Sequence[Stage], slowdown: float) -> float:
    """Of what a rank does at once: alone, computing and exchanges follow each other; a pair's exchanges run beside its
    computing, which the SMs that communicate slow down."""
    computing = exchanging = 0.0
    for work in slot:
        stage = stages[work.stage]
        if work.kind == "F":
            computing, exchanging = computing + stage.forward, exchanging + stage.exchange
        if work.kind in "BI":
            computing, exchanging = computing + stage.input, exchanging + stage.exchange_back
        if work.kind in "BW":
            computing += stage.weight
    if len(slot) == 1:
        return computing + exchanging
    return max(computing * (slowdown if exchanging else 1.0), exchanging)


def components(pipeline: Pipeline, schedule: str, micro_batches: int, transfer: float, slowdown: float,
               optimizer: float) -> Components:
    """Of a step.

    Args:
      micro_batches: through one pipeline.
      transfer: seconds for a micro-batch's activations from one stage to the next.
      slowdown: of computing beside an exchange.
      optimizer: seconds after the last backward.

    Raises:
      ConfigError: the schedule cannot have these sizes.
    """
    stages = pipeline.stages
    table = make(schedule, len(stages), micro_batches)
    timeline = run(table, lambda rank, slot: slot_seconds(slot, stages, slowdown), transfer)
    forward = backward = weight = together = 0.0
    for rank in timeline.ranks:
        for timed in rank:
            seconds, kinds = timed.end - timed.start, kinds_of(timed.slot)
            weights = sum(stages[work.stage].weight for work in timed.slot if work.kind in "BW")
            if len(timed.slot) > 1:
                together += seconds
            elif kinds == "F":
                forward += seconds
            else:
                weight += weights
                backward += seconds - weights
    ranks = table.ranks
    bubble = sum(timeline.bubble(rank) for rank in range(ranks)) / ranks
    return Components(forward / ranks, backward / ranks, weight / ranks, together / ranks, bubble, optimizer)


def weights_on_rank(schedule: Schedule, pipeline: Pipeline, per_layer: dict[Layer, float]) -> float:
    """Of the rank with the most, given each layer's on one device."""
    stages_of_rank = [{work.stage for slot in slots for work in slot} for slots in schedule.slots]
    return max(sum(per_layer[layer] for stage in stages for layer in pipeline.layers[stage])
               for stages in stages_of_rank)
