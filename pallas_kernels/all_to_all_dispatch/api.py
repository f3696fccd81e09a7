"""Picks the backend of the dispatch, and joins it to its gradient, which is a combine by the same route."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.peers import Axis, Route, names_of, ranks_of
from pallas_kernels.quantise.api import Quantised
from pallas_kernels.quantise.reference import TILE
from pallas_kernels.targets import Backend, backend_module, dispatch, platform_named

Wire = Literal["plain", "float8"]


@jax.named_scope("all_to_all_dispatch")
def all_to_all_dispatch(rows: jax.Array | Quantised, route: Route, axis: Axis, *, wire: Wire = "plain",
                        backend: Backend | None = None) -> Any:
    """Sends each row to the ranks that its route names. Runs inside a `shard_map` over `axis`.

    Args:
      rows: [R, D] of this rank; or float8 values [R, D] with scales [R, ceil(D / 128)], which are sent as they are.
      route: what goes where (`make_route`). A backend that sends by counts moves no byte of an empty slot.
      wire: "float8" casts rows on their way, as `quantise(rows, (1, 128), power_of_two=True)` does, to the bit.
      backend: None picks by the platform that the program is compiled for: TPU's or Hopper's kernel where it serves,
        else the reference, which sends empty slots too, and says so once.

    Returns:
      [S, D]: chunk n of C slots came from rank n; empty slots are zero. With the float8 wire, or for rows in float8:
      values and scales so.

    Only plain rows have a gradient. A float8 cast has none of its own: whoever casts also says what its gradient is.

    Raises:
      ValueError: slots that N does not divide, another dtype, or a problem that the named `backend` does not serve.
    """
    parts = tuple(rows) if isinstance(rows, tuple | list) else (rows,)
    problem = problem_of(parts, route, axis, wire)
    if len(parts) == 1 and wire == "plain":
        return _plain(parts[0], route, names_of(axis), backend)
    return _without_gradient(parts, route, problem, names_of(axis), backend)


def dispatch_start(rows: jax.Array | Quantised, route: Route, axis: Axis, *, wire: Wire = "plain",
                   backend: Backend | None = None) -> Any:
    """Starts an `all_to_all_dispatch`, so that compute can run while rows travel.

        in_flight = dispatch_start(rows, route, axis)
        y = compute(in_flight.before(x))         # what is to run meanwhile uses this x, which waits for the start
        slots = dispatch_wait(in_flight, after=y)  # and the wait waits for its result

    Without `before` and `after` the compiler may place compute before the start, or after the wait. On a platform that
    has no such halves, the start does it all. It has no gradient: a backward has starts and waits of its own.

    Args:
      backend: None is the kernel of the platform that the mesh names, or else of the one at hand: results of the start
        differ by platform, so the choice cannot wait until the program is compiled.
    """
    parts = tuple(rows) if isinstance(rows, tuple | list) else (rows,)
    problem, axes = problem_of(parts, route, axis, wire), names_of(axis)
    if split_backend(problem, backend) == "tpu":
        return backend_module("all_to_all_dispatch", "tpu").dispatch_start(parts, route, axes, problem.cast)
    return Done(_run(parts, route, problem, axes, backend))


def dispatch_wait(in_flight: Any, after: Any = None) -> Any:
    """The result of the `all_to_all_dispatch` that was started; it waits until `after` has been computed."""
    parts = in_flight.result if isinstance(in_flight, Done) else backend_module("all_to_all_dispatch", "tpu"
                                                                               ).dispatch_wait(in_flight, after)
    return parts if len(parts) > 1 else parts[0]


class Done(NamedTuple):
    """An exchange that was finished when it was started."""

    result: Any

    def before(self, x: Any) -> Any:
        return x


def split_backend(problem: Any, backend: Backend | None) -> Backend | None:
    """"tpu" if its kernel starts the exchange."""
    if backend is None and platform_named() == "tpu" and not problem.misfit("tpu"):
        return "tpu"
    if backend == "tpu" and (need := problem.misfit("tpu")):
        raise ValueError(f"no tpu kernel for {problem}: it needs {need}; backend=None takes one that serves")
    return backend


class Problem(NamedTuple):
    """All that the choice of a backend depends on."""

    ranks: int
    slots: int
    rows: int
    width: int
    dtype: Any
    cast: bool
    """Whether rows become float8 on their way."""
    scales: bool
    """Whether rows are float8 already, with scales."""

    def misfit(self, backend: Backend) -> str:
        """See `targets.Problem`."""
        return "" if backend == "reference" else backend_module("all_to_all_dispatch", backend).misfit(self)


def problem_of(parts: tuple[jax.Array, ...], route: Route, axis: Axis, wire: Wire) -> Problem:
    """Raises `ValueError` for what no backend takes."""
    (rows, width), ranks, slots = parts[0].shape, ranks_of(axis), route.source_S.shape[0]
    if slots % ranks or route.slot_RK.shape[0] != rows:
        raise ValueError(f"a route of {slots} slots and {route.slot_RK.shape[0]} rows does not fit {ranks} ranks along "
                         f"{axis} and rows {parts[0].shape}: slots must divide by ranks")
    if wire == "float8" and (len(parts) > 1 or parts[0].dtype not in (jnp.bfloat16, jnp.float32)):
        raise ValueError(f"the float8 wire casts bfloat16 or float32, not {[part.dtype for part in parts]}: "
                         "rows that are float8 already travel by wire='plain'")
    if len(parts) > 1 and parts[1].shape != (rows, -(-width // TILE)):
        raise ValueError(f"scales {parts[1].shape} do not fit values {parts[0].shape} in tiles of (1, {TILE})")
    return Problem(ranks, slots, rows, width, parts[0].dtype, wire == "float8", len(parts) > 1)


def _run(parts: tuple[jax.Array, ...], route: Route, problem: Problem, axis: tuple[str, ...],
         backend: Backend | None) -> tuple[jax.Array, ...]:
    def compute(name: Backend, parts: tuple[jax.Array, ...], route: Route) -> tuple[jax.Array, ...]:
        return backend_module("all_to_all_dispatch", name).dispatch(parts, route, axis, problem.cast)
    return dispatch(compute, problem, backend, parts, route)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _plain(rows_RD: jax.Array, route: Route, axis: tuple[str, ...], backend: Backend | None) -> jax.Array:
    return _run((rows_RD,), route, problem_of((rows_RD,), route, axis, "plain"), axis, backend)[0]


def _plain_backward(axis: tuple[str, ...], backend: Backend | None, route: Route,
                    grads_SD: jax.Array) -> tuple[jax.Array, None]:
    from pallas_kernels.all_to_all_combine.api import all_to_all_combine  # each is the other's gradient
    return all_to_all_combine(grads_SD, route, axis, grads_SD.dtype, backend=backend), None


_plain.defvjp(lambda rows, route, axis, backend: (_plain(rows, route, axis, backend), route), _plain_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _without_gradient(parts: tuple[jax.Array, ...], route: Route, problem: Problem, axis: tuple[str, ...],
                      backend: Backend | None) -> tuple[jax.Array, ...]:
    return _run(parts, route, problem, axis, backend)


def _no_gradient(*_: Any) -> Any:
    raise TypeError("a dispatch in float8 has no gradient: differentiate the pair of cast and product as one "
                    "(jax.custom_vjp) and send the gradient back by all_to_all_combine")


_without_gradient.defvjp(lambda *arguments: (_without_gradient(*arguments), None), _no_gradient)
