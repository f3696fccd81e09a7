"""The oracle: every page of a row gathered, one softmax; and the forms that pages and results have.

Dimensions: B rows, Q queries of a row, H heads, R = Q * H, C the latent's width, W that of an entry; P pages in all,
S entries of a page, N pages of a row's table, L = N * S, G tiles of 128 of a latent.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = 128
"""Values of a latent that share a scale; the last tile may be shorter."""


class QuantizedPages(NamedTuple):
    """Pages whose latents are in 8 bits. For DeepSeek-V3 512 codes, 4 scales and 64 rotary values in bf16: 656 bytes an
    entry, as DeepSeek-V3.2's cache has them."""

    codes_PSC: jax.Array
    """float8_e4m3fn or int8."""
    scales_PGS: jax.Array
    """float32; those of neighbouring entries lie side by side, as vector units and copies want them."""
    rope_PSR: jax.Array
    """The rotated keys, in the queries' dtype; R or wider."""


Pages = jax.Array | QuantizedPages
"""Or [P, S, W], a latent followed by its rotated key, in the queries' dtype; W or wider."""


class Attended(NamedTuple):
    """Weighted sums of latents, and what several of them are weighted by when they are merged."""

    out: jax.Array
    """[..., C]; zeros where no entry was seen."""
    lse: jax.Array
    """float32 [...]: the natural logarithm of the sum of exponentials of the scores; -inf where no entry was seen."""


def attend(query_BRW: jax.Array, pages: Pages, table_BN: jax.Array, seen_BQ: jax.Array, latent: int,
           scale: float) -> Attended:
    """See `api.mla_decode`; rows of queries are [Q, H] made one, and see the first `seen_BQ` entries."""
    seen_BR1 = jnp.repeat(seen_BQ, query_BRW.shape[1] // seen_BQ.shape[1], axis=1)[..., None]
    entries_BLW = _gathered(pages, table_BN, query_BRW.dtype)[..., :query_BRW.shape[2]]
    entry_L = jnp.arange(entries_BLW.shape[1])
    # A weight of zero does not silence a NaN.
    entries_BLW = jnp.where(entry_L[:, None] < jnp.max(seen_BQ, axis=1)[:, None, None], entries_BLW, 0)
    scores = scale * jnp.einsum("brw,blw->brl", query_BRW, entries_BLW, preferred_element_type=jnp.float32)
    scores = jnp.where(entry_L < seen_BR1, scores, -jnp.inf)
    top = jnp.maximum(jnp.max(scores, axis=-1), jnp.finfo(jnp.float32).min)  # finite where nothing is seen
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("brl,blc->brc", weights.astype(query_BRW.dtype), entries_BLW[..., :latent],
                     preferred_element_type=jnp.float32)
    return normalised(out, top, total, query_BRW.dtype)


def normalised(out: jax.Array, top: jax.Array, total: jax.Array, dtype: jax.typing.DTypeLike) -> Attended:
    """Of a sum [..., C] whose weights exp(score - top) are `total` in all; no weight, no entry seen."""
    some = total > 0
    return Attended((out / jnp.where(some, total, 1)[..., None]).astype(dtype),
                    jnp.where(some, top + jnp.log(jnp.where(some, total, 1)), -jnp.inf))


def merge(parts: Attended, dtype: jax.typing.DTypeLike) -> Attended:
    """Attention to all entries from attention to each part of them: [K, ..., C] and [K, ...] to [..., C] and [...].

    For parts on different devices or, in the Hopper kernel, multiprocessors.
    """
    top = jnp.maximum(jnp.max(parts.lse, axis=0), jnp.finfo(jnp.float32).min)
    weights = jnp.exp(parts.lse - top)
    out = jnp.sum(weights[..., None] * parts.out.astype(jnp.float32), axis=0)
    return normalised(out, top, jnp.sum(weights, axis=0), dtype)


def _gathered(pages: Pages, table_BN: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[B, L, W]: the pages of each row one after the other; any page where the table points nowhere."""
    def take(values: jax.Array) -> jax.Array:
        taken = jnp.take(values, table_BN, axis=0, mode="clip")
        return taken.reshape(taken.shape[0], -1, taken.shape[-1])
    if not isinstance(pages, QuantizedPages):
        return take(pages).astype(dtype)
    codes, rope = take(pages.codes_PSC), take(pages.rope_PSR)
    scales = jnp.repeat(take(pages.scales_PGS.swapaxes(1, 2)), TILE, axis=-1)[..., :codes.shape[-1]]
    return jnp.concatenate([(codes.astype(jnp.float32) * scales).astype(dtype), rope.astype(dtype)], axis=-1)
