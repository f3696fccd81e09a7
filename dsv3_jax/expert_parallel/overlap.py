"""Functions that depend on each other in nothing, as one program: the exchanges of each beside the computing of the
others (paper 1, section 2.3.1; paper 2, section 3.2.1).

The functions are traced and cut at their exchanges, so that they need not know of this: a forward of one micro-batch
beside the backward of another, or two halves of one. The order is made explicit with barriers: nothing of one part of
the program starts before all of the part before it is done. Compilers keep to it and run what a part has side by side.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from dsv3_jax.expert_parallel.arrangement import Work, arrange
from dsv3_jax.expert_parallel.operations import Line, Lines, lines_of


class Task(NamedTuple):
    """A call."""

    function: Callable[[Any, Any], Any]
    """(weights, values) -> any tree of arrays."""
    weights: Any
    """Arrays that are there from the start, and whose readers need no order."""
    values: Any


def side_by_side(*tasks: Task) -> list[Any]:
    """What the calls give. Call where the mesh axes of exchanges are manual."""
    numbers = itertools.count()
    made: dict[int, Any] = {}
    free: set[int] = set()
    opened: list[tuple[Lines, Any]] = []
    for task in tasks:
        traced, shapes = jax.make_jaxpr(task.function, return_shape=True)(task.weights, task.values)
        opened.append((lines_of(traced, numbers), jax.tree.structure(shapes)))
        lines, weights = opened[-1][0], len(jax.tree.leaves(task.weights))
        made |= lines.constants | dict(zip(lines.inputs, jax.tree.leaves((task.weights, task.values)), strict=True))
        free.update(lines.constants, lines.inputs[:weights])
    outputs = [value for lines, _ in opened for value in lines.outputs]
    _run(_in_parts([line for lines, _ in opened for line in lines.lines]), made, free,
         {value for value in outputs if not isinstance(value, Literal)})
    return [jax.tree.unflatten(tree, [_value(made, x) for x in lines.outputs]) for lines, tree in opened]


def overlapped(function: Callable[[Any, Any], Any], keep: Callable[[Any], Any] = lambda kept: kept
               ) -> Callable[[Any, Any], Any]:
    """`function` of (weights, values), run `side_by_side` with itself, and its backward as well.

    Args:
      keep: goes over what the backward keeps, weights aside.
    """
    @jax.custom_vjp
    def run(weights: Any, values: Any) -> Any:
        return side_by_side(Task(function, weights, values))[0]

    def forward(weights: Any, values: Any) -> tuple[Any, tuple[Any, Pull]]:
        def call(weights: Any, values: Any) -> tuple[Any, Pull]:
            output, pull = jax.vjp(function, weights, values)
            return output, Pull.of(pull, jax.tree.leaves(weights))
        ((output, pull),) = side_by_side(Task(call, weights, values))
        return output, (weights, jax.tree.map(keep, pull))

    def backward(saved: tuple[Any, Pull], gradients: Any) -> Any:
        weights, pull = saved
        return side_by_side(Task(lambda weights, values: values[0](weights, values[1]), jax.tree.leaves(weights),
                                 (pull, gradients)))[0]
    run.defvjp(forward, backward)
    return run


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pull:
    """A backward, with what it keeps except weights."""

    kept: list[jax.Array]
    sources: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    tree: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, pull: Any, weights: Sequence[jax.Array]) -> Pull:
        """Of what `jax.vjp` gives. Everything is kept once, weights not at all."""
        leaves, tree = jax.tree.flatten(pull)
        places = {id(weight): place for place, weight in enumerate(weights)}
        kept: list[jax.Array] = []
        for leaf in leaves:
            if id(leaf) not in places:
                places[id(leaf)] = len(weights) + len(kept)
                kept.append(leaf)
        return cls(kept, tuple(places[id(leaf)] for leaf in leaves), tree)

    def __call__(self, weights: Sequence[jax.Array], gradients: Any) -> Any:
        """What `pull` gives for these gradients."""
        values = [*weights, *self.kept]
        return jax.tree.unflatten(self.tree, [values[source] for source in self.sources])(gradients)


def _in_parts(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines in the order in which they run, in parts that wait for each other.

    What is neither a product nor a collective runs where it is first needed; if nothing of those needs it, in the
    first part that it can, but not beside an exchange that it reads.
    """
    maker = {value: number for number, line in enumerate(lines) for value in line.makes}
    parents = [sorted({maker[value] for value in line.needs() if value in maker}) for line in lines]
    mattering = [number for number, line in enumerate(lines) if line.matters]
    place = {number: at for at, number in enumerate(mattering)}
    behind: list[frozenset[int]] = []  # of every line, what matters and it waits for
    for own in parents:
        behind.append(frozenset().union(*({place[number]} if number in place else behind[number] for number in own)))
    works = tuple(Work(lines[number].computing, lines[number].sent, tuple(sorted(behind[number])))
                  for number in mattering)
    leads = set(mattering)
    for number in reversed(range(len(lines))):
        if number in leads:
            leads.update(parents[number])
    done: set[int] = set()
    last = [number for number in range(len(lines)) if number not in leads]

    def with_parents(number: int) -> list[int]:
        if number in done:
            return []
        done.add(number)
        return [*(each for parent in parents[number] for each in with_parents(parent)), number]
    parts: list[list[Line]] = []
    finished: set[int] = set()
    for part in arrange(works):
        exchange = [] if part.exchange is None else [part.exchange]
        order = [each for at in [*exchange, *part.others] for each in with_parents(mattering[at])]
        # Not what reads the exchange: a compiler would wait for it before the products.
        finished.update(part.others)
        order += [each for number in last if number not in done and behind[number] <= finished
                  for each in with_parents(number)]
        finished.update(exchange)
        parts.append([lines[number] for number in order])
    rest = [each for number in last for each in with_parents(number)]
    return [*parts, [lines[number] for number in rest]] if rest else parts


def _run(parts: Sequence[Sequence[Line]], made: dict[int, Any], free: set[int], outputs: set[int]) -> None:
    """Adds what all lines make. Between parts all waits for all: what was made and is read later, and what the next
    part reads of anything else but weights."""
    reads = [{value for line in part for value in line.needs()} for part in parts]
    later = [outputs]
    for read in reversed(reads):
        later.insert(0, later[0] | read)
    for number, part in enumerate(parts):
        for line in part:
            made.update(zip(line.makes, line.run([_value(made, x) for x in line.reads]), strict=True))
        if number + 1 < len(parts):
            own = {value for line in part for value in line.makes}
            wanted = own & later[number + 1] | reads[number + 1] - free
            waiting = [value for value in made if value in wanted]
            made.update(zip(waiting, jax.lax.optimization_barrier([made[value] for value in waiting]), strict=True))


def _value(made: dict[int, Any], x: Any) -> Any:
    return x.val if isinstance(x, Literal) else made[x]
