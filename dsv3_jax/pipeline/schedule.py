"""What a pipeline schedule is: for every rank its work in order, checked, and timed under given durations.

A model is cut into stages; a micro-batch goes through all of them forward, then backward. The backward of a stage can
be cut in two: the part that the stage before waits for, gradients of inputs, and that of weights, which nobody waits
for (zero bubble; paper 2, section 3.2.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from dsv3_jax.config import ConfigError

Kind = Literal["F", "B", "I", "W"]
"""Forward; whole backward; its part for inputs; its part for weights."""


class Work(NamedTuple):
    """One stage's part of one micro-batch."""

    kind: Kind
    micro_batch: int
    stage: int


Slot = tuple[Work, ...]
"""What a rank does at once: one piece of work, or a forward and a backward that cover each other's communication."""


class Schedule(NamedTuple):
    """Work of all ranks."""

    name: str
    stages: int
    routes: tuple[tuple[int, ...], ...]
    """routes[micro_batch][stage]: the rank that does it."""
    slots: tuple[tuple[Slot, ...], ...]
    """slots[rank]: in order."""

    @property
    def ranks(self) -> int:
        return len(self.slots)

    @property
    def micro_batches(self) -> int:
        return len(self.routes)

    @property
    def share(self) -> float:
        """A stage's part of the layers that a rank would have if each had one stage: 1 / 2 where there are two stages
        for each rank."""
        return self.ranks / self.stages


class Timed(NamedTuple):
    """When a slot runs."""

    slot: Slot
    start: float
    end: float


class Timeline(NamedTuple):
    """A schedule under given durations."""

    ranks: tuple[tuple[Timed, ...], ...]

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return max(timed.end for rank in self.ranks for timed in rank)

    def busy(self, rank: int, kinds: str | None = None) -> float:
        """Seconds that a rank works, or works at slots of these kinds: "F", "FB", ..."""
        return sum(timed.end - timed.start for timed in self.ranks[rank]
                   if kinds is None or kinds_of(timed.slot) == kinds)

    def bubble(self, rank: int) -> float:
        """Seconds that a rank waits."""
        return self.seconds - self.busy(rank)


def kinds_of(slot: Slot) -> str:
    """The kinds of its work, in order."""
    return "".join(work.kind for work in slot)


def before(schedule: Schedule, work: Work) -> list[Work]:
    """What must be done before `work`; of a backward, its part for inputs is what others wait for."""
    kind, m, stage = work
    if kind == "F":
        return [Work("F", m, stage - 1)] if stage else []
    if kind == "W":
        return [Work("I", m, stage)]
    return [Work("F", m, stage), *([Work("I", m, stage + 1)] if stage + 1 < schedule.stages else [])]


def check(schedule: Schedule, most_activations: int | None = None) -> None:
    """Raises if a schedule can't run or keeps too much.

    Args:
      most_activations: stage inputs that a rank may keep at once.

    Raises:
      ValueError: as `run`.
      ConfigError: a rank keeps more; says how many and what to allow.
    """
    run(schedule, lambda rank, slot: 1.0)
    peaks = peak_activations(schedule)
    if most_activations is not None and max(peaks) > most_activations:
        raise ConfigError(f"schedule {schedule.name}: rank {peaks.index(max(peaks))} keeps {max(peaks)} stage inputs "
                          f"at once, more than most_activations ({most_activations}): allow {max(peaks)}")


def run(schedule: Schedule, duration: Callable[[int, Slot], float], transfer: float = 0.0) -> Timeline:
    """Every slot as early as its rank and what it depends on allow.

    Args:
      duration: seconds of a slot on a rank.
      transfer: seconds from the end of a stage on one rank to where the next can begin on another.

    Raises:
      ValueError: some work is missing, done twice, done by another rank than its route says, or waits for itself.
    """
    _check_work(schedule)
    done: dict[Work, tuple[float, int]] = {}
    timed: list[list[Timed]] = [[] for _ in schedule.slots]
    waiting = set(range(schedule.ranks))
    while waiting:
        moved = [rank for rank in sorted(waiting) if _advance(schedule, rank, duration, transfer, done, timed)]
        if not moved:
            stuck = {rank: schedule.slots[rank][len(timed[rank])] for rank in sorted(waiting)}
            raise ValueError(f"{schedule.name}: ranks wait for each other: {stuck}")
        waiting = {rank for rank in waiting if len(timed[rank]) < len(schedule.slots[rank])}
    return Timeline(tuple(map(tuple, timed)))


def _advance(schedule: Schedule, rank: int, duration: Callable[[int, Slot], float], transfer: float,
             done: dict[Work, tuple[float, int]], timed: list[list[Timed]]) -> bool:
    """Runs the slots of a rank until one must wait for another rank; whether any ran."""
    began = len(timed[rank])
    for slot in schedule.slots[rank][began:]:
        needed = [need for work in slot for need in before(schedule, work)]
        if any(need not in done for need in needed):
            break
        ready = [end + transfer * (at != rank) for end, at in (done[need] for need in needed)]
        start = max([timed[rank][-1].end if timed[rank] else 0.0, *ready])
        end = start + duration(rank, slot)
        timed[rank].append(Timed(slot, start, end))
        for work in slot:
            for part in _parts(work):
                done[part] = (end, rank)
    return len(timed[rank]) > began


def _parts(work: Work) -> tuple[Work, ...]:
    """A whole backward is both of its parts."""
    return (work._replace(kind="I"), work._replace(kind="W")) if work.kind == "B" else (work,)


def _check_work(schedule: Schedule) -> None:
    seen: set[Work] = set()
    for rank, slots in enumerate(schedule.slots):
        for part in (part for slot in slots for work in slot for part in _parts(work)):
            if part in seen:
                raise ValueError(f"{schedule.name}: rank {rank} does {part} a second time")
            if not (0 <= part.micro_batch < schedule.micro_batches and 0 <= part.stage < schedule.stages):
                raise ValueError(f"{schedule.name}: rank {rank} does {part}, and there are {schedule.micro_batches} "
                                 f"micro-batches and {schedule.stages} stages")
            planned = schedule.routes[part.micro_batch][part.stage]
            if planned != rank:
                raise ValueError(f"{schedule.name}: {part} is for rank {planned}, not {rank}")
            seen.add(part)
    missing = 3 * schedule.stages * schedule.micro_batches - len(seen)
    if missing:
        raise ValueError(f"{schedule.name}: {missing} pieces of work are missing")


def peak_activations(schedule: Schedule) -> list[int]:
    """Stage inputs that each rank keeps at most: from the forward to the end of the backward, its weights' part
    included. The order alone decides it, not how long anything takes."""
    peaks = []
    for slots in schedule.slots:
        held = peak = 0
        for slot in slots:
            held += sum(work.kind == "F" for work in slot)
            peak = max(peak, held)
            held -= sum(work.kind in "BW" for work in slot)
        peaks.append(peak)
    return peaks
