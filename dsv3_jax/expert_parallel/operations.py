"""A traced function as a list of operations, of which some matter: exchanges with other devices, and products."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from dsv3_jax.precision.deferral import RECOMPUTED

EXCHANGES = frozenset({"all_to_all", "ragged_all_to_all"})
TALKS = EXCHANGES | {"psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant",
                     "all_gather_reduced", "reduce_scatter", "unreduced_reduce_scatter", "ppermute"}
PRODUCTS = frozenset({"fp8_matmul", "fp8_wgrad", "grouped_fp8_matmul", "grouped_fp8_wgrad", "grouped_product",
                      "grouped_wgrad"})
"""Functions of `pallas_kernels` that are one product, whatever is inside."""
SLOW_BYTE = 4.0
"""What a byte on the slow network counts for: NVLink has 200 GB/s where a NIC has 50 (paper 1, section 4.3)."""
LEAST = 0.01
"""An exchange that sends less, as part of what the largest does, is none: scales, the plan's few integers."""

Value = int | Literal
"""A number that a line gives to what it makes, or a literal."""


class Line(NamedTuple):
    """One operation."""

    run: Callable[[Sequence[Any]], Sequence[Any]]
    reads: tuple[Value, ...]
    makes: tuple[int, ...]
    computing: float = 0.0
    """FLOPs of products, times the bytes of an operand's number: in float8 they take half the time."""
    sent: float = 0.0
    """Bytes of an exchange, see `SLOW_BYTE`; 0 for all else."""
    talks: bool = False
    """Whether there is a collective in it."""

    @property
    def matters(self) -> bool:
        return self.computing > 0 or self.talks

    def needs(self) -> list[int]:
        return [value for value in self.reads if not isinstance(value, Literal)]


class Lines(NamedTuple):
    """A function."""

    lines: list[Line]
    inputs: list[int]
    constants: dict[int, Any]
    outputs: list[Value]


def lines_of(traced: ClosedJaxpr, numbers: Iterator[int]) -> Lines:
    """Calls with exchanges inside are opened; loops and branches are not. What nobody reads is left out."""
    opened = _Opened(numbers)
    constants = dict(zip((next(numbers) for _ in traced.consts), traced.consts, strict=True))
    inputs = [next(numbers) for _ in traced.jaxpr.invars]
    outputs = opened.open(traced.jaxpr, [*constants, *inputs], source_info_util.new_name_stack())
    return Lines(_small_apart(_needed(opened.lines, outputs)), inputs, constants, outputs)


def _needed(lines: Sequence[Line], outputs: Sequence[Value]) -> list[Line]:
    read = {value for value in outputs if not isinstance(value, Literal)}
    kept: list[Line] = []
    for line in reversed(lines):
        if read.intersection(line.makes):
            kept.append(line)
            read.update(line.needs())
    return kept[::-1]


def _small_apart(lines: Sequence[Line]) -> list[Line]:
    least = LEAST * max((line.sent for line in lines), default=0.0)
    return [line if line.sent > least else line._replace(sent=0.0) for line in lines]


class _Opened:
    """Lines of a function, with calls that exchange something replaced by what they call."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self.lines: list[Line] = []
        self.numbers = numbers

    def open(self, jaxpr: Jaxpr, arguments: Sequence[Value], scope: Any) -> list[Value]:
        """What the outputs are called."""
        known: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], arguments, strict=True))

        def value(of: Any) -> Value:
            return of if isinstance(of, Literal) else known[of]
        for equation in jaxpr.eqns:
            reads = [value(of) for of in equation.invars]
            inner = _called(equation)
            if inner is None or not _has(equation, EXCHANGES):
                made: Sequence[Value] = self._line(equation, reads, scope)
            else:
                within = scope + equation.source_info.name_stack
                if equation.primitive.name in RECOMPUTED:
                    within = within.extend("checkpoint")
                    reads = self._kept_apart(equation, reads)
                constants = [self._constant(x) for x in inner.consts]
                made = self.open(inner.jaxpr, [*constants, *reads], within)
            known.update(zip(equation.outvars, made, strict=True))
        return [value(of) for of in jaxpr.outvars]

    def _line(self, equation: Any, reads: Sequence[Value], scope: Any) -> tuple[int, ...]:
        makes = tuple(next(self.numbers) for _ in equation.outvars)
        self.lines.append(Line(_runner(equation, scope), tuple(reads), makes, _computing(equation), _sent(equation),
                               _has(equation, TALKS)))
        return makes

    def _constant(self, x: Any) -> int:
        number = next(self.numbers)
        self.lines.append(Line(lambda _: [x], (), (number,)))
        return number

    def _kept_apart(self, equation: Any, reads: Sequence[Value]) -> list[Value]:
        """Else the compiler would see that what is computed again was there already."""
        if not equation.params["prevent_cse"] or not equation.params["differentiated"]:
            return list(reads)
        arrays = tuple(x for x in reads if not isinstance(x, Literal))
        makes = tuple(next(self.numbers) for _ in arrays)
        self.lines.append(Line(jax.lax.optimization_barrier, arrays, makes))
        new = dict(zip(arrays, makes, strict=True))
        return [x if isinstance(x, Literal) else new[x] for x in reads]


_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
          "custom_jvp_call": "call_jaxpr", **dict.fromkeys(RECOMPUTED, "jaxpr")}


def _called(equation: Any) -> ClosedJaxpr | None:
    """What a call calls; None for other operations."""
    name = _CALLS.get(equation.primitive.name)
    if name is None:
        return None
    inner = equation.params[name]
    return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, [])


def _inside(equation: Any) -> list[Jaxpr]:
    """Of calls, loops and branches."""
    found: list[Jaxpr] = []
    for parameter in equation.params.values():
        for inner in parameter if isinstance(parameter, (tuple, list)) else [parameter]:
            if isinstance(inner, ClosedJaxpr):
                found.append(inner.jaxpr)
            elif isinstance(inner, Jaxpr):
                found.append(inner)
    return found


def _has(equation: Any, names: frozenset[str]) -> bool:
    """Whether it, or something inside, has such a name."""
    return equation.primitive.name in names or any(_has(each, names) for inner in _inside(equation)
                                                   for each in inner.eqns)


def _runner(equation: Any, scope: Any) -> Callable[[Sequence[Any]], Sequence[Any]]:
    def run(arguments: Sequence[Any]) -> Sequence[Any]:
        bound: Any = equation.primitive.get_bind_params(equation.params)
        functions, parameters = bound if isinstance(bound, tuple) else ((), bound)  # both before jax 0.12
        info = equation.source_info
        name_stack = source_info_util.current_name_stack() + scope + info.name_stack
        with source_info_util.user_context(info.traceback, name_stack=name_stack), equation.ctx.manager:
            made = equation.primitive.bind(*functions, *arguments, **parameters)
        return made if equation.primitive.multiple_results else [made]
    return run


def _size(of: Any) -> int:
    return math.prod(of.aval.shape)


def _computing(equation: Any) -> float:
    """See `Line.computing`. A loop that nobody knows the length of counts nothing."""
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in parameters["dimension_numbers"][0][0])
        return 2.0 * contracted * _size(equation.outvars[0]) * equation.invars[0].aval.dtype.itemsize
    if parameters.get("name") in PRODUCTS:
        return _of_product([*equation.invars, *equation.outvars])
    if name == "while" or _has(equation, TALKS):  # further rounds of dispatch, of which there are none as a rule
        return 0.0
    inside = [sum(map(_computing, inner.eqns)) for inner in _inside(equation)]
    if name == "cond":
        return max(inside, default=0.0)
    return sum(inside) * parameters.get("length", 1)


def _of_product(arrays: Sequence[Any]) -> float:
    """The three largest are the operands and the result, M x K, K x N and M x N; one of them may be a stack, of whose
    matrices every row meets one."""
    largest = sorted((x for x in arrays if jnp.issubdtype(x.aval.dtype, jnp.floating)), key=_size)[-3:]
    if len(largest) < 3:  # what is left of it where nobody reads the product
        return 0.0
    sizes = [_size(x) / (x.aval.shape[0] if x.aval.ndim == 3 else 1) for x in largest]
    return 2.0 * math.sqrt(math.prod(sizes)) * min(x.aval.dtype.itemsize for x in largest)


def _sent(equation: Any) -> float:
    if equation.primitive.name not in EXCHANGES:
        return 0.0
    axes = equation.params["axis_name"]
    far = "scale_out" in (axes if isinstance(axes, (tuple, list)) else (axes,))
    return _size(equation.invars[0]) * equation.invars[0].aval.dtype.itemsize * (SLOW_BYTE if far else 1.0)
