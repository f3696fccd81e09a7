"""Puts what a program does in an order in which every exchange has something to compute beside it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


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


STATES = 48
"""Beginnings of an arrangement that are looked into further; 250 works take a tenth of a second."""
EXCHANGES = 3
"""Of those that could be next, how many are tried."""
BESIDE = (0, 1, 2, 3, 4, 6, 9, 14)
"""How many products are tried beside an exchange."""


@functools.lru_cache(maxsize=64)
def arrange(works: tuple[Work, ...]) -> list[Part]:
    """All works in parts, none of which needs a later one.

    Looks for the largest sum of sent^(3/4) x computing^(1/4) over exchanges and what is computed beside them: something
    for everyone first, and then to each according to its bytes. A beam search over the exchanges in turn: what is left
    can add no more than (all sent)^(3/4) x (all computing)^(1/4). Products are taken in the order of their way to the
    end.
    """
    program = _Program(works)
    states = [program.start()]
    while any(state.ready for state in states):
        following = {state.done: state for state in sorted(
            (after for state in states for after in program.after(state)), key=lambda state: state.hope)}
        states = sorted(following.values(), key=lambda state: -state.hope)[:STATES]
    return max(states, key=lambda state: state.gain).all_parts()


class _State(NamedTuple):
    """A beginning."""

    done: int
    """Bits of the works."""
    ready: tuple[int, ...]
    sent: float
    """Left, as the next."""
    computing: float
    gain: float
    hope: float
    """The gain that may become of it."""
    parts: tuple
    """The last part, and the parts before it in the same way."""

    def all_parts(self) -> list[Part]:
        parts: list[Part] = []
        rest = self.parts
        while rest:
            part, rest = rest
            parts.append(part)
        return parts[::-1]


class _Program:
    def __init__(self, works: Sequence[Work]):
        self._works = works
        self._needs = [sum(1 << need for need in set(work.needs)) for work in works]
        self._after: list[list[int]] = [[] for _ in works]
        for number, work in enumerate(works):
            for need in set(work.needs):
                self._after[need].append(number)
        self._all = sum(work.computing for work in works), sum(work.sent for work in works)
        self._way = self._ways()
        self._to_exchange = self._computing_to_exchanges()

    def _ways(self) -> list[float]:
        """To the end, as if all exchanges took as long as all computing."""
        computing, sent = (max(total, 1.0) for total in self._all)
        ways = [0.0] * len(self._works)
        for number in reversed(range(len(self._works))):
            work = self._works[number]
            ways[number] = (work.computing / computing + work.sent / sent
                            + max((ways[after] for after in self._after[number]), default=0.0))
        return ways

    def _computing_to_exchanges(self) -> list[float]:
        """On the shortest way to one, itself included."""
        least = [0.0] * len(self._works)
        for number in reversed(range(len(self._works))):
            work = self._works[number]
            if not work.sent:
                least[number] = work.computing + min((least[after] for after in self._after[number]), default=math.inf)
        return least

    def start(self) -> _State:
        computing, sent = self._all
        ready = tuple(number for number, needs in enumerate(self._needs) if not needs)
        return _State(0, ready, sent, computing, 0.0, 0.0, ())

    def after(self, state: _State) -> Iterator[_State]:
        """With one more exchange, and what must be computed until there is one."""
        for product_by in (lambda number: -self._way[number], lambda number: self._to_exchange[number]):
            then = self._until_exchange(state, product_by)
            exchanges = sorted((number for number in then.ready if self._works[number].sent),
                               key=lambda number: -self._way[number])
            if not exchanges:
                yield then
            for exchange in exchanges[:EXCHANGES]:
                yield from self._beside(then, exchange)

    def _until_exchange(self, state: _State, product_by: Callable[[int], float]) -> _State:
        """Other collectives at once; products, the first by that, as long as nothing else is ready."""
        apart: list[int] = []
        done, ready, computing = state.done, list(state.ready), state.computing
        while ready:
            number = min(ready, key=self._cost_of)
            if self._cost_of(number):
                if any(self._works[each].sent for each in ready):
                    break
                number = min(ready, key=product_by)
            apart.append(number)
            computing -= self._works[number].computing
            done = self._do(number, done, ready)
        if not apart:
            return state
        return state._replace(done=done, ready=tuple(ready), computing=computing,
                              parts=(Part(None, tuple(apart)), state.parts))

    def _cost_of(self, number: int) -> float:
        return self._works[number].computing + self._works[number].sent

    def _beside(self, state: _State, exchange: int) -> Iterator[_State]:
        """With this exchange, and more and more products beside it."""
        done, ready = state.done, [number for number in state.ready if number != exchange]
        size, total = self._works[exchange].sent, 0.0
        taken: list[int] = []
        while True:
            if len(taken) in BESIDE:
                then = list(ready)
                finished = self._do(exchange, done, then)
                gain = state.gain + size ** 0.75 * total ** 0.25
                sent, computing = max(state.sent - size, 0.0), max(state.computing - total, 0.0)
                yield _State(finished, tuple(then), sent, computing, gain, gain + sent ** 0.75 * computing ** 0.25,
                             (Part(exchange, tuple(taken)), state.parts))
            products = [number for number in ready if self._works[number].computing]
            if not products or len(taken) == BESIDE[-1]:
                return
            number = max(products, key=lambda number: self._way[number])
            done = self._do(number, done, ready)
            taken.append(number)
            total += self._works[number].computing

    def _do(self, number: int, done: int, ready: list[int]) -> int:
        """Bits of what is done then; `ready` is changed."""
        done |= 1 << number
        if number in ready:
            ready.remove(number)
        ready += [after for after in self._after[number] if not self._needs[after] & ~done]
        return done
