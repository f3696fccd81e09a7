"""Latent attention to a cache in pages, by kernels that read pages where they lie.

Few queries meet the latents themselves, many meet keys and values projected up from them: a query costs
2 (2 C + R) FLOPs a head and entry the first way and 2 (N + R + V) the second, which projects each entry once for
2 C (N + V). With DeepSeek-V3's widths they are even at 171 queries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.paged_storage import PAGES, ROWS, PagedStorage
from dsv3_jax.mesh import TOKENS, context_size, is_one_device, on_each_device
from dsv3_jax.nn.attention import MultiHeadLatentAttention
from dsv3_jax.nn.cached_attention import absorb, in_order, unabsorb, without_unused
from dsv3_jax.nn.rope import softmax_scale
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_decode import QuantizedPages, mla_decode


def projects(config: ModelConfig, queries: int) -> bool:
    """Whether so many queries of a row are cheaper by keys and values."""
    latent, both = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    return queries * (2 * latent - both) > latent * both


def paged_attention(attention: MultiHeadLatentAttention, q_nope: jax.Array, q_rope: jax.Array, storage: PagedStorage,
                    layer: jax.Array | int, positions_BQ: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """`absorbed_attention` of queries that follow each other in their row, to one layer of pages; [B, Q, H, V].

    Where devices share rows, each attends from its own stretch of the queries.
    """
    own_queries = q_nope.shape[1] if is_one_device() else q_nope.shape[1] // context_size()
    by_keys = projects(attention.config, own_queries)
    return (_to_keys if by_keys else _to_latents)(attention, q_nope, q_rope, storage, layer, positions_BQ, lengths_B)


def _to_latents(attention: MultiHeadLatentAttention, q_nope: jax.Array, q_rope: jax.Array, storage: PagedStorage,
                layer: jax.Array | int, positions_BQ: jax.Array, lengths_B: jax.Array) -> jax.Array:
    config = attention.config

    def local(query_BQHW: jax.Array, arrays: tuple[jax.Array, ...], table_BJ: jax.Array, positions_BQ: jax.Array,
              lengths_B: jax.Array, layer: jax.Array) -> jax.Array:
        # All layers' pages as one row of them: a slice of one layer would be a copy.
        flat = [array.reshape(-1, *array.shape[2:]) for array in arrays]
        pages = flat[0] if len(flat) == 1 else QuantizedPages(*flat)
        return mla_decode(query_BQHW, pages, table_BJ + layer * arrays[0].shape[1], lengths_B, positions_BQ[:, 0],
                          latent=config.kv_lora_rank, scale=softmax_scale(config)).out
    run = on_each_device(local, (TOKENS, PAGES, ROWS, TOKENS, ROWS, PartitionSpec()), TOKENS)
    return unabsorb(attention, run(absorb(attention, q_nope, q_rope), storage.arrays_LPSx, storage.table_BJ,
                                   positions_BQ, lengths_B, jnp.asarray(layer)))


def _to_keys(attention: MultiHeadLatentAttention, q_nope: jax.Array, q_rope: jax.Array, storage: PagedStorage,
             layer: jax.Array | int, positions_BQ: jax.Array, lengths_B: jax.Array) -> jax.Array:
    config = attention.config
    entries_BNW = storage.read(layer, q_nope.dtype)
    entries_BNW = without_unused(entries_BNW, in_order(entries_BNW.shape[1], lengths_B))
    graphdef, weights = nnx.split(attention.kv_b_proj)

    def local(weights: nnx.State, q_nope: jax.Array, q_rope: jax.Array, entries_BNW: jax.Array,
              positions_BQ: jax.Array, lengths_B: jax.Array) -> jax.Array:
        # Devices that share a row project all of it: keys and values would be 57 times the latents if they travelled.
        latent_BNC, k_rope = jnp.split(entries_BNW, [config.kv_lora_rank], axis=-1)
        kv = nnx.merge(graphdef, weights)(latent_BNC).reshape(*latent_BNC.shape[:2], config.num_attention_heads, -1)
        # Rows begin at positions of their own, and the engine reads few of a device in such chunks.
        rows = [mla_attention(q_nope[row:row + 1], q_rope[row:row + 1], kv[row:row + 1], k_rope[row:row + 1],
                              lengths_B[row:row + 1], positions_BQ[row, 0], scale=softmax_scale(config))
                for row in range(len(q_nope))]
        return jnp.concatenate(rows)
    run = on_each_device(local, (PartitionSpec(), TOKENS, TOKENS, ROWS, TOKENS, ROWS), TOKENS)
    return run(weights, q_nope, q_rope, entries_BNW, positions_BQ, lengths_B)
