"""The plain formula, and its gradient by differentiation; long sequences go some queries at a time.

Dimensions: B rows, Q queries and T keys of a row, H heads; a key is N values of its head's own and R rotated ones that
all heads share, a value V.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

CHUNK = 512
"""Queries whose scores are in memory at once, where that divides their number; made again in the backward."""


class Operands(NamedTuple):
    """Of `api.mla_attention`; gradients have the same form."""

    q_nope: jax.Array
    """[B, Q, H, N]."""
    q_rope: jax.Array
    """[B, Q, H, R]."""
    kv: jax.Array
    """[B, T, H, N + V]."""
    k_rope: jax.Array
    """[B, T, R]."""


class Extent(NamedTuple):
    """Which keys each query sees: those up to its own position, if that is before the end of its row."""

    lengths_B: jax.Array
    start_1: jax.Array
    """The position of the first query."""

    def seen(self, row: jax.Array | int, first: jax.Array | int, query: jax.Array) -> jax.Array:
        """How many keys queries number `first + query` see."""
        position = self.start_1[0] + first + query
        return jnp.where(position < self.lengths_B[row], position + 1, 0)


def forward(operands: Operands, extent: Extent, scale: float) -> tuple[jax.Array, jax.Array]:
    """See `api.mla_attention`. Also float32 [B, H, Q]: the logarithm of the sum of exponentials of the scores."""
    q_nope, q_rope, kv, k_rope = operands
    rows, count, width = jnp.arange(q_nope.shape[0])[:, None], q_nope.shape[1], q_nope.shape[3]
    k_nope, value = jnp.split(kv, [width], axis=-1)
    key_T = jnp.arange(kv.shape[1])

    def attend(args: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q_nope, q_rope, query_Q = args
        scores = jnp.einsum("bqhd,bkhd->bhqk", q_nope, k_nope, preferred_element_type=jnp.float32)
        scores += jnp.einsum("bqhd,bkd->bhqk", q_rope, k_rope, preferred_element_type=jnp.float32)
        seen_BQT = key_T < extent.seen(rows, 0, query_Q)[..., None]
        scores = jnp.where(seen_BQT[:, None], scores * scale, -jnp.inf)
        some_BQ = seen_BQT[..., 0]
        lse = jnp.where(some_BQ[:, None], jax.nn.logsumexp(scores, axis=-1), 0)
        weights = jnp.exp(scores - lse[..., None])
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value), lse
    if count <= CHUNK or count % CHUNK:
        return attend((q_nope, q_rope, jnp.arange(count)))
    chunks = [jnp.moveaxis(x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]), 1, 0) for x in (q_nope, q_rope)]
    out, lse = jax.lax.map(jax.checkpoint(attend), (*chunks, jnp.arange(count).reshape(-1, CHUNK)))
    return (jnp.moveaxis(out, 0, 1).reshape(*q_nope.shape[:3], -1),
            jnp.moveaxis(lse, 0, 2).reshape(*lse.shape[1:3], count))


def backward(operands: Operands, extent: Extent, out: jax.Array, lse: jax.Array, dout: jax.Array,
             scale: float) -> Operands:
    """Gradients of the operands, from that of the result."""
    del out, lse
    return jax.vjp(lambda x: forward(x, extent, scale)[0], operands)[1](dout)[0]
