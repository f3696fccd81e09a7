"""XLA's ragged exchange for machines that have it not, the CPU among them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `jax.lax.ragged_all_to_all` is documented to do, with everyone's everything at hand."""
    me = jax.lax.axis_index(axis_name)
    everyone = [jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)]
    operand_RS, start_R, size_R, at_R = everyone[0], *(x[:, me] for x in everyone[1:])
    place_S = jnp.arange(len(output))
    inside_RS = (place_S >= at_R[:, None]) & (place_S < (at_R + size_R)[:, None])
    told = jnp.sum(jnp.any(inside_RS, axis=0)) == jnp.sum(recv_sizes)
    source_S = jnp.argmax(inside_RS, axis=0)
    row_S = jnp.clip(start_R[source_S] + place_S - at_R[source_S], 0, len(output) - 1)
    hit_S = jnp.any(inside_RS, axis=0).reshape(-1, *[1] * (output.ndim - 1))
    found = jnp.where(hit_S, operand_RS[source_S, row_S], output)
    # A receiver that expects other sizes than are sent to it gets no result.
    return jnp.where(told, found.astype(jnp.float32), jnp.nan).astype(output.dtype)
