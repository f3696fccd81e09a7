"""Schedules as tables of numbers, [tick, rank]: what a program that is the same on all ranks looks up.

All ranks step together, one slot a tick. Whatever is kept from one tick to another has a slot in a buffer; a slot is
free again once what it held was read for the last time. One program can have several schedules, such as those of
batches of several sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax.pipeline.account import on_ticks, stages_of
from dsv3_jax.pipeline.schedule import Schedule, Slot, Work

Cells = dict[tuple[int, int], Slot]
"""(tick, rank) -> what the rank does then; see `account.on_ticks`."""


class Tables(NamedTuple):
    """int16 [schedules, ticks, ranks] each, but for what says otherwise; schedules with fewer ticks are filled up with
    ticks that do nothing."""

    branch: np.ndarray
    """What runs first, a place in `branches`: a forward, a backward for inputs, both or nothing."""
    forward_chunk: np.ndarray
    """Which of the rank's stages, in ascending order."""
    forward_micro_batch: np.ndarray
    forward_input: np.ndarray
    """Slot of what the stage before made."""
    forward_stash: np.ndarray
    """Slot for what the backward needs. Without a forward, any: it keeps what it has."""
    backward_chunk: np.ndarray
    backward_gradient: np.ndarray
    """Slot of the gradient that the stage after made."""
    backward_stash: np.ndarray
    backward_put_off: np.ndarray
    """Slot for what the weights' part needs. Without a backward, any: it keeps what it has."""
    weights_kind: np.ndarray
    """What runs last: the weights' part of a stage of this kind; -1 for nothing."""
    weights_chunk: np.ndarray
    weights_stash: np.ndarray
    weights_put_off: np.ndarray
    output_arrives: np.ndarray
    """[schedules, ticks, ranks, shifts]: slot for what comes that way at the end of a tick."""
    gradient_arrives: np.ndarray


class Program(NamedTuple):
    """Tables and all that is static about them."""

    tables: Tables
    ticks: tuple[int, ...]
    """Of each schedule."""
    branches: tuple[tuple[int | None, int | None], ...]
    """(kind of the stage that goes forward, kind of the one that goes backward); None for none of that."""
    output_shifts: tuple[int, ...]
    """Ways that outputs go: rank r to r + shift, modulo the ranks; 0 stays on its rank."""
    gradient_shifts: tuple[int, ...]
    slots: Slots
    chunks: int
    """Stages of a rank."""

    def shares(self, schedule: int = 0) -> tuple[list[float], list[float]]:
        """Shares of the ticks, means over ranks, that run each of `branches`; and no weights' part, and one of each
        kind of stage."""
        ticks = self.ticks[schedule]
        first, last = self.tables.branch[schedule, :ticks], self.tables.weights_kind[schedule, :ticks]
        kinds = 1 + int(self.tables.weights_kind.max())
        return ([float(np.mean(first == number)) for number in range(len(self.branches))],
                [float(np.mean(last == number)) for number in range(-1, kinds)])


class Slots(NamedTuple):
    """Of the buffers. Inputs and gradients have one more, for what nobody reads."""

    inputs: int
    gradients: int
    stash: int
    put_off: int


class _Lifetime(NamedTuple):
    """What is kept on a rank: written in one tick, read in a later one for the last time."""

    rank: int
    written: int
    read: int
    key: tuple[int, int]
    """(micro-batch, stage) of the work that reads it."""


class _Buffers(NamedTuple):
    """Slots of one schedule, by (micro-batch, stage) of the work that reads them."""

    inputs: dict[tuple[int, int], int]
    gradients: dict[tuple[int, int], int]
    stash: dict[tuple[int, int], int]
    put_off: dict[tuple[int, int], int]


def make_tables(schedules: Sequence[Schedule], kind_of_stage: Sequence[int]) -> Program:
    """Tables of checked schedules with the same ranks, and stages of these kinds.

    The first schedule says which stages a rank has. The others may use fewer of them, and must not use more.
    """
    first = schedules[0]
    held = [stages_of(first, rank) for rank in range(first.ranks)]
    cells = [on_ticks(schedule) for schedule in schedules]
    buffers = [_buffers(schedule, cell) for schedule, cell in zip(schedules, cells, strict=True)]
    slots = Slots(*(max(max(each.values(), default=-1) for each in same) + 1 for same in zip(*buffers, strict=True)))
    shifts = {step: tuple(sorted({shift for schedule in schedules for shift in _shifts(schedule, step)}))
              for step in (1, -1)}
    branches: dict[tuple[int | None, int | None], int] = {(None, None): 0}
    ticks = tuple(1 + max(tick for tick, _ in cell) for cell in cells)
    tables = _empty(len(schedules), max(ticks), first.ranks, slots, len(shifts[1]), len(shifts[-1]))
    for number, (schedule, cell, buffer) in enumerate(zip(schedules, cells, buffers, strict=True)):
        part = jax.tree.map(lambda table, n=number: table[n], tables)
        _fill(part, schedule, cell, buffer, kind_of_stage, held, branches, shifts)
    return Program(tables, ticks, tuple(branches), shifts[1], shifts[-1], slots, max(map(len, held)))


def _buffers(schedule: Schedule, cells: Cells) -> _Buffers:
    done = {(part, *work[1:]): tick for (tick, _), slot in cells.items() for work in slot
            for part in ("IW" if work.kind == "B" else work.kind)}
    every = [(m, s, route[s]) for m, route in enumerate(schedule.routes) for s in range(schedule.stages)]
    last = schedule.stages - 1
    return _Buffers(
        _slots(_Lifetime(r, done["F", m, s - 1], done["F", m, s], (m, s)) for m, s, r in every if s),
        _slots(_Lifetime(r, done["I", m, s + 1], done["I", m, s], (m, s)) for m, s, r in every if s < last),
        _slots(_Lifetime(r, done["F", m, s], done["W", m, s], (m, s)) for m, s, r in every),
        # Written before the weights' part of the same tick: as if at the end of the tick before.
        _slots(_Lifetime(r, done["I", m, s] - 1, done["W", m, s], (m, s)) for m, s, r in every))


def _empty(schedules: int, ticks: int, ranks: int, slots: Slots, output_shifts: int, gradient_shifts: int) -> Tables:
    """Tables in which nobody does anything."""
    def table(fill: int, *more: int) -> np.ndarray:
        return np.full((schedules, ticks, ranks, *more), fill, np.int16)
    return Tables(
        branch=table(0), forward_chunk=table(0), forward_micro_batch=table(0), forward_input=table(slots.inputs),
        forward_stash=table(0), backward_chunk=table(0), backward_gradient=table(slots.gradients),
        backward_stash=table(0), backward_put_off=table(0), weights_kind=table(-1),
        weights_chunk=table(0), weights_stash=table(0), weights_put_off=table(0),
        output_arrives=table(slots.inputs, output_shifts), gradient_arrives=table(slots.gradients, gradient_shifts))


def _fill(tables: Tables, schedule: Schedule, cells: Cells, slots: _Buffers, kind_of_stage: Sequence[int],
          held: Sequence[Sequence[int]], branches: dict[tuple[int | None, int | None], int],
          shifts: dict[int, tuple[int, ...]]) -> None:
    """Writes one schedule into its tables [ticks, ranks], and pairs of kinds that are new into `branches`."""
    for at, slot in cells.items():
        kinds: dict[str, int] = {}
        for work in slot:
            key, chunk, kind = work[1:], held[at[1]].index(work.stage), kind_of_stage[work.stage]
            kinds |= dict.fromkeys("IW" if work.kind == "B" else work.kind, kind)
            if work.kind == "F":
                _set(tables, at, forward_chunk=chunk, forward_micro_batch=work.micro_batch,
                     forward_stash=slots.stash[key])
                if key in slots.inputs:
                    _set(tables, at, forward_input=slots.inputs[key])
                _arrive(tables.output_arrives, schedule, work, 1, shifts[1], slots.inputs, at)
            if work.kind in "BI":
                _set(tables, at, backward_chunk=chunk, backward_stash=slots.stash[key],
                     backward_put_off=slots.put_off[key])
                if key in slots.gradients:
                    _set(tables, at, backward_gradient=slots.gradients[key])
                _arrive(tables.gradient_arrives, schedule, work, -1, shifts[-1], slots.gradients, at)
            if work.kind in "BW":
                _set(tables, at, weights_kind=kind, weights_chunk=chunk, weights_stash=slots.stash[key],
                     weights_put_off=slots.put_off[key])
        _set(tables, at, branch=branches.setdefault((kinds.get("F"), kinds.get("I")), len(branches)))


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


def _shifts(schedule: Schedule, step: int) -> set[int]:
    """Ways that outputs go (step 1), or gradients (step -1)."""
    return {(route[s + step] - route[s]) % schedule.ranks for route in schedule.routes
            for s in range(schedule.stages) if 0 <= s + step < schedule.stages}


def _arrive(arrives: np.ndarray, schedule: Schedule, work: Work, step: int, shifts: tuple[int, ...],
            slots: dict[tuple[int, int], int], at: tuple[int, int]) -> None:
    """Notes where what `work` makes goes at the end of its tick."""
    to = work.stage + step
    if 0 <= to < schedule.stages:
        target = schedule.routes[work.micro_batch][to]
        arrives[at[0], target, shifts.index((target - at[1]) % schedule.ranks)] = slots[work.micro_batch, to]
