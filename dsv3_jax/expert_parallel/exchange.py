"""Dispatch and combine: rows to their experts and back, along a plan. Each is the other's gradient.

Dispatch can carry float8 with its scales (paper 2, section 3.3.3: what is sent before the up-projection, and in the
backward before the down-projection, is E4M3 with scales that are powers of two). Combine adds in float32 at each level
and rounds to the format of the wire between them.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.config import Combine, Transport
from dsv3_jax.expert_parallel.permutation import copy_to_slots, sum_from_slots
from dsv3_jax.expert_parallel.plan import Hop, Moves, Plan
from dsv3_jax.expert_parallel.transport import in_float8, return_sums, send_copies, send_copies_in_float8
from dsv3_jax.mesh import FAST_AXES
from dsv3_jax.precision.quantised import Carried, Quantised
from pallas_kernels.peers import Axis

Rows = jax.Array | Carried
"""[P, D] in the model's type, or in float8 and with a place for their gradient."""


class Wire(NamedTuple):
    """How rows travel."""

    dispatch: Literal["plain", "float8"] = "plain"
    """In the rows' own type, or quantised once at home."""
    gradients: Literal["plain", "float8"] = "plain"
    """The same of the gradients of outputs, which the backward of `combine` dispatches."""
    combine: Combine = "plain"
    """In the outputs' own type; or all sums in float32; or in LogFMT, whose rounding counts as the identity. The
    gradients of dispatched rows too."""
    transport: Transport = "padded"


class RowBytes(NamedTuple):
    """Bytes of one row on the wire."""

    dispatch: int
    combine: int
    dispatch_gradients: int
    combine_gradients: int


def row_bytes(width: int, itemsize: int, wire: Wire) -> RowBytes:
    """Of `width` values of `itemsize` bytes where they travel plain; for 128 values a float8 row has a float32 scale, a
    LogFMT row two numbers of the plain type. The plan's own numbers and a padded transport's empty slots are not in it.
    """
    ways = {"plain": itemsize * width, "float32": 4 * width, "float8": width + 4 * -(-width // 128)}
    bits = logfmt_bits(wire.combine)
    home = ways[wire.combine] if bits is None else -(-width // 128) * (16 * bits + 2 * itemsize)
    return RowBytes(ways[wire.dispatch], home, ways[wire.gradients], home)


def logfmt_bits(combine: Combine) -> int | None:
    """Of a number on the way home; None in other formats."""
    return int(combine.removeprefix("logfmt")) if combine.startswith("logfmt") else None


@jax.named_scope("dispatch")
def dispatch(hidden_TD: jax.Array, plan: Plan, wire: Wire = Wire()) -> Rows:
    """Brings tokens to their experts. Runs where the plan was made.

    Args:
      hidden_TD: this device's tokens, [T, D].

    Returns:
      [P, D], grouped by this device's experts; padding rows are zero.
    """
    return _dispatch(hidden_TD, plan.moves, wire)


@jax.named_scope("combine")
def combine(outputs_PD: jax.Array, plan: Plan, wire: Wire = Wire()) -> jax.Array:
    """Brings the sum of the experts' outputs home: [P, D] -> float32 [T, D]. The router's weights are in them already.

    Sums are float32 at each level (device, node, home), each in the order of its choices.
    """
    return _combine(outputs_PD, plan.moves, wire)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dispatch(hidden_TD: jax.Array, moves: Moves, wire: Wire) -> Rows:
    if wire.dispatch == "plain":
        return _out(hidden_TD, moves, wire)
    return Carried.of(_out_in_float8(hidden_TD, moves, wire), hidden_TD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _combine(outputs_PD: jax.Array, moves: Moves, wire: Wire) -> jax.Array:
    return _home(outputs_PD, moves, wire)


def _dispatch_backward(wire: Wire, saved: tuple[Moves, jax.Array], grads: Rows) -> tuple[jax.Array, None]:
    moves, like = saved
    grads_PD = grads.carrier if isinstance(grads, Carried) else grads
    return _home(grads_PD, moves, wire).astype(like.dtype), None


def _combine_backward(wire: Wire, saved: tuple[Moves, jax.Array], grads_TD: jax.Array) -> tuple[jax.Array, None]:
    moves, like = saved
    grads_TD = grads_TD.astype(like.dtype)
    if wire.gradients == "plain":
        return _out(grads_TD, moves, wire), None
    # Quantised again by the product that reads it, to the same codes: a power of two times a code is exact in bf16.
    return _out_in_float8(grads_TD, moves, wire).dequantise(like.dtype), None


def _empty(x: jax.Array) -> jax.Array:
    """Nothing but a type, for the backward."""
    return jnp.zeros((0,), x.dtype)


_dispatch.defvjp(lambda hidden, moves, wire: (_dispatch(hidden, moves, wire), (moves, _empty(hidden))),
                 _dispatch_backward)
_combine.defvjp(lambda outputs, moves, wire: (_combine(outputs, moves, wire), (moves, _empty(outputs))),
                _combine_backward)


def _hops(moves: Moves) -> list[tuple[Axis, Hop]]:
    hops: list[tuple[Axis, Hop | None]] = [("scale_out", moves.node_hop), (FAST_AXES, moves.device_hop)]
    return [(axis, hop) for axis, hop in hops if hop is not None]


def _out[Sent: (jax.Array, Quantised)](rows: Sent, moves: Moves, wire: Wire, travelled: int = 0) -> Sent:
    """From home, or from where so many hops have brought them, to the experts: [R, ...] -> [P, ...] of every array."""
    for axis, hop in _hops(moves)[travelled:]:
        rows = send_copies(rows, hop, axis, wire.transport)
    return jax.tree.map(lambda x: copy_to_slots(x, moves.to_experts), rows)


def _out_in_float8(rows_TD: jax.Array, moves: Moves, wire: Wire) -> Quantised:
    """The same in float8, cast at home."""
    hops = _hops(moves)
    if not hops:
        return _out(in_float8(rows_TD), moves, wire)
    axis, hop = hops[0]
    return _out(send_copies_in_float8(rows_TD, hop, axis, wire.transport), moves, wire, travelled=1)


def _home(rows_PD: jax.Array, moves: Moves, wire: Wire) -> jax.Array:
    """From the experts home, adding copies at each level: [P, D] -> float32 [T, D]."""
    wide = jnp.dtype(jnp.float32)
    on_wire = wide if wire.combine == "float32" else rows_PD.dtype
    levels = _hops(moves)[::-1]
    rows = sum_from_slots(rows_PD, moves.to_experts, on_wire if levels else wide)
    for level, (axis, hop) in enumerate(levels, 1):
        rows = return_sums(rows, hop, axis, on_wire if level < len(levels) else wide, wire.transport,
                           logfmt_bits(wire.combine))
    return rows
