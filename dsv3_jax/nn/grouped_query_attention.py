"""Grouped-query attention (arXiv 2305.13245) and, with one group, multi-query attention (arXiv 1911.02150).

What MLA is measured against: groups of query heads share one head of keys and values, and the cache holds those (paper
1, section 2.1.2). Query head h belongs to group h // (H / KV), as in the published models of this kind. Two more
dimension suffixes: K heads of keys and values (KV in shapes), and A the width of a head.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.mesh import TOKENS, context_size, on_each_device
from dsv3_jax.nn.attention import QUERY_CHUNK
from dsv3_jax.nn.cached_attention import cached_softmax, in_order, without_unused
from dsv3_jax.nn.causal import in_reach, over_query_chunks, sees
from dsv3_jax.nn.linear import Linear
from dsv3_jax.nn.rope import apply_rope, softmax_scale
from dsv3_jax.precision.recipe import PrecisionRecipe


class GroupedQueryAttention(nnx.Module):
    """Causal attention with `kv_heads` heads of keys and values; queries and keys are rotated as a whole."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, recipe: PrecisionRecipe = PrecisionRecipe()):
        self.config = config
        c, std = config, config.initializer_range
        query, shared = c.num_attention_heads * c.kv_head_dim, c.kv_heads * c.kv_head_dim
        self.q_proj = Linear(c.hidden_size, query, ("embed", "heads"), std, rngs, recipe.linear)
        self.k_proj = Linear(c.hidden_size, shared, ("embed", "heads"), std, rngs, recipe.linear)
        self.v_proj = Linear(c.hidden_size, shared, ("embed", "heads"), std, rngs, recipe.linear)
        self.o_proj = Linear(query, c.hidden_size, ("heads", "embed"), std, rngs, recipe.after_attention)

    def query(self, hidden_BTD: jax.Array, positions_T: jax.Array) -> jax.Array:
        """Rotated queries [B, T, H, A]."""
        return apply_rope(self._heads(self.q_proj, hidden_BTD), positions_T, self.config)

    def key_value(self, hidden_BTD: jax.Array, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a cache holds: rotated keys [B, T, KV, A] and values [B, T, KV, A]."""
        key_BTKA = apply_rope(self._heads(self.k_proj, hidden_BTD), positions_T, self.config)
        return key_BTKA, self._heads(self.v_proj, hidden_BTD)

    @jax.named_scope("attention")
    def __call__(self, hidden_BTD: jax.Array, positions_T: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]; token t attends to tokens 0..t of its row, or to the last of them (a window)."""
        chex.assert_axis_dimension(hidden_BTD, 2, self.config.hidden_size)
        query = self.query(hidden_BTD, positions_T)
        key, value = self.key_value(hidden_BTD, positions_T)
        attend = _attend_over_context if context_size() > 1 else attend_to_all
        out = attend(self.config, query, key, value)
        return self.o_proj(out.reshape(*query.shape[:2], -1), keep="attention_out")

    def _heads(self, projection: Linear, hidden_BTD: jax.Array) -> jax.Array:
        out = checkpoint_name(projection(hidden_BTD), "query_key_value")
        return out.reshape(*out.shape[:2], -1, self.config.kv_head_dim)


def attend_to_all(config: ModelConfig, query_BQHA: jax.Array, key_BTKA: jax.Array, value_BTKA: jax.Array,
                  start: jax.Array | int = 0) -> jax.Array:
    """`grouped_attention` as `config` says: its scale, its window, its chunks."""
    return grouped_attention(query_BQHA, key_BTKA, value_BTKA, softmax_scale(config), start, QUERY_CHUNK,
                             config.attention_window)


def _attend_over_context(config: ModelConfig, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`attend_to_all` where devices share a sequence: keys and values of all of it come to each device, 2*KV*A values a
    token."""
    def local(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        key, value = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (key, value))
        return attend_to_all(config, query, key, value, jax.lax.axis_index("context") * query.shape[1])
    return on_each_device(local, (TOKENS, TOKENS, TOKENS), TOKENS)(query, key, value)


@jax.named_scope("attention_core")
def grouped_attention(query_BQHA: jax.Array, key_BTKA: jax.Array, value_BTKA: jax.Array, scale: float,
                      start: jax.Array | int = 0, chunk: int = QUERY_CHUNK, window: int | None = None) -> jax.Array:
    """softmax(scale * q.k) v with a causal mask and a float32 softmax.

    Args:
      query_BQHA: [B, Q, H, A].
      key_BTKA, value_BTKA: [B, T, KV, A], KV a divisor of H.
      start, chunk, window: as of `attention.causal_attention`.

    Returns:
      [B, Q, H, A] in value's dtype.
    """
    def attend(query_BQKGA: jax.Array, start: jax.Array | int) -> jax.Array:
        (key, value), first = in_reach((key_BTKA, value_BTKA), start, query_BQKGA.shape[1], window)
        scores = jnp.einsum("bqkga,btka->bkgqt", query_BQKGA, key, preferred_element_type=jnp.float32)
        seen = sees(start + jnp.arange(scores.shape[3])[:, None], first + jnp.arange(scores.shape[4])[None, :], window)
        weights = jax.nn.softmax(jnp.where(seen, scores * scale, -jnp.inf), axis=-1)
        return jnp.einsum("bkgqt,btka->bqkga", weights.astype(value.dtype), value)
    out = over_query_chunks(attend, (_grouped(query_BQHA, key_BTKA.shape[2]),), start, chunk)
    return out.reshape(query_BQHA.shape)


@jax.named_scope("attention_core")
def cached_grouped_attention(config: ModelConfig, query_BQHA: jax.Array, entries_BNW: jax.Array,
                             positions_BQ: jax.Array, lengths_B: jax.Array,
                             held_BN: jax.Array | None = None) -> jax.Array:
    """`grouped_attention` to a cache whose entries are a token's keys followed by its values, W = 2*KV*A.

    Entries, positions, lengths and what may be NaN are as of `cached_attention.absorbed_attention`.

    Returns:
      [B, Q, H, A] in the queries' dtype; softmax in float32.
    """
    rows, capacity, _ = entries_BNW.shape
    held_BN = in_order(capacity, lengths_B) if held_BN is None else held_BN
    entries = without_unused(entries_BNW, held_BN).reshape(rows, capacity, 2, config.kv_heads, config.kv_head_dim)
    key_BNKA, value_BNKA = entries[:, :, 0], entries[:, :, 1]
    query_BQKGA = _grouped(query_BQHA, config.kv_heads)
    scores = jnp.einsum("bqkga,bnka->bkgqn", query_BQKGA, key_BNKA, preferred_element_type=jnp.float32)
    shape = scores.shape
    weights = cached_softmax(scores.reshape(rows, -1, *shape[3:]) * softmax_scale(config), positions_BQ, held_BN,
                             config.attention_window).reshape(shape)
    return jnp.einsum("bkgqn,bnka->bqkga", weights.astype(query_BQHA.dtype), value_BNKA).reshape(query_BQHA.shape)


def _grouped(query_BQHA: jax.Array, kv_heads: int) -> jax.Array:
    """[B, Q, H, A] -> [B, Q, KV, H/KV, A]."""
    batch, queries, heads, width = query_BQHA.shape
    return query_BQHA.reshape(batch, queries, kv_heads, heads // kv_heads, width)
