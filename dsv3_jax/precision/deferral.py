"""Marks the part of a backward that computes gradients of weights, for pipelines that do it later (zero bubble).

A linear layer's backward passes what it needs for the weight through `later`. `split` cuts a backward there: what
depends on marked values runs in the second part, all else in the first. In a backward that nobody splits `later` does
nothing.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax._src.interpreters.partial_eval import dce_jaxpr, partial_eval_jaxpr_custom
from jax.extend.core import ClosedJaxpr, Primitive, Var, jaxpr_as_fun
from jax.interpreters import batching, mlir, partial_eval

_marking = contextvars.ContextVar("marking", default=False)

_later = Primitive("later")
_later.def_impl(lambda x: x)
_later.def_abstract_eval(lambda x: x)
mlir.register_lowering(_later, lambda ctx, x: [x])
batching.defvectorized(_later)


def _cut(saveable: Any, unknown: Sequence[bool], available: Sequence[bool], equation: Any) -> tuple:
    """The whole equation goes to the second part; what it reads is kept for that, if the second part has not it."""
    kept = [x for x, there in zip(equation.invars, available, strict=True) if isinstance(x, Var) and not there]
    return None, equation, [True], [True], kept


partial_eval.partial_eval_jaxpr_custom_rules[_later] = _cut


def later(values: Any) -> Any:
    """The values, any tree of arrays; what is computed from them can be put off."""
    return jax.tree.map(_later.bind, values) if _marking.get() else values


def is_split() -> bool:
    """Whether what is traced now will be cut at marks."""
    return _marking.get()


@contextlib.contextmanager
def _mark(marking: bool) -> Iterator[None]:
    token = _marking.set(marking)
    try:
        yield
    finally:
        _marking.reset(token)


def all_at_once() -> contextlib.AbstractContextManager[None]:
    """What is traced inside marks nothing: loops, which can't be cut, would run twice."""
    return _mark(False)


def _is_kept(primitive: Primitive, *operands: Any, **_: Any) -> bool:
    """Whether the second part gets what the first computed, or computes it again: constants are not worth keeping."""
    is_constant = primitive.name == "iota" or (primitive.name == "broadcast_in_dim" and operands[0].ndim == 0)
    return not is_constant


class Halves(NamedTuple):
    """A function of flat arrays in two parts."""

    first: Callable[..., list[jax.Array]]
    """All inputs -> the outputs at `early`, then what the second part needs besides inputs."""
    second: Callable[..., list[jax.Array]]
    """What `first` gave after the early outputs, then the inputs at `reads` -> the other outputs."""
    early: tuple[int, ...]
    """Outputs of the first part."""
    reads: tuple[int, ...]
    """Inputs that the second part needs."""


def split(function: Callable[..., Sequence[jax.Array]], *inputs: jax.Array | jax.ShapeDtypeStruct) -> Halves:
    """Cuts `function`, of these shapes, where it passes values through `later`."""
    with _mark(True):
        traced = jax.make_jaxpr(function)(*inputs)
    whole, none = traced.jaxpr, [False] * len(inputs)
    first, second, is_late, is_in_second, _ = partial_eval_jaxpr_custom(whole, none, none, False, False, _is_kept)
    second, read = dce_jaxpr(second, [late for late, there in zip(is_late, is_in_second, strict=True) if there])
    early = len(whole.outvars) - sum(is_late)
    passed_on = _passed_on(first)
    candidates = [passed_on.get(var, var) for var in first.outvars[early:]]
    carried = [var for var, is_read in zip(candidates, read, strict=True) if is_read]
    places = {var: index for index, var in enumerate(whole.invars)}
    from_first = [True] * early + [is_read and var not in places
                                   for var, is_read in zip(candidates, read, strict=True)]
    first, used = dce_jaxpr(first, from_first)
    run_first, run_second = (jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts)) for jaxpr in (first, second))

    def first_part(*inputs: jax.Array) -> list[jax.Array]:
        return run_first(*(x for x, is_used in zip(inputs, used, strict=True) if is_used))

    def second_part(*values: jax.Array) -> list[jax.Array]:
        made = sum(var not in places for var in carried)
        own, given = iter(values[:made]), iter(values[made:])
        return run_second(*(next(given) if var in places else next(own) for var in carried))
    return Halves(first_part, second_part, tuple(i for i, late in enumerate(is_late) if not late),
                  tuple(places[var] for var in carried if var in places))


def _passed_on(jaxpr: Any) -> dict[Any, Any]:
    """Results of recomputed functions that are their own arguments, which partial evaluation hands through: variable ->
    where it comes from."""
    sources: dict[Any, Any] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("checkpoint", "remat", "remat2"):
            inner = equation.params["jaxpr"]
            arguments, inside = dict(zip(inner.invars, equation.invars, strict=True)), _passed_on(inner)
            for outer, result in zip(equation.outvars, inner.outvars, strict=True):
                if isinstance(result, Var):
                    source = arguments.get(inside.get(result, result))
                    if isinstance(source, Var):
                        sources[outer] = sources.get(source, source)
    return sources
