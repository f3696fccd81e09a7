"""Marks the part of a backward that computes gradients of weights, for pipelines that do it later (zero bubble).

A linear layer's backward passes what it needs for the weight through `later`. `split` cuts a backward there: what
depends on marked values runs in the second part, all else in the first. In a backward that nobody splits `later` does
nothing. A gradient that is there early, and is only added to what comes later, goes through `apart`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax._src.ad_util import add_jaxvals_p
from jax._src.core import gensym
from jax._src.interpreters.partial_eval import dce_jaxpr, partial_eval_jaxpr_custom
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, Var, jaxpr_as_fun
from jax.interpreters import batching, mlir, partial_eval

_marking = contextvars.ContextVar("marking", default=False)



def _mark_named(name: str) -> Primitive:
    """An operation that does nothing."""
    mark = Primitive(name)
    mark.def_impl(lambda x: x)
    mark.def_abstract_eval(lambda x: x)
    mlir.register_lowering(mark, lambda ctx, x: [x])
    batching.defvectorized(mark)
    return mark


_later, _apart = _mark_named("later"), _mark_named("apart")


def _cut(saveable: Any, unknown: Sequence[bool], available: Sequence[bool], equation: Any) -> tuple:
    """The whole equation goes to the second part; what it reads is kept for that, if the second part has not it."""
    kept = [x for x, there in zip(equation.invars, available, strict=True) if isinstance(x, Var) and not there]
    return None, equation, [True], [True], kept


partial_eval.partial_eval_jaxpr_custom_rules[_later] = _cut


def later(values: Any) -> Any:
    """The values, any tree of arrays; what is computed from them can be put off."""
    return jax.tree.map(_later.bind, values) if _marking.get() else values


def apart(gradients: Any) -> Any:
    """Parts of gradients, any tree of arrays, that the first part of a split backward gives by themselves. They must be
    added to the rest as they are."""
    return jax.tree.map(_apart.bind, gradients) if _marking.get() else gradients


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
    """What `first` gave after the early outputs, then the inputs at `reads` -> the outputs at `late`."""
    early: tuple[int, ...]
    """Which outputs those are. One may be there again, or at `late` as well: then its parts are to be added."""
    late: tuple[int, ...]
    """The outputs of the second part."""
    reads: tuple[int, ...]
    """Inputs that the second part needs."""


def split(function: Callable[..., Sequence[jax.Array]], *inputs: jax.Array | jax.ShapeDtypeStruct) -> Halves:
    """Cuts `function`, of these shapes, where it passes values through `later`."""
    with _mark(True):
        traced = jax.make_jaxpr(function)(*inputs)
    whole, owners = _with_addends(traced.jaxpr)
    none = [False] * len(inputs)
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
    is_of = list(zip(owners, is_late, strict=True))
    return Halves(first_part, second_part, tuple(owner for owner, late in is_of if not late),
                  tuple(owner for owner, late in is_of if late), tuple(places[var] for var in carried if var in places))


RECOMPUTED = ("checkpoint", "remat", "remat2")
"""What JAX calls, and has called, a function that its backward computes again."""


def _with_addends(jaxpr: Jaxpr) -> tuple[Jaxpr, list[int]]:
    """With addends that are marked as further outputs; and which output each is, or is part of.

    Raises:
      ValueError: something is marked that is not just added to an output.
    """
    extended, further = _taken_apart(jaxpr)
    if len(further) != _marks(jaxpr):
        raise ValueError("a gradient that goes through `apart` is more than an addend of an output")
    return extended, [*range(len(jaxpr.outvars)), *further]


def _taken_apart(jaxpr: Jaxpr) -> tuple[Jaxpr, list[int]]:
    """With marked addends as further outputs, and whose they are."""
    equations = list(jaxpr.eqns)
    inside: dict[Any, list[Var]] = {}  # addends that a recomputed function gives of its own
    new = gensym()
    for number, equation in enumerate(equations):
        if equation.primitive.name in RECOMPUTED:
            inner, further = _taken_apart(equation.params["jaxpr"])
            fresh = [new(var.aval) for var in inner.outvars[len(equation.outvars):]]
            for owner, var in zip(further, fresh, strict=True):
                inside.setdefault(equation.outvars[owner], []).append(var)
            equations[number] = equation.replace(outvars=[*equation.outvars, *fresh],
                                                 params={**equation.params, "jaxpr": inner})
    makers = {var: equation for equation in equations for var in equation.outvars}

    def rest_and_addends(var: Any) -> tuple[Any, list[Var]]:
        """The sum without marked addends, None if they are all; and those."""
        maker = makers.get(var) if isinstance(var, Var) else None
        if maker is None or maker.primitive not in (_apart, add_jaxvals_p):
            return var, inside.get(var, [])
        if maker.primitive is _apart:
            return None, [var]
        (one, first), (other, second) = map(rest_and_addends, maker.invars)
        if one is None or other is None:
            return (other if one is None else one), [*first, *second]
        if (one, other) == tuple(maker.invars):
            return var, [*first, *second]
        equations.append(maker.replace(invars=[one, other], outvars=[new(var.aval)]))
        return equations[-1].outvars[0], [*first, *second]
    outputs, addends, owners = [], [], []
    for place, output in enumerate(jaxpr.outvars):
        rest, own = rest_and_addends(output)
        outputs.append(output if rest is None else rest)
        addends += own if rest is not None else []
        owners += [place] * (len(own) if rest is not None else 0)
    return jaxpr.replace(eqns=equations, outvars=[*outputs, *addends],
                         debug_info=jaxpr.debug_info.with_unknown_names()), owners


def _marks(jaxpr: Jaxpr) -> int:
    return sum(_marks(equation.params["jaxpr"]) if equation.primitive.name in RECOMPUTED
               else equation.primitive is _apart for equation in jaxpr.eqns)


def _passed_on(jaxpr: Any) -> dict[Any, Any]:
    """Results of recomputed functions that are their own arguments, which partial evaluation hands through: variable ->
    where it comes from."""
    sources: dict[Any, Any] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name in RECOMPUTED:
            inner = equation.params["jaxpr"]
            arguments, inside = dict(zip(inner.invars, equation.invars, strict=True)), _passed_on(inner)
            for outer, result in zip(equation.outvars, inner.outvars, strict=True):
                if isinstance(result, Var):
                    source = arguments.get(inside.get(result, result))
                    if isinstance(source, Var):
                        sources[outer] = sources.get(source, source)
    return sources
