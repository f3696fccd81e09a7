"""One layer's attention on its cache, for every kind of attention and for windows.

Without a window an entry lies at its position, is written first and then read with all others. With one, the cache is a
ring: position p lies at slot p % N, and what a pass writes takes the place of entries that the pass itself may still
see. So it attends to what the ring held before, beside its own tokens, and writes after that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.paged_attention import paged_attention
from dsv3_jax.inference.paged_storage import PagedStorage
from dsv3_jax.inference.storage import Storage
from dsv3_jax.nn.attention import MultiHeadLatentAttention, project_and_attend
from dsv3_jax.nn.cached_attention import absorbed_attention
from dsv3_jax.nn.grouped_query_attention import GroupedQueryAttention, attend_to_all, cached_grouped_attention

if TYPE_CHECKING:
    from dsv3_jax.inference.forward import Span


def attend(attention: MultiHeadLatentAttention | GroupedQueryAttention, normed_BQD: jax.Array, span: Span,
           storage: Storage, layer: jax.Array | int) -> tuple[jax.Array, Storage]:
    """Heads' outputs [B, Q, H, value_head_dim] for the span's tokens, and the cache with them in it."""
    positions_BQ, config = span.positions_BQ, attention.config
    parts: tuple[jax.Array, ...]
    if isinstance(attention, MultiHeadLatentAttention):
        queries, parts = attention.query(normed_BQD, positions_BQ), attention.latent(normed_BQD, positions_BQ)

        def among() -> jax.Array:
            return project_and_attend(config, attention.kv_b_proj, *queries, parts[0], parts[1])

        def cached(*entries: jax.Array) -> jax.Array:
            return absorbed_attention(attention, *queries, *entries)

        def paged(storage: PagedStorage) -> jax.Array:
            return paged_attention(attention, *queries, storage, layer, positions_BQ, span.lengths_B)
    else:
        query, parts = attention.query(normed_BQD, positions_BQ), attention.key_value(normed_BQD, positions_BQ)

        def among() -> jax.Array:
            return attend_to_all(config, query, *parts)

        def cached(*entries: jax.Array) -> jax.Array:
            return cached_grouped_attention(config, query, *entries)
    entries_BQW = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in parts], axis=-1)

    before = storage
    storage = storage.write(layer, entries_BQW, _slots(span, storage.capacity, config.attention_window is not None))
    if span.fresh:
        return among(), storage
    if isinstance(attention, MultiHeadLatentAttention) and _has_kernels(storage, config, normed_BQD.dtype):
        return paged(storage), storage
    if config.attention_window is None:
        return cached(storage.read(layer, normed_BQD.dtype), positions_BQ, span.lengths_B), storage
    entries_BNW = jnp.concatenate([before.read(layer, normed_BQD.dtype), before.rounded(entries_BQW)], axis=1)
    held_BN = jnp.concatenate([_held(span, before.capacity), jnp.where(span.real_BQ, positions_BQ, -1)], axis=1)
    return cached(entries_BNW, positions_BQ, span.lengths_B, held_BN), storage


def _has_kernels(storage: Storage, config: ModelConfig, dtype: jnp.dtype) -> TypeGuard[PagedStorage]:
    """Whether kernels read it: pages, whose values outside the 8 bits are of the activations' type, and no window."""
    return (isinstance(storage, PagedStorage) and config.attention_window is None
            and storage.arrays_LPSx[-1].dtype == dtype)


def _slots(span: Span, capacity: int, ring: bool) -> jax.Array:
    """int32 [B, Q]: where each token's entry goes, -1 for nowhere."""
    if not ring:
        return jnp.where(span.real_BQ, span.positions_BQ, -1)
    # Of tokens that would share a slot only the last is kept: the order of writes in one scatter is not defined.
    last_BQ = span.positions_BQ >= span.lengths_B[:, None] - capacity
    return jnp.where(span.real_BQ & last_BQ, span.positions_BQ % capacity, -1)


def _held(span: Span, capacity: int) -> jax.Array:
    """int32 [B, N]: the position whose entry each slot held before the span, -1 for none."""
    last_B1 = jnp.maximum(span.positions_BQ[:, :1], 0) - 1
    held_BN = last_B1 - (last_B1 - jnp.arange(capacity)) % capacity
    return jnp.maximum(held_BN, -1)
