"""A schedule as tables of numbers, [tick, rank]: what a program that is the same on all ranks looks up.

All ranks step together, one slot a tick. Whatever is kept from one tick to another has a slot in a buffer; a slot is
free again once what it held was read for the last time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.pipeline.account import on_ticks, stages_of
from dsv3_jax.pipeline.schedule import Schedule, Work


class Tables(NamedTuple):
    """int32 [ticks, ranks] each, but for what says otherwise. A slot that nothing reads is the last of its buffer."""

    branch: np.ndarray
    """What runs first, a place in `branches`: a forward, a backward for inputs, both or nothing."""
    forward_chunk: np.ndarray
    """Which of the rank's stages, in ascending order."""
    forward_micro_batch: np.ndarray
    forward_input: np.ndarray
    """Slot of what the stage before made."""
    forward_stash: np.ndarray
    """Slot for what the backward needs."""
    backward_chunk: np.ndarray
    backward_gradient: np.ndarray
    """Slot of the gradient that the stage after made."""
    backward_stash: np.ndarray
    backward_put_off: np.ndarray
    """Slot for what the weights' part needs."""
    weights_kind: np.ndarray
    """What runs last: the weights' part of a stage of this kind; -1 for nothing."""
    weights_chunk: np.ndarray
    weights_stash: np.ndarray
    weights_put_off: np.ndarray
    output_arrives: np.ndarray
    """[ticks, ranks, shifts]: slot for what comes that way at the end of a tick."""
    gradient_arrives: np.ndarray


class Program(NamedTuple):
    """Tables and all that is static about them."""

    tables: Tables
    branches: tuple[tuple[int | None, int | None], ...]
    """(kind of the stage that goes forward, kind of the one that goes backward); None for none of that."""
    output_shifts: tuple[int, ...]
    """Ways that outputs go: rank r to r + shift, modulo the ranks; 0 stays on its rank."""
    gradient_shifts: tuple[int, ...]
    inputs: int
    """Slots of the buffers, besides the last."""
    gradients: int
    stash: int
    put_off: int
    chunks: int
    """Stages of a rank."""

    @property
    def ticks(self) -> int:
        return len(self.tables.branch)


class _Lifetime(NamedTuple):
    """What is kept on a rank: written in one tick, read in a later one for the last time."""

    rank: int
    written: int
    read: int
    key: tuple[int, int]
    """(micro-batch, stage) of the work that reads it."""


def make_tables(schedule: Schedule, kind_of_stage: Sequence[int]) -> Program:
    """Tables of a checked schedule whose stages are of these kinds."""
    cells = on_ticks(schedule)
    done = {(part, work.micro_batch, work.stage): tick for (tick, _), slot in cells.items() for work in slot
            for part in ("IW" if work.kind == "B" else work.kind)}
    ticks, ranks, last = 1 + max(tick for tick, _ in cells), schedule.ranks, schedule.stages - 1
    every = [(m, s, route[s]) for m, route in enumerate(schedule.routes) for s in range(schedule.stages)]
    inputs = _slots(_Lifetime(r, done["F", m, s - 1], done["F", m, s], (m, s)) for m, s, r in every if s)
    gradients = _slots(_Lifetime(r, done["I", m, s + 1], done["I", m, s], (m, s)) for m, s, r in every if s < last)
    stash = _slots(_Lifetime(r, done["F", m, s], done["W", m, s], (m, s)) for m, s, r in every)
    # Written before the weights' part of the same tick: busy from the tick before on.
    put_off = _slots(_Lifetime(r, done["I", m, s] - 1, done["W", m, s], (m, s)) for m, s, r in every)
    counts = [max(slots.values(), default=-1) + 1 for slots in (inputs, gradients, stash, put_off)]
    shifts = {content: _shifts(schedule, content == "output") for content in ("output", "gradient")}

    def table(fill: int, *more: int) -> np.ndarray:
        return np.full((ticks, ranks, *more), fill, np.int32)
    tables = Tables(table(0), table(0), table(0), table(counts[0]), table(counts[2]), table(0), table(counts[1]),
                    table(counts[2]), table(counts[3]), table(-1), table(0), table(counts[2]), table(counts[3]),
                    table(counts[0], len(shifts["output"])), table(counts[1], len(shifts["gradient"])))
    chunk = {(rank, stage): n for rank in range(ranks) for n, stage in enumerate(stages_of(schedule, rank))}
    branches: dict[tuple[int | None, int | None], int] = {(None, None): 0}
    for at, slot in cells.items():
        kinds: list[int | None] = [None, None]
        for work in slot:
            key, own = (work.micro_batch, work.stage), chunk[at[1], work.stage]
            kind = kind_of_stage[work.stage]
            if work.kind == "F":
                kinds[0] = kind
                _set(tables, at, forward_chunk=own, forward_micro_batch=work.micro_batch, forward_stash=stash[key],
                     forward_input=inputs.get(key, counts[0]))
                _arrive(tables.output_arrives, schedule, work, 1, shifts["output"], inputs, at)
            if work.kind in "BI":
                kinds[1] = kind
                _set(tables, at, backward_chunk=own, backward_stash=stash[key], backward_put_off=put_off[key],
                     backward_gradient=gradients.get(key, counts[1]))
                _arrive(tables.gradient_arrives, schedule, work, -1, shifts["gradient"], gradients, at)
            if work.kind in "BW":
                _set(tables, at, weights_kind=kind, weights_chunk=own, weights_stash=stash[key],
                     weights_put_off=put_off[key])
        _set(tables, at, branch=branches.setdefault((kinds[0], kinds[1]), len(branches)))
    return Program(tables, tuple(branches), shifts["output"], shifts["gradient"], counts[0], counts[1], counts[2],
                   counts[3], max(len(stages_of(schedule, rank)) for rank in range(ranks)))


def _slots(lifetimes: Iterable[_Lifetime]) -> dict[tuple[int, int], int]:
    """key -> slot: on every rank the lowest that is free. A slot read in a tick can be written at its end."""
    slots: dict[tuple[int, int], int] = {}
    busy: dict[tuple[int, int], int] = {}
    for life in sorted(lifetimes, key=lambda life: (life.written, life.read)):
        slot = 0
        while busy.get((life.rank, slot), -2) > life.written:
            slot += 1
        busy[life.rank, slot] = life.read
        slots[life.key] = slot
    return slots


def _set(tables: Tables, at: tuple[int, int], **values: int) -> None:
    for name, value in values.items():
        getattr(tables, name)[at] = value


def _shifts(schedule: Schedule, outputs: bool) -> tuple[int, ...]:
    """Ways that outputs, or gradients, go."""
    step = 1 if outputs else -1
    pairs = {(route[s], route[s + step]) for route in schedule.routes for s in range(schedule.stages)
             if 0 <= s + step < schedule.stages}
    return tuple(sorted({(target - source) % schedule.ranks for source, target in pairs}))


def _arrive(arrives: np.ndarray, schedule: Schedule, work: Work, step: int, shifts: tuple[int, ...],
            slots: dict[tuple[int, int], int], at: tuple[int, int]) -> None:
    """Notes where what `work` makes goes at the end of its tick."""
    to = work.stage + step
    if 0 <= to < schedule.stages:
        target = schedule.routes[work.micro_batch][to]
        arrives[at[0], target, shifts.index((target - at[1]) % schedule.ranks)] = slots[work.micro_batch, to]
