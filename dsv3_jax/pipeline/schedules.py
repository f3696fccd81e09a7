"""Schedules by method. R ranks, n micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from dsv3_jax.config import ConfigError, named
from dsv3_jax.pipeline.schedule import Kind, Schedule, Slot, Work, check


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards (arXiv 1811.06965)."""
    _require_sizes("gpipe", ranks, micro_batches)
    orders = [[Work("F", m, rank) for m in range(micro_batches)] + [Work("B", m, rank) for m in range(micro_batches)]
              for rank in range(ranks)]
    return _one_by_one("gpipe", ranks, micro_batches, orders)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """As many forwards as there are ranks ahead, then one backward after each forward (arXiv 1806.03377)."""
    _require_sizes("1f1b", ranks, micro_batches)
    orders = [_one_after_one(ranks - rank - 1, [Work("F", m, rank) for m in range(micro_batches)],
                             [Work("B", m, rank) for m in range(micro_batches)]) for rank in range(ranks)]
    return _one_by_one("1f1b", ranks, micro_batches, orders)


def interleaved(ranks: int, micro_batches: int, chunks: int = 2) -> Schedule:
    """1F1B with several chunks of layers on a rank: stage s is on rank s mod R (arXiv 2104.04473, section 2.2).

    Micro-batches go in groups of R: a group through a rank's first chunk, then through its second; backward from the
    last. The last rank's first forward through its last chunk comes after (chunks - 1) R others, and each rank ahead of
    it is two pieces earlier: one for the way there, one for the way back.
    """
    _require_sizes("interleaved", ranks, micro_batches)
    if chunks < 2:
        raise ConfigError(f"schedule interleaved: chunks ({chunks}) must be at least 2: take 2, or the schedule 1f1b")

    def piece(kind: Kind, rank: int, number: int) -> Work:
        group, within = divmod(number, ranks * chunks)
        chunk, of_group = divmod(within, ranks)
        if kind == "B":
            chunk = chunks - 1 - chunk
        return Work(kind, group * ranks + of_group, chunk * ranks + rank)

    pieces = range(micro_batches * chunks)
    orders = [_one_after_one(2 * (ranks - rank - 1) + (chunks - 1) * ranks, [piece("F", rank, k) for k in pieces],
                             [piece("B", rank, k) for k in pieces]) for rank in range(ranks)]
    return _one_by_one("interleaved", ranks, micro_batches, orders, chunks)


def zero_bubble(ranks: int, micro_batches: int) -> Schedule:
    """ZB-H1 of zero-bubble pipelines (arXiv 2401.10241), ZB1P in paper 2's table 2: as 1F1B, weights' parts put off by
    as many micro-batches as ranks precede, to where a rank would wait."""
    _require_sizes("zb1p", ranks, micro_batches)
    orders = []
    for rank in range(ranks):
        warm = ranks - rank - 1
        order = [Work("F", m, rank) for m in range(warm)]
        put_off: deque[int] = deque()
        for m in range(micro_batches):
            if warm + m < micro_batches:
                order.append(Work("F", warm + m, rank))
            order.append(Work("I", m, rank))
            put_off.append(m)
            if m >= rank:
                order.append(Work("W", put_off.popleft(), rank))
        order += [Work("W", m, rank) for m in put_off]
        orders.append(order)
    return _one_by_one("zb1p", ranks, micro_batches, orders)


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
    """Half of the micro-batches enter at either end, and forwards and backwards that meet on a rank run as one
    (paper 2, section 3.2.1; the order is that of DeepSeek's published DualPipe). A rank has two stages: its own, and
    that of the rank opposite.
    """
    _require_sizes("dualpipe", ranks, micro_batches)
    half = micro_batches // 2
    there = tuple(range(ranks))
    slots = []
    for rank in range(ranks):
        far = int(rank >= ranks // 2)

        def place(side: int, index: int, rank: int = rank, far: int = far) -> tuple[int, int]:
            return (half + index, ranks - 1 - rank) if side ^ far else (index, rank)

        slots.append(_from_both_sides(min(rank, ranks - 1 - rank), ranks // 2, half, place))
    return Schedule("dualpipe", ranks, (there,) * half + (there[::-1],) * half, tuple(slots))


def dualpipev(ranks: int, micro_batches: int) -> Schedule:
    """DualPipe cut in half (DeepSeek's DualPipe repository): the first half of DualPipe's ranks, each of which has its
    own stage and, of 2 R, the one as far from the end. A micro-batch goes down the ranks and comes back up, a V, so all
    enter at rank 0, and what entered DualPipe at the other end is what turned round at the last rank. No parameters are
    kept twice."""
    _require_sizes("dualpipev", ranks, micro_batches)
    down = tuple(range(ranks))
    slots = []
    for rank in down:
        def place(side: int, index: int, rank: int = rank) -> tuple[int, int]:
            return index, 2 * ranks - 1 - rank if side else rank

        slots.append(_from_both_sides(rank, ranks, micro_batches, place))
    return Schedule("dualpipev", 2 * ranks, ((*down, *down[::-1]),) * micro_batches, tuple(slots))


def _from_both_sides(from_end: int, depth: int, each: int, place: Callable[[int, int], tuple[int, int]]
                     ) -> tuple[Slot, ...]:
    """The order of one rank that micro-batches reach from two sides.

    With h = from_end, the ranks between this one and the end, H = depth, of which h may be 0 to H - 1, n = 2 * each,
    and 0 the side that enters at the near end, 1 the other: 2(H-h-1) F0; (h+1) of F0 F1; (H-h-1) of I1 W1 F1;
    (n/2-2H+h+1) of F0&B1 F1&B0; (H-h-1) of B1 F1&B0; (h+1) of B1 B0, of which the second half puts its weights' part
    off; (H-h-1) of W I0; (h+1) W.

    Args:
      place: (side, number there) -> (micro-batch, stage).
    """
    ahead = depth - from_end - 1
    next_of: dict[tuple[bool, int], int] = {}
    put_off: deque[Work] = deque()
    slots: list[Slot] = []

    def work(kind: Kind, side: int) -> Work:
        index = next_of.get((kind == "F", side), 0)
        next_of[kind == "F", side] = index + 1
        return Work(kind, *place(side, index))

    def put_weights_off(side: int) -> None:
        part = work("I", side)
        slots.append((part,))
        put_off.append(part._replace(kind="W"))

    slots += [(work("F", 0),) for _ in range(2 * ahead)]
    for _ in range(from_end + 1):
        slots += [(work("F", 0),), (work("F", 1),)]
    for _ in range(ahead):
        put_weights_off(1)
        slots += [(put_off.popleft(),), (work("F", 1),)]
    for step in range(each - 2 * depth + from_end + 1):
        if step == 0 and ahead == 0:  # the backward waits for the stage after it, which waits for this forward
            slots += [(work("F", 0),), (work("B", 1),)]
        else:
            slots.append((work("F", 0), work("B", 1)))
        slots.append((work("F", 1), work("B", 0)))
    for _ in range(ahead):
        slots += [(work("B", 1),), (work("F", 1), work("B", 0))]
    for number in range(2 * (from_end + 1)):
        side = 1 - number % 2
        if number <= from_end:
            slots.append((work("B", side),))
        else:
            put_weights_off(side)
    for _ in range(ahead):
        slots.append((put_off.popleft(),))
        put_weights_off(0)
    return (*slots, *((part,) for part in put_off))


class Method(NamedTuple):
    """How to make a schedule, and of which sizes."""

    make: Callable[..., Schedule]
    rank_multiple: int
    """Ranks must be a multiple of this."""
    least: Callable[[int], int]
    """Ranks -> the fewest micro-batches."""
    multiple: Callable[[int], int]
    """Ranks -> what micro-batches must be a multiple of."""
    micro_batches: str
    """Both in words, with the ranks as {ranks}."""


SCHEDULES: dict[str, Method] = {
    "gpipe": Method(gpipe, 1, lambda ranks: 1, lambda ranks: 1, "at least 1"),
    "1f1b": Method(one_f_one_b, 1, lambda ranks: ranks, lambda ranks: 1, "at least the ranks ({ranks})"),
    "interleaved": Method(interleaved, 1, lambda ranks: ranks, lambda ranks: ranks, "a positive multiple of the ranks "
                          "({ranks})"),
    "zb1p": Method(zero_bubble, 1, lambda ranks: ranks, lambda ranks: 1, "at least the ranks ({ranks})"),
    "dualpipe": Method(dualpipe, 2, lambda ranks: 2 * ranks, lambda ranks: 2, "even and at least twice the ranks "
                       "({ranks})"),
    "dualpipev": Method(dualpipev, 1, lambda ranks: 2 * ranks, lambda ranks: 1, "at least twice the ranks ({ranks})")}


def fitting_sizes(name: str, ranks: int, micro_batches: int) -> tuple[int, int]:
    """The smallest (ranks, micro-batches) that the method takes and that are no smaller than these.

    Raises:
      ConfigError: there is no such method.
    """
    method = named(SCHEDULES, name, "schedule")
    ranks = _multiple(max(ranks, 1), method.rank_multiple)
    return ranks, _multiple(max(micro_batches, method.least(ranks)), method.multiple(ranks))


def make(name: str, ranks: int, micro_batches: int, *, chunks: int | None = None, most_activations: int | None = None
         ) -> Schedule:
    """The schedule of that name, checked.

    Args:
      chunks: of layers on a rank, for interleaved alone; 2 if not told.
      most_activations: stage inputs that a rank may keep at once.

    Raises:
      ConfigError: there is none, it can't have these sizes (says which it can), it has no chunks, or it keeps more.
    """
    method = named(SCHEDULES, name, "schedule")
    if chunks is not None and name != "interleaved":
        raise ConfigError(f"schedule {name}: chunks ({chunks}) are for interleaved alone: leave them out")
    schedule = method.make(ranks, micro_batches) if chunks is None else method.make(ranks, micro_batches, chunks)
    check(schedule, most_activations)
    return schedule


def with_fewer_put_off(schedule: Schedule, most: int) -> Schedule:
    """The schedule where no rank puts the weights' part of more than `most` backwards off at once: what would be one
    more is a whole backward. Less is kept, and ranks wait longer."""
    ranks: list[tuple[Slot, ...]] = []
    for slots in schedule.slots:
        put_off: set[tuple[int, int]] = set()
        whole: set[tuple[int, int]] = set()
        kept: list[Slot] = []
        for slot in slots:
            new: list[Work] = []
            for work in slot:
                key = (work.micro_batch, work.stage)
                if work.kind == "I" and len(put_off) >= most:
                    whole.add(key)
                    work = work._replace(kind="B")
                elif work.kind == "I":
                    put_off.add(key)
                elif work.kind == "W" and key in whole:
                    continue
                put_off -= {key} if work.kind == "W" else set()
                new.append(work)
            kept += [tuple(new)] if new else []
        ranks.append(tuple(kept))
    fewer = schedule._replace(slots=tuple(ranks))
    check(fewer)
    return fewer


def _multiple(number: int, of: int) -> int:
    """The least multiple that is no less."""
    return -(-number // of) * of


def _one_after_one(warm: int, forwards: list[Work], backwards: list[Work]) -> list[Work]:
    """`warm` forwards, then a forward and a backward in turn, then what backwards are left."""
    warm = min(warm, len(forwards))
    in_turn = [work for pair in zip(forwards[warm:], backwards, strict=False) for work in pair]
    return [*forwards[:warm], *in_turn, *backwards[len(forwards) - warm:]]


def _one_by_one(name: str, ranks: int, micro_batches: int, orders: list[list[Work]], chunks: int = 1) -> Schedule:
    """One piece of work after the other, stage s on rank s mod R."""
    return Schedule(name, ranks * chunks, (tuple(range(ranks)) * chunks,) * micro_batches,
                    tuple(tuple((work,) for work in order) for order in orders))


def _require_sizes(name: str, ranks: int, micro_batches: int) -> None:
    """Raises ConfigError for sizes that the method doesn't take: what they must be, and the nearest that are."""
    fitting_ranks, fitting = fitting_sizes(name, ranks, micro_batches)
    if ranks != fitting_ranks:
        must = "even" if ranks > 0 else f"at least {fitting_ranks}"
        raise ConfigError(f"schedule {name}: ranks ({ranks}) must be {must}: take {fitting_ranks}")
    if micro_batches != fitting:
        must = SCHEDULES[name].micro_batches.format(ranks=ranks)
        raise ConfigError(f"schedule {name}: micro-batches ({micro_batches}) must be {must}: take {fitting}")
