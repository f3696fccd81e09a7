"""What a schedule costs and moves: durations, slots by kind, stages and parameters on a rank, transfers, ticks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple

from dsv3_jax.config import ConfigError
from dsv3_jax.pipeline.schedule import Schedule, Slot, Work, kinds_of, run

KINDS = ("F", "B", "I", "W", "FB")
"""Of slots: forward, whole backward, its part for inputs, its part for weights, forward and whole backward at once."""


@dataclasses.dataclass(frozen=True)
class Durations:
    """How long a stage's work takes, in any unit of time. Called with (rank, slot), it is what `run` wants."""

    forward: float
    input_backward: float
    weight_backward: float
    pair: float
    """A forward and a whole backward that cover each other's communication: F&B."""

    @property
    def backward(self) -> float:
        """A whole one."""
        return self.input_backward + self.weight_backward

    def __call__(self, rank: int, slot: Slot) -> float:
        return {"F": self.forward, "B": self.backward, "I": self.input_backward, "W": self.weight_backward,
                "FB": self.pair}[kinds_of(slot)]

    def times(self, share: float) -> Durations:
        """Of stages of another size."""
        return Durations(*(share * seconds for seconds in dataclasses.astuple(self)))

    def checked(self) -> Durations:
        """Itself.

        Raises:
          ConfigError: one isn't positive, or a pair would be shorter than its longer half.
        """
        for name, seconds in dataclasses.asdict(self).items():
            if not seconds > 0:
                raise ConfigError(f"{name} ({seconds:g}) must be positive")
        longer = max(self.forward, self.backward)
        if self.pair < longer:
            raise ConfigError(f"pair ({self.pair:g}) must be at least the longer of a forward ({self.forward:g}) and a "
                              f"backward ({self.backward:g}): take {longer:g} or more")
        return self


UNIT = Durations(1, 1, 1, 2)
"""A whole backward is twice a forward, and covers the forward that runs with it."""


class Transfer(NamedTuple):
    """What one rank sends to another: a stage's output, or the gradient of its input."""

    content: Literal["output", "gradient"]
    micro_batch: int
    stage: int
    """That made it."""
    source: int
    target: int


class Moves(NamedTuple):
    """Transfers of a slot."""

    receives: tuple[Transfer, ...]
    """Before it starts."""
    sends: tuple[Transfer, ...]
    """When it has ended."""


def moves(schedule: Schedule) -> list[list[Moves]]:
    """[rank][slot]: what comes from other ranks before a slot and goes to others after it. Between two stages of one
    rank, and for the weights' part of a backward, nothing moves."""
    def sent(work: Work) -> list[Transfer]:
        step = {"F": 1, "B": -1, "I": -1, "W": 0}[work.kind]
        to, route = work.stage + step, schedule.routes[work.micro_batch]
        if not 0 <= to < schedule.stages or route[to] == route[work.stage]:
            return []
        return [Transfer("output" if work.kind == "F" else "gradient", work.micro_batch, work.stage,
                         route[work.stage], route[to])]

    def received(work: Work) -> list[Transfer]:
        step = {"F": -1, "B": 1, "I": 1, "W": 0}[work.kind]
        made = work._replace(stage=work.stage + step)
        return sent(made) if step and 0 <= made.stage < schedule.stages else []

    return [[Moves(tuple(move for work in slot for move in received(work)),
                   tuple(move for work in slot for move in sent(work))) for slot in slots] for slots in schedule.slots]


def slot_counts(schedule: Schedule) -> list[dict[str, int]]:
    """[rank]: slots of each of `KINDS`."""
    counts = [Counter(map(kinds_of, slots)) for slots in schedule.slots]
    return [{kind: count[kind] for kind in KINDS} for count in counts]


def stages_of(schedule: Schedule, rank: int) -> tuple[int, ...]:
    """Stages whose parameters a rank holds."""
    return tuple(sorted({work.stage for slot in schedule.slots[rank] for work in slot}))


def parameter_copies(schedule: Schedule) -> list[float]:
    """[rank]: its stages over those it would hold if no stage were on two ranks; "parameters" in paper 2's table 2."""
    return [len(stages_of(schedule, rank)) * schedule.share for rank in range(schedule.ranks)]


def bubbles(schedule: Schedule, durations: Callable[[int, Slot], float]) -> list[float]:
    """[rank]: time that it waits, from the first start of any to the last end of any."""
    timeline = run(schedule, durations)
    return [timeline.bubble(rank) for rank in range(schedule.ranks)]


def on_ticks(schedule: Schedule, ticks: Callable[[int, Slot], float] = lambda rank, slot: 1
             ) -> dict[tuple[int, int], Slot]:
    """(tick, rank) -> the slot that runs then, in each tick that it runs; a rank that waits isn't there.

    Args:
      ticks: of a slot on a rank; without it one each, as where all ranks step together.

    Raises:
      ConfigError: a slot takes no whole number of ticks, or none.
    """
    cells: dict[tuple[int, int], Slot] = {}
    for rank, row in enumerate(run(schedule, ticks).ranks):
        for slot, start, end in row:
            took = ticks(rank, slot)
            if took != int(took) or took < 1:
                raise ConfigError(f"schedule {schedule.name}: a slot {kinds_of(slot)} takes {took:g} ticks, and must "
                                  f"take a whole number: take {max(1, round(took))}")
            cells |= {(tick, rank): slot for tick in range(int(start), int(end))}
    return cells
