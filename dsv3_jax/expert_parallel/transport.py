"""How the rows of one hop get to their ranks, and their sums back."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv3_jax.config import Transport
from dsv3_jax.expert_parallel.permutation import copy_to_slots, sum_from_slots
from dsv3_jax.expert_parallel.plan import Hop
from dsv3_jax.mesh import FAST_AXES
from dsv3_jax.precision.logfmt import LogFMT
from dsv3_jax.precision.quantised import ROW, Quantised
from pallas_kernels.all_to_all_combine import all_to_all_combine
from pallas_kernels.all_to_all_dispatch import all_to_all_dispatch
from pallas_kernels.peers import Axis, Route, swap


def send_copies[Sent: (jax.Array, Quantised)](rows: Sent, hop: Hop, axis: Axis, transport: Transport) -> Sent:
    """Rows [R, ...] to slots [N * C, ...] of the ranks that the hop names; chunk n is what came from rank n.

    What is in empty slots on arrival, the plan never reads.
    """
    if _by_kernels(axis, transport):
        if isinstance(rows, Quantised):
            values, scales = all_to_all_dispatch((rows.values, rows.scales), _route(hop), axis)
            return Quantised(values, scales, ROW)  # type: ignore[return-value]  # also checked for arrays, where it is not
        return all_to_all_dispatch(rows, _route(hop), axis)
    return jax.tree.map(lambda x: exchange(copy_to_slots(x, hop.copies), hop, axis, transport), rows)


def send_copies_in_float8(rows_RD: jax.Array, hop: Hop, axis: Axis, transport: Transport) -> Quantised:
    """`send_copies` of rows cast to E4M3 with scales that are powers of two, by the kernel that sends if one does."""
    if _by_kernels(axis, transport):
        values, scales = all_to_all_dispatch(rows_RD, _route(hop), axis, wire="float8")
        return Quantised(values, scales, ROW)
    return send_copies(in_float8(rows_RD), hop, axis, transport)


def in_float8(rows_RD: jax.Array) -> Quantised:
    """As rows travel (paper 2, section 3.3.3)."""
    return Quantised.of(rows_RD, ROW, power_of_two=True)


def return_sums(slots_SD: jax.Array, hop: Hop, axis: Axis, dtype: jnp.dtype, transport: Transport,
                bits: int | None = None) -> jax.Array:
    """Slots that came by `hop` back to their ranks, and the float32 sum of each row's copies, rounded to `dtype`.

    Args:
      bits: of a number on the way, in LogFMT; no kernel adds it, so it is exchanged whole. None: in the slots' type.
    """
    back = Hop(hop.copies, hop.received_N, hop.sent_N)
    if bits is not None:
        by = "padded" if transport == "pallas" else transport
        sent = jax.tree.map(lambda x: exchange(x, back, axis, by), LogFMT.of(slots_SD, bits))
        return sum_from_slots(sent.dequantise(slots_SD.dtype), hop.copies, dtype)
    if _by_kernels(axis, transport):
        return all_to_all_combine(slots_SD, _route(hop), axis, dtype)
    return sum_from_slots(exchange(slots_SD, back, axis, transport), hop.copies, dtype)


def exchange(slots: jax.Array, hop: Hop, axis: Axis, transport: Transport) -> jax.Array:
    """[N * C, ...] -> the same shape: chunk n goes to rank n of `axis`, and what comes from rank n becomes chunk n.

    "ragged" sends the first `hop.sent_N` slots of a chunk alone, the others send whole chunks.
    """
    if transport != "ragged":
        return swap(slots, axis)
    ranks = hop.sent_N.shape[0]
    each = slots.shape[0] // ranks
    starts_N = each * jnp.arange(ranks, dtype=jnp.int32)
    at_receiver_N = jnp.full((ranks,), each * jax.lax.axis_index(axis), jnp.int32)
    return jax.lax.ragged_all_to_all(slots, jnp.zeros_like(slots), starts_N, hop.sent_N, at_receiver_N,
                                     hop.received_N, axis_name=axis)


def _by_kernels(axis: Axis, transport: Transport) -> bool:
    """Kernels reach the memory of devices that the fast network joins, and no others."""
    return transport == "pallas" and axis == FAST_AXES


def _route(hop: Hop) -> Route:
    copies = hop.copies
    source_S = jnp.where(copies.choice_S >= 0, copies.choice_S // copies.slot_RK.shape[1], -1)
    return Route(source_S, copies.slot_RK, hop.sent_N, hop.received_N)
