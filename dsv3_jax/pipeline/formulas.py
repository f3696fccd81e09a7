"""Bubbles and activations as published, and when the tables here have them.

PP is the number of stages and durations are those of a stage. K = PP / 2 - 1.

The tables of gpipe, 1f1b and interleaved have their formulas' bubbles on every rank, whatever the durations. Of the
others, for pairs no shorter than either half and no longer than both one after the other:

zb1p waits (PP-1) (F + I - min(W, F, I)) on every rank: the formula's where W is no longer than F and I. A longer W
fills its gaps without shortening the step any further.

dualpipe and dualpipev wait K (F&B + F - W - min(W, I)) + max(0, K (I - F) - F) on the ranks in the middle, where the
micro-batches of both sides meet, and on those beside them. The formula, K (F&B + I - 2 W), has I where the table has F.
With W no longer than I both therefore agree exactly if F = I (and with K = 0, where nobody waits). The step's longest
chain goes through forwards while ranks fill: F longer than I makes the table wait K (F - I) longer. Where I is longer
by enough, the chain through backwards while they empty takes over, which is one forward shorter: the table waits
min(F, K (I - F)) less. Further out, each rank has one pair less than its inner neighbour, does that forward and
backward one after the other, and waits F + B - F&B less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from dsv3_jax.pipeline.account import Durations
from dsv3_jax.pipeline.schedule import Schedule


class Formula(NamedTuple):
    """Of one method."""

    source: str
    text: str
    bubble: Callable[[Schedule, Durations], float]
    """With the durations of one of the schedule's stages: how long a rank waits."""
    activations: Callable[[Schedule], int]
    """Stage inputs kept by the rank that keeps most."""
    parameters: int
    """Copies that a rank holds."""


def _straight(schedule: Schedule, d: Durations) -> float:
    return (schedule.ranks - 1) * (d.forward + d.backward)


def _zero_bubble(schedule: Schedule, d: Durations) -> float:
    return (schedule.ranks - 1) * (d.forward + d.backward - 2 * d.weight_backward)


def _dual(schedule: Schedule, d: Durations) -> float:
    return (schedule.stages / 2 - 1) * (d.pair + d.backward - 3 * d.weight_backward)


def _interleaved_activations(schedule: Schedule) -> int:
    """A rank's micro-batches bound it where there are few."""
    chunks = schedule.stages // schedule.ranks
    return min(schedule.stages + schedule.ranks - 1, chunks * schedule.micro_batches)


PAPER_2, MEGATRON = "paper 2, table 2", "arXiv 2104.04473, section 2.2"
FORMULAS: dict[str, Formula] = {
    "gpipe": Formula(MEGATRON, "(PP-1)(F+B)", _straight, lambda schedule: schedule.micro_batches, 1),
    "1f1b": Formula(PAPER_2, "(PP-1)(F+B)", _straight, lambda schedule: schedule.stages, 1),
    "interleaved": Formula(MEGATRON, "(ranks-1)(F+B)", _straight, _interleaved_activations, 1),
    "zb1p": Formula(PAPER_2, "(PP-1)(F+B-2W)", _zero_bubble, lambda schedule: schedule.stages, 1),
    "dualpipe": Formula(PAPER_2, "(PP/2-1)(F&B+B-3W)", _dual, lambda schedule: schedule.stages + 1, 2),
    "dualpipev": Formula("DeepSeek's DualPipe repository", "(PP/2-1)(F&B+B-3W)", _dual,
                         lambda schedule: schedule.stages + 1, 1)}
