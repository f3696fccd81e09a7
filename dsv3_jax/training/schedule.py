"""What changes from step to step, as plain functions of the position in the run (paper 2, section 4.2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from dsv3_jax.config import BatchConfig, RunConfig, ScheduleConfig


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands: what it has done so far. Python integers, so 14.8T tokens fit."""

    step: int = 0
    """Optimizer steps taken."""
    sequences: int = 0
    """Sequences read: the data position."""

    def after(self, sequences: int) -> Position:
        """The position one step of `sequences` later."""
        return Position(self.step + 1, self.sequences + sequences)


class StepSettings(NamedTuple):
    """Scalars that a step takes as arguments, so that no schedule is compiled in: floats here, arrays in the step."""

    learning_rate: Any
    bias_speed: Any
    mtp_weight: Any


def learning_rate(schedule: ScheduleConfig, step: int, share: float) -> float:
    """Warm-up by steps; then constant, cosine, floor and final rate by `share` of the run's tokens."""
    s = schedule
    if step < s.warmup_steps:
        return s.peak_learning_rate * (step + 1) / s.warmup_steps
    if share < s.constant_until or s.constant_until == 1:
        return s.peak_learning_rate
    if share < s.cosine_until:
        turn = (share - s.constant_until) / (s.cosine_until - s.constant_until)
        return s.floor_learning_rate + (s.peak_learning_rate - s.floor_learning_rate) * (1 + math.cos(
            math.pi * turn)) / 2
    return s.floor_learning_rate if share < s.floor_until else s.final_learning_rate


def settings(schedule: ScheduleConfig, step: int, share: float) -> StepSettings:
    """All scalars of the step that starts at `share` of the run's tokens."""
    return StepSettings(
        learning_rate(schedule, step, share),
        schedule.bias_speed if share < schedule.bias_until or schedule.bias_until == 1 else 0.0,
        schedule.mtp_weight if share < schedule.late_mtp_from or schedule.late_mtp_from == 1
        else schedule.late_mtp_weight)


def batch_sequences(batch: BatchConfig, sequences_done: int, total: int) -> int:
    """Sequences of the next step: a whole number of micro-batches, growing linearly with the sequences done."""
    if batch.ramp_from is None:
        return batch.sequences
    progress = min(1.0, sequences_done / (batch.ramp_until * total))
    grown = batch.ramp_from + progress * (batch.sequences - batch.ramp_from)
    return int(grown // batch.micro_batch) * batch.micro_batch


def total_sequences(config: RunConfig) -> int:
    """Sequences of the whole run, to which shares refer.

    With a ramp this is what `horizon_steps` steps read: from the shape of the ramp, which ends at ramp_until of the
    total; the mean batch on a linear ramp over n sequences is (b - a) / ln(b / a).
    """
    batch, steps = config.batch, config.horizon_steps
    if batch.ramp_from is None or batch.ramp_from == batch.sequences:
        return steps * batch.sequences
    mean = (batch.sequences - batch.ramp_from) / math.log(batch.sequences / batch.ramp_from)
    return round(steps / (batch.ramp_until / mean + (1 - batch.ramp_until) / batch.sequences))


def walk(config: RunConfig, start: Position) -> Iterator[tuple[Position, int, StepSettings]]:
    """(position, sequences, settings) of each step from `start` on."""
    total, position = total_sequences(config), start
    while position.step < config.steps:
        sequences = batch_sequences(config.batch, position.sequences, total)
        yield position, sequences, settings(config.schedule, position.step, position.sequences / total)
        position = position.after(sequences)
