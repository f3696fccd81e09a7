"""Latent attention to a cache (paper 2, section 2.1.1; the absorption of projections is V2's, arXiv 2405.04434,
section 2.1.2).

An entry of the cache is a token's normed latent c^KV followed by its rotated shared key k^R: W = C + qk_rope_head_dim
values. Both paths here give the same result; the absorbed one is what decoding uses.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsv3_jax.nn.attention import MultiHeadLatentAttention
from dsv3_jax.nn.causal import sees
from dsv3_jax.nn.rope import softmax_scale


@jax.named_scope("attention_core")
def absorbed_attention(attention: MultiHeadLatentAttention, q_nope: jax.Array, q_rope: jax.Array,
                       entries_BNW: jax.Array, positions_BQ: jax.Array, lengths_B: jax.Array,
                       held_BN: jax.Array | None = None) -> jax.Array:
    """Attention in the latent space: no key or value of a cached token is ever formed.

    q^C.k^C = q^C.(W^UK c) = (W^UK^T q^C).c, so the query goes through the key half of `kv_b_proj` and meets the
    latents themselves; the weighted sum of latents goes through the value half. With one query a row that reads W
    values a token instead of H*(qk_nope_head_dim + qk_rope_head_dim + v_head_dim).

    Args:
      attention: the module whose weights these are.
      q_nope: [B, Q, H, qk_nope_head_dim]; q_rope: [B, Q, H, qk_rope_head_dim], rotated.
      entries_BNW: the cache of one layer, in the queries' dtype, this step's own tokens included.
      positions_BQ: int32, the position of each query: it sees entries up to its own.
      lengths_B: int32, entries in use. Entries from there on may hold anything, NaN too. A query that sees no entry
        is padding: its result is finite and means nothing.
      held_BN: int32, the position of each entry where they are in no order, -1 for one not in use; None: entry n is
        that of position n, and the first `lengths_B` are in use.

    Returns:
      [B, Q, H, v_head_dim] in the queries' dtype; softmax in float32.
    """
    c = attention.config
    query_BQHW = absorb(attention, q_nope, q_rope)
    held_BN = in_order(entries_BNW.shape[1], lengths_B) if held_BN is None else held_BN
    entries_BNW = without_unused(entries_BNW, held_BN)
    scores = jnp.einsum("bqhw,bnw->bhqn", query_BQHW, entries_BNW, preferred_element_type=jnp.float32)
    weights = cached_softmax(scores * softmax_scale(c), positions_BQ, held_BN, c.attention_window).astype(q_nope.dtype)
    return unabsorb(attention, jnp.einsum("bhqn,bnc->bqhc", weights, entries_BNW[..., :c.kv_lora_rank]))


def absorb(attention: MultiHeadLatentAttention, q_nope: jax.Array, q_rope: jax.Array) -> jax.Array:
    """Queries that meet entries of the cache: [B, Q, H, W]."""
    key_CHD, _ = _halves_of_up_projection(attention)
    query_BQHC = jnp.einsum("bqhd,chd->bqhc", q_nope, key_CHD, preferred_element_type=jnp.float32)
    return jnp.concatenate([query_BQHC.astype(q_nope.dtype), q_rope], axis=-1)


def unabsorb(attention: MultiHeadLatentAttention, latent_BQHC: jax.Array) -> jax.Array:
    """Weighted sums of latents -> heads' outputs [B, Q, H, v_head_dim]."""
    _, value_CHD = _halves_of_up_projection(attention)
    return jnp.einsum("bqhc,chd->bqhd", latent_BQHC, value_CHD)


def _halves_of_up_projection(attention: MultiHeadLatentAttention) -> tuple[jax.Array, jax.Array]:
    """W^UK and W^UV, [C, H, ...]."""
    c = attention.config
    up_CHD = attention.kv_b_proj.weight[...].reshape(c.kv_lora_rank, c.num_attention_heads, -1)
    key_CHD, value_CHD = jnp.split(up_CHD, [c.qk_nope_head_dim], axis=-1)
    return key_CHD, value_CHD


def projected_attention(attention: MultiHeadLatentAttention, q_nope: jax.Array, q_rope: jax.Array,
                        entries_BNW: jax.Array, positions_BQ: jax.Array, lengths_B: jax.Array,
                        held_BN: jax.Array | None = None) -> jax.Array:
    """`absorbed_attention` the plain way, by equations 2 and 5: all cached latents projected up to keys and values.

    The oracle of the other, and what costs less when queries are many and entries few.
    """
    c = attention.config
    held_BN = in_order(entries_BNW.shape[1], lengths_B) if held_BN is None else held_BN
    entries_BNW = without_unused(entries_BNW, held_BN)
    latent_BNC, k_rope = jnp.split(entries_BNW, [c.kv_lora_rank], axis=-1)
    kv = attention.kv_b_proj(latent_BNC).reshape(*latent_BNC.shape[:2], c.num_attention_heads, -1)
    k_nope, value = jnp.split(kv, [c.qk_nope_head_dim], axis=-1)
    scores = jnp.einsum("bqhd,bnhd->bhqn", q_nope, k_nope, preferred_element_type=jnp.float32)
    scores += jnp.einsum("bqhd,bnd->bhqn", q_rope, k_rope, preferred_element_type=jnp.float32)
    weights = cached_softmax(scores * softmax_scale(c), positions_BQ, held_BN, c.attention_window).astype(value.dtype)
    return jnp.einsum("bhqn,bnhd->bqhd", weights, value)


def in_order(capacity: int, lengths_B: jax.Array) -> jax.Array:
    """int32 [B, N]: positions of entries that lie in order, -1 from a row's length on."""
    entry_N = jnp.arange(capacity, dtype=jnp.int32)
    return jnp.where(entry_N < lengths_B[:, None], entry_N, -1)


def without_unused(entries_BNW: jax.Array, held_BN: jax.Array) -> jax.Array:
    """Zeros where nothing was written: a weight of zero does not silence a NaN."""
    return jnp.where((held_BN >= 0)[..., None], entries_BNW, 0)


def cached_softmax(scores_BHQN: jax.Array, positions_BQ: jax.Array, held_BN: jax.Array,
                   window: int | None) -> jax.Array:
    """Softmax over the entries that each query sees."""
    seen_BQN = (held_BN >= 0)[:, None] & sees(positions_BQ[..., None], held_BN[:, None], window)
    # The lowest number, not -inf: a query that sees nothing then averages instead of dividing zero by zero.
    lowest = jnp.finfo(scores_BHQN.dtype).min
    return jax.nn.softmax(jnp.where(seen_BQN[:, None], scores_BHQN, lowest), axis=-1)
