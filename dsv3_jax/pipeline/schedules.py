"""Schedules by method. R ranks, n micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from dsv3_jax.config import ConfigError, named
from dsv3_jax.pipeline.schedule import Kind, Schedule, Slot, Work


def gpipe(ranks: int, micro_batches: int) -> Schedule:
    """All forwards, then all backwards (arXiv 1811.06965)."""
    _require(ranks >= 1 and micro_batches >= 1, "gpipe", f"ranks ({ranks}) and micro-batches ({micro_batches}) must be "
             "at least 1")
    orders = [[Work("F", m, rank) for m in range(micro_batches)] + [Work("B", m, rank) for m in range(micro_batches)]
              for rank in range(ranks)]
    return _straight("gpipe", micro_batches, orders)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """As many forwards as there are ranks ahead, then one backward after each forward (arXiv 1806.03377)."""
    _require(micro_batches >= ranks >= 1, "1f1b", f"micro-batches ({micro_batches}) must be at least the ranks "
             f"({ranks})")
    orders = []
    for rank in range(ranks):
        warm = ranks - rank - 1
        order = [Work("F", m, rank) for m in range(warm)]
        for m in range(micro_batches - warm):
            order += [Work("F", warm + m, rank), Work("B", m, rank)]
        order += [Work("B", m, rank) for m in range(micro_batches - warm, micro_batches)]
        orders.append(order)
    return _straight("1f1b", micro_batches, orders)


def zero_bubble(ranks: int, micro_batches: int) -> Schedule:
    """ZB-H1 of zero-bubble pipelines (arXiv 2401.10241), ZB1P in paper 2's table 2: as 1F1B, weights' parts put off by
    as many micro-batches as ranks precede, to where a rank would wait."""
    _require(micro_batches >= ranks >= 1, "zb1p", f"micro-batches ({micro_batches}) must be at least the ranks "
             f"({ranks})")
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
    return _straight("zb1p", micro_batches, orders)


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
    """Half of the micro-batches enter at either end, and forwards and backwards that meet on a rank run as one
    (paper 2, section 3.2.1; the order is that of DeepSeek's published DualPipe). A rank has two stages: its own, and
    that of the rank opposite.

    With h the ranks between a rank and its end, H = R / 2, and 0 the half that enters at the near end, 1 the other:
    2(H-h-1) F0; (h+1) of F0 F1; (H-h-1) of I1 W1 F1; (n/2-R+h+1) of F0&B1 F1&B0; (H-h-1) of B1 F1&B0; (h+1) of B1 B0,
    of which the second half puts its weights' part off; (H-h-1) of W I0; (h+1) W.
    """
    _require(ranks >= 2 and ranks % 2 == 0, "dualpipe", f"ranks ({ranks}) must be even: take {ranks + 1}")
    least = 2 * ranks
    _require(micro_batches % 2 == 0 and micro_batches >= least, "dualpipe",
             f"micro-batches ({micro_batches}) must be even and at least twice the ranks: take "
             f"{max(least, micro_batches + micro_batches % 2)}")
    half = micro_batches // 2
    routes = tuple(tuple(range(ranks)) if m < half else tuple(reversed(range(ranks))) for m in range(micro_batches))
    return Schedule("dualpipe", ranks, routes, tuple(_dualpipe_rank(rank, ranks, half) for rank in range(ranks)))


def _dualpipe_rank(rank: int, ranks: int, half: int) -> tuple[Slot, ...]:
    near = min(rank, ranks - 1 - rank)
    far_half, todo = rank >= ranks // 2, ranks // 2 - near - 1
    next_of: dict[tuple[str, int], int] = {}
    put_off: deque[Work] = deque()
    slots: list[Slot] = []

    def work(kind: Kind, side: int) -> Work:
        entered = side ^ far_half  # 0: at rank 0
        count = "F" if kind == "F" else "B"
        index = next_of.get((count, side), 0)
        next_of[count, side] = index + 1
        return Work(kind, entered * half + index, ranks - 1 - rank if entered else rank)

    def delayed(side: int) -> None:
        part = work("I", side)
        slots.append((part,))
        put_off.append(part._replace(kind="W"))

    slots += [(work("F", 0),) for _ in range(2 * todo)]
    for _ in range(near + 1):
        slots += [(work("F", 0),), (work("F", 1),)]
    for _ in range(todo):
        delayed(1)
        slots += [(put_off.popleft(),), (work("F", 1),)]
    for step in range(half - ranks + near + 1):
        if step == 0 and todo == 0:  # what the backward waits for comes from the rank opposite, which waits for this
            slots += [(work("F", 0),), (work("B", 1),)]
        else:
            slots.append((work("F", 0), work("B", 1)))
        slots.append((work("F", 1), work("B", 0)))
    for _ in range(todo):
        slots += [(work("B", 1),), (work("F", 1), work("B", 0))]
    for number in range(2 * (near + 1)):
        side = 1 - number % 2
        if number < near + 1:
            slots.append((work("B", side),))
        else:
            delayed(side)
    for _ in range(todo):
        slots.append((put_off.popleft(),))
        delayed(0)
    slots += [(part,) for part in put_off]
    return tuple(slots)


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    "gpipe": gpipe, "1f1b": one_f_one_b, "zb1p": zero_bubble, "dualpipe": dualpipe}


def make(name: str, ranks: int, micro_batches: int) -> Schedule:
    """The schedule of that name.

    Raises:
      ConfigError: there is none, or it cannot have these sizes; says which it can.
    """
    return named(SCHEDULES, name, "schedule")(ranks, micro_batches)


def _straight(name: str, micro_batches: int, orders: list[list[Work]]) -> Schedule:
    """One piece of work after the other, stage s on rank s."""
    ranks = len(orders)
    return Schedule(name, ranks, (tuple(range(ranks)),) * micro_batches,
                    tuple(tuple((work,) for work in order) for order in orders))


def _require(holds: bool, name: str, message: str) -> None:
    if not holds:
        raise ConfigError(f"schedule {name}: {message}")
