"""A training step in pipeline stages, as paper 1's table 4 splits it, from the schedule's own table of work."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from dsv3_jax.codesign.planning.layers import LayerTime, Machine, layer_time
from dsv3_jax.codesign.planning.operations import Layer, Work
from dsv3_jax.codesign.sm_tax import Multiprocessors
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.expert_parallel.exchange import RowBytes
from dsv3_jax.pipeline.account import stages_of as stages_of_rank
from dsv3_jax.pipeline.schedule import Schedule, Slot, kinds_of, peak_activations, run
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
    more: tuple[Layer, ...] = ("prediction", "head")
    pieces: list[tuple[Layer, ...]] = [("dense",)] * model.first_k_dense_replace
    pieces += [("experts",)] * model.num_moe_layers
    return [*pieces, ("head", *more * model.num_nextn_predict_layers)]


def split(costs: Sequence[float], stages: int) -> list[int]:
    """How many of `costs` each stage takes, in order, so that the dearest stage is cheapest.

    Raises:
      ConfigError: fewer costs than stages.
    """
    if len(costs) < stages:
        raise ConfigError(f"stages ({stages}) must be at most {len(costs)}, the layers that can be divided")
    low, high = max(costs), sum(costs)
    for _ in range(50):  # the least limit under which `stages` stages, filled one after the other, take all
        limit = (low + high) / 2
        low, high = (low, limit) if len(_filled(costs, limit)) <= stages else (limit, high)
    sizes = _filled(costs, high)
    while len(sizes) < stages:  # fewer would do as well: the first that can be cut gives up its last
        place = next(index for index, size in enumerate(sizes) if size > 1)
        sizes[place:place + 1] = [sizes[place] - 1, 1]
    return sizes


def _filled(costs: Sequence[float], limit: float) -> list[int]:
    """Numbers of costs in stages that stay within the limit, as far as one cost does."""
    sizes, held = [0], 0.0
    for cost in costs:
        if sizes[-1] and held + cost > limit * (1 + 1e-12):
            sizes, held = [*sizes, 0], 0.0
        sizes[-1], held = sizes[-1] + 1, held + cost
    return sizes


class Pipeline(NamedTuple):
    """Stages with what they hold."""

    stages: tuple[Stage, ...]
    layers: tuple[tuple[Layer, ...], ...]
    times: dict[Layer, LayerTime]


@functools.lru_cache(maxsize=4096)
def stages_of(work: Work, stages: int, machine: Machine, wire: RowBytes | None) -> Pipeline:
    """The model cut into stages of about equal computing."""
    times: dict[Layer, LayerTime] = {}
    pieces = units(work.model)
    for piece in pieces:
        for layer in piece:
            if layer not in times:
                times[layer] = layer_time(work, layer, machine, wire)
    each = {layer: _stage(time) for layer, time in times.items()}
    costs = [sum(each[layer].computing for layer in piece) for piece in pieces]
    held, begin = [], 0
    for size in split(costs, stages):
        held.append(tuple(layer for piece in pieces[begin:begin + size] for layer in piece))
        begin += size
    totals = tuple(Stage(*map(sum, zip(*(each[layer] for layer in layers), strict=True))) for layers in held)
    return Pipeline(totals, tuple(held), times)


def _stage(time: LayerTime) -> Stage:
    """Of one layer."""
    there, back = (time.exchange.forward, time.exchange.backward) if time.exchange else (0.0, 0.0)
    return Stage(time.computing("forward"), time.computing("input"), time.computing("weight"), there, back)


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


@functools.lru_cache(maxsize=256)
def table_of(schedule: str, pipe: int, micro_batches: int) -> Schedule:
    """The schedule's table of work.

    Raises:
      ConfigError: it cannot have these sizes.
    """
    return make(schedule, pipe, micro_batches)


@functools.lru_cache(maxsize=256)
def inputs_kept(schedule: str, pipe: int, micro_batches: int) -> int:
    """Stage inputs that the fullest rank keeps at once."""
    return max(peak_activations(table_of(schedule, pipe, micro_batches)))


def components(pipeline: Pipeline, table: Schedule, transfer: float, slowdown: float, optimizer: float) -> Components:
    """Of a step.

    Args:
      transfer: seconds for a micro-batch's activations from one stage to the next.
      slowdown: of computing beside an exchange.
      optimizer: seconds after the last backward.
    """
    stages = pipeline.stages
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
    bubble = timeline.seconds - sum(timeline.busy(rank) for rank in range(ranks)) / ranks
    return Components(forward / ranks, backward / ranks, weight / ranks, together / ranks, bubble, optimizer)


def weights_on_rank(pipeline: Pipeline, table: Schedule | None, per_layer: dict[Layer, float]) -> float:
    """Of the rank with the most; without a table, of the one that has all."""
    held = [sum(per_layer[layer] for layer in layers) for layers in pipeline.layers]
    if table is None:
        return sum(held)
    return max(sum(held[stage] for stage in stages_of_rank(table, rank)) for rank in range(table.ranks))


def least_seconds(pipeline: Pipeline, schedule: str | None, pipe: int, micro_batches: int, slowdown: float) -> float:
    """No step can be shorter, the optimizer aside: all work shared out evenly; without pairs, the last rank's after one
    micro-batch's way to it, and before one's way back. Of DualPipe's pairs there are at least n - 3R/2 on a rank."""
    stages = pipeline.stages
    computing = sum(stage.computing for stage in stages)
    exchanging = sum(stage.exchange + stage.exchange_back for stage in stages)
    even = (computing + exchanging) * micro_batches / pipe
    if schedule in ("dualpipe", "dualpipev"):
        pairs = max(0.0, 1 - 1.5 * pipe / micro_batches)
        return (pairs * max(computing * slowdown if exchanging else computing, exchanging)
                + (1 - pairs) * max(computing, exchanging)) * micro_batches / pipe
    if schedule in ("gpipe", "1f1b", "zb1p"):
        last, way = stages[-1], stages[:-1]
        there_and_back = sum(stage.forward + stage.input + stage.exchange + stage.exchange_back for stage in way)
        put_off = min(pipe, micro_batches) if schedule == "zb1p" else 0  # weights' parts that can wait till the end
        return max(even, there_and_back - put_off * last.weight
                   + (last.computing + last.exchange + last.exchange_back) * micro_batches)
    return even
