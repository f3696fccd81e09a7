"""Puts what a program does in an order in which every exchange has something to compute beside it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Work(NamedTuple):
    """A matrix product, an exchange, or another collective, which has neither cost."""

    computing: float
    sent: float
    needs: tuple[int, ...]
    """Earlier ones that must be done before it."""


class Part(NamedTuple):
    """What runs side by side."""

    exchange: int | None
    others: tuple[int, ...]
    """In an order that works. Beside an exchange they are products that do not need it; compilers have one collective
    under way at a time."""


TRIES = 500
"""Arrangements that are looked at; 200 works take a second."""
CHANGED = 0.15
"""Part of the shares that differs from those of the best arrangement so far."""
SPREAD = 30.0
"""Largest share over the fairest, and fairest over smallest."""


@functools.lru_cache(maxsize=64)
def arrange(works: tuple[Work, ...]) -> list[Part]:
    """All works in parts, none of which needs a later one.

    Looks for the largest sum of sent^(3/4) x computing^(1/4) over exchanges and what is computed beside them: something
    for everyone first, and then to each according to its bytes.
    """
    def gain(parts: Sequence[Part]) -> float:
        return sum(works[part.exchange].sent ** 0.75 * sum(works[other].computing for other in part.others) ** 0.25
                   for part in parts if part.exchange is not None)
    random = np.random.default_rng(0)
    shares = np.ones(len(works))
    best = _Arranger(works, shares).parts()
    for _ in range(TRIES if sum(work.sent > 0 for work in works) > 1 else 0):
        changed = random.random(len(works)) < CHANGED
        others = np.where(changed, SPREAD ** random.uniform(-1.0, 1.0, len(works)), shares)
        parts = _Arranger(works, others).parts()
        if gain(parts) >= gain(best):
            shares, best = others, parts
    return best


class _Arranger:
    """Takes what has the longest way to the end first. An exchange gets its share of the computing that is left, times
    a number of its own, as far as there is something that does not need it."""

    def __init__(self, works: Sequence[Work], shares: np.ndarray):
        self._works, self._shares = works, shares
        self._computing = sum(work.computing for work in works)
        self._sent = sum(work.sent for work in works)
        self._left = [len(work.needs) for work in works]
        self._after: list[list[int]] = [[] for _ in works]
        for number, work in enumerate(works):
            for need in work.needs:
                self._after[need].append(number)
        self._ready = [number for number, left in enumerate(self._left) if not left]
        self._way = self._ways()

    def _ways(self) -> list[float]:
        """To the end, as if all exchanges took as long as all computing."""
        ways = [0.0] * len(self._works)
        for number in reversed(range(len(self._works))):
            work = self._works[number]
            cost = work.computing / max(self._computing, 1.0) + work.sent / max(self._sent, 1.0)
            ways[number] = cost + max((ways[after] for after in self._after[number]), default=0.0)
        return ways

    def parts(self) -> list[Part]:
        parts: list[Part] = []
        apart: list[int] = []
        while self._ready:
            if talking := [number for number in self._ready if not self._costs(number)]:
                for number in talking:
                    self._done(number)
                apart += talking
                continue
            exchanges = [number for number in self._ready if self._works[number].sent]
            if not exchanges:
                apart.append(self._next())
                self._done(apart[-1])
                continue
            if apart:
                parts.append(Part(None, tuple(apart)))
                apart = []
            exchange = max(exchanges, key=lambda number: self._way[number])
            parts.append(Part(exchange, self._beside(exchange)))
        return [*parts, Part(None, tuple(apart))] if apart else parts

    def _costs(self, number: int) -> bool:
        return self._works[number].computing > 0 or self._works[number].sent > 0

    def _next(self) -> int:
        """The product to compute first; -1 if none is ready."""
        return max((number for number in self._ready if self._works[number].computing),
                   key=lambda number: self._way[number], default=-1)

    def _beside(self, exchange: int) -> tuple[int, ...]:
        """Computed while this exchange is under way."""
        self._ready.remove(exchange)  # what needs it is not ready before it is done
        share = self._shares[exchange] * self._computing * self._works[exchange].sent / max(self._sent, 1.0)
        taken: list[int] = []
        total = 0.0
        while (number := self._next()) >= 0:
            more = self._works[number].computing
            if taken and total + more / 2 > share:
                break
            self._done(number)
            taken.append(number)
            total += more
        self._ready.append(exchange)
        self._done(exchange)
        return tuple(taken)

    def _done(self, number: int) -> None:
        self._ready.remove(number)
        self._computing -= self._works[number].computing
        self._sent -= self._works[number].sent
        for after in self._after[number]:
            self._left[after] -= 1
            if not self._left[after]:
                self._ready.append(after)
