"""Picks the backend of the combine, and joins it to its gradient, which is a dispatch by the same route."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.all_to_all_dispatch.api import Done, all_to_all_dispatch, split_backend
from pallas_kernels.peers import Axis, Route, names_of, ranks_of, swap
from pallas_kernels.targets import Backend, backend_module, dispatch


@jax.named_scope("all_to_all_combine")
def all_to_all_combine(slots_SD: jax.Array, route: Route, axis: Axis, dtype: jax.typing.DTypeLike | None = None, *,
                       weights_RK: jax.Array | None = None, backend: Backend | None = None) -> jax.Array:
    """Sends slots back where a dispatch brought them from, and adds up each row's copies. Runs inside a `shard_map`.

    Args:
      slots_SD: [S, D] as the dispatch by this route delivered them: chunk n goes back to rank n. What is in empty slots
        does not matter, NaN included.
      route: that of the dispatch.
      dtype: of the result; None is that of the slots.
      weights_RK: float32 [R, K], what each copy is multiplied by at home; None is one.
      backend: as in `all_to_all_dispatch`.

    Returns:
      [R, D]: row r is the float32 sum, in the order k = 0 .. K-1, of the returned slots route.slot_RK[r, k], rounded
      once; -1 adds nothing. On a platform where XLA or the kernel joins a multiplication with the addition after it,
      weighted sums differ from others in the last place of float32; sums without weights are the same to the bit.

    Raises:
      ValueError: slots that are not the route's, or a problem that the named `backend` does not serve.
    """
    problem = _problem_of(slots_SD, route, weights_RK, axis, dtype)
    return _combine(slots_SD, weights_RK, route, names_of(axis), problem.result, backend)


def combine_start(slots_SD: jax.Array, route: Route, axis: Axis, dtype: jax.typing.DTypeLike | None = None, *,
                  weights_RK: jax.Array | None = None, backend: Backend | None = None) -> Any:
    """Starts an `all_to_all_combine`, as `dispatch_start` does a dispatch: rows travel, the sum is made by the wait."""
    problem, axes = _problem_of(slots_SD, route, weights_RK, axis, dtype), names_of(axis)
    if split_backend(problem, backend) == "tpu":
        return backend_module("all_to_all_combine", "tpu").combine_start(slots_SD, route, weights_RK, axes,
                                                                         problem.result)
    return Done(_combine(slots_SD, weights_RK, route, axes, problem.result, backend))


def combine_wait(in_flight: Any, after: Any = None) -> jax.Array:
    """The result of the `all_to_all_combine` that was started; it waits until `after` has been computed."""
    if isinstance(in_flight, Done):
        return in_flight.result
    return backend_module("all_to_all_combine", "tpu").combine_wait(in_flight, after)


class Problem(NamedTuple):
    """All that the choice of a backend depends on."""

    ranks: int
    slots: int
    rows: int
    copies: int
    width: int
    dtype: Any
    result: Any
    weighted: bool

    def misfit(self, backend: Backend) -> str:
        """See `targets.Problem`."""
        return "" if backend == "reference" else backend_module("all_to_all_combine", backend).misfit(self)


def _problem_of(slots_SD: jax.Array, route: Route, weights_RK: jax.Array | None, axis: Axis,
                dtype: jax.typing.DTypeLike | None) -> Problem:
    """Raises `ValueError` for what no backend takes."""
    (slots, width), (rows, copies), ranks = slots_SD.shape, route.slot_RK.shape, ranks_of(axis)
    if slots != route.source_S.shape[0] or slots % ranks:
        raise ValueError(f"{slots} slots do not fit the route's {route.source_S.shape[0]} over {ranks} ranks along "
                         f"{axis}")
    result = jnp.dtype(slots_SD.dtype if dtype is None else dtype)
    return Problem(ranks, slots, rows, copies, width, slots_SD.dtype, result, weights_RK is not None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _combine(slots_SD: jax.Array, weights_RK: jax.Array | None, route: Route, axis: tuple[str, ...], dtype: jnp.dtype,
             backend: Backend | None) -> jax.Array:
    problem = _problem_of(slots_SD, route, weights_RK, axis, dtype)

    def compute(name: Backend, slots_SD: jax.Array, weights_RK: jax.Array | None, route: Route) -> jax.Array:
        return backend_module("all_to_all_combine", name).combine(slots_SD, route, weights_RK, axis, dtype)
    return dispatch(compute, problem, backend, slots_SD, weights_RK, route)


def _forward(slots_SD, weights_RK, route, axis, dtype, backend):
    out = _combine(slots_SD, weights_RK, route, axis, dtype, backend)
    # Without weights only the slots' dtype matters, so that they need not be kept.
    return out, (slots_SD if weights_RK is not None else jnp.zeros((), slots_SD.dtype), weights_RK, route)


def _backward(axis, dtype, backend, saved, grads_RD):
    slots_SD, weights_RK, route = saved
    grads_SD = all_to_all_dispatch(grads_RD.astype(slots_SD.dtype), route, axis, backend=backend)
    if weights_RK is None:
        return grads_SD, None, None
    # Weights visit their slots, one number each, and their gradients come home, so that no row makes a further trip.
    weights_S = swap(_to_slots(weights_RK, route), axis)
    grads_SD = grads_SD.astype(jnp.float32)
    used_S1 = swap((route.source_S >= 0).astype(jnp.int32), axis)[:, None] > 0
    products_SD = jnp.where(used_S1, grads_SD * slots_SD.astype(jnp.float32), 0)
    home_S = swap(jnp.sum(products_SD, axis=1), axis)
    d_weights_RK = jnp.where(route.slot_RK >= 0, home_S[jnp.maximum(route.slot_RK, 0)], 0)
    return (grads_SD * weights_S[:, None]).astype(slots_SD.dtype), d_weights_RK.astype(weights_RK.dtype), None


_combine.defvjp(_forward, _backward)


def _to_slots(weights_RK: jax.Array, route: Route) -> jax.Array:
    """[R, K] -> float32 [S]: the weight of the copy that each slot carries, zero for empty ones."""
    row_S = jnp.maximum(route.source_S, 0)
    carried_SK = (route.slot_RK[row_S] == jnp.arange(row_S.shape[0])[:, None]) & (route.source_S[:, None] >= 0)
    return jnp.sum(jnp.where(carried_SK, weights_RK[row_S], 0), axis=1, dtype=jnp.float32)
