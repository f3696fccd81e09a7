"""What a token may see, and how long sequences go chunk by chunk; shared by every kind of attention."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def sees(query: jax.Array, key: jax.Array, window: int | None) -> jax.Array:
    """bool: whether a query at one position attends to a key at another. Both int, broadcast against each other.

    A query sees keys up to its own; with a window only the last `window` of them, its own included.
    """
    past = query >= key
    return past if window is None else past & (key > query - window)


def in_reach(keys: tuple[jax.Array, ...], start: jax.Array | int, queries: int,
             window: int | None) -> tuple[tuple[jax.Array, ...], jax.Array | int]:
    """What `queries` from position `start` on can see of arrays [B, T, ...], and the position of the first of it.

    A window makes this `queries + window - 1` long, so that neither time nor memory grows with T.
    """
    length = keys[0].shape[1]
    if window is None or queries + window - 1 >= length:
        return keys, 0
    reach = queries + window - 1
    first = jnp.clip(start - window + 1, 0, length - reach)
    return tuple(jax.lax.dynamic_slice_in_dim(x, first, reach, axis=1) for x in keys), first


def over_query_chunks(attend: Callable[..., jax.Array], queries: tuple[jax.Array, ...], start: jax.Array | int,
                      chunk: int) -> jax.Array:
    """`attend(*queries, start)` of arrays [B, Q, ...], at most `chunk` queries at once where that divides Q; scores are
    computed again in the backward."""
    count = queries[0].shape[1]
    if count <= chunk or count % chunk:
        return attend(*queries, start)

    def chunks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], count // chunk, chunk, *x.shape[2:]), 1, 0)

    out = jax.lax.map(jax.checkpoint(lambda args: attend(*args)),
                      (*map(chunks, queries), start + chunk * jnp.arange(count // chunk)))
    return jnp.moveaxis(out, 0, 1).reshape(out.shape[1], count, *out.shape[3:])
