"""Attention at the shapes of DeepSeek-V3: 128 heads, entries of 512 + 64 values in pages of 64, keys of 128 + 64.

Oracle and rival are plain JAX, the one in float32, the other as it would be without the kernels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.benchmark.case import Case, OperationName
from pallas_kernels.benchmark.rivals import Rival
from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.mla_decode import QuantizedPages, mla_decode
from pallas_kernels.quantise import quantise
from pallas_kernels.targets import Backend

HEADS, LATENT, ROPE, NOPE, VALUE, PAGE = 128, 512, 64, 128, 128, 64
SCALE = (NOPE + ROPE) ** -0.5


def decode(rows: int, tokens: int, queries: int = 1, heads: int = HEADS, float8: bool = False,
           latent: int = LATENT) -> Case:
    """A step of decoding, or of verifying drafts, whose pages lie in any order."""
    count = rows * tokens // PAGE
    run = functools.partial(_decode, float8=float8, latent=latent)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        for_query, for_pages, for_table = jax.random.split(key, 3)
        query = jax.random.normal(for_query, (rows, queries, heads, latent + ROPE), jnp.bfloat16)
        # On a TPU the last dimension takes whole lanes of 128 in any case, and otherwise XLA copies the pages.
        lanes = 128 if jax.default_backend() == "tpu" else 1
        wide = -(-(latent + ROPE) // lanes) * lanes
        pages = jax.random.normal(for_pages, (count, PAGE, wide), jnp.bfloat16)
        table = jax.random.permutation(for_table, count).reshape(rows, -1).astype(jnp.int32)
        lengths = jnp.full((rows,), tokens, jnp.int32)
        if not float8:
            return query, table, lengths, pages
        codes, scales = quantise(pages[..., :latent].astype(jnp.float32), (1, 128), backend="reference")
        return query, table, lengths, codes, scales.swapaxes(1, 2), pages[..., latent:]

    def oracle(query: jax.Array, table: jax.Array, lengths: jax.Array, *pages: jax.Array) -> jax.Array:
        held = (page.astype(jnp.float32) if page.dtype == jnp.bfloat16 else page for page in pages)
        return run(query.astype(jnp.float32), table, lengths, *held, backend="reference")
    name = f"B={rows} T={tokens} Q={queries} H={heads}" + (" float8" if float8 else "")
    return Case("mla_decode", name, rows, draw, run, oracle,
                2. * rows * queries * heads * tokens * (2 * latent + ROPE), "bf16", rivals=_plain(run))


def _decode(query: jax.Array, table: jax.Array, lengths: jax.Array, *pages: jax.Array, float8: bool, latent: int,
            backend: Backend | None = None) -> jax.Array:
    held = QuantizedPages(*pages) if float8 else pages[0]
    return mla_decode(query, held, table, lengths, latent=latent, scale=SCALE, backend=backend).out


def attention(rows: int, tokens: int, heads: int = HEADS) -> Case:
    """A prompt, or the forward of training."""
    def run(*operands: jax.Array, backend: Backend | None = None) -> jax.Array:
        return _attend(heads, *operands, backend=backend)
    return Case("mla_attention", f"B={rows} T={tokens} H={heads}", tokens,
                functools.partial(_draw, rows, tokens, heads), run, _in_float32(run),
                _pairs(rows, tokens, heads) * (NOPE + ROPE + VALUE), "bf16", rivals=_plain(run))


def attention_gradients(rows: int, tokens: int, heads: int = HEADS) -> Case:
    """The gradients of queries, keys and values, with the forward that they take."""
    def run(*operands: jax.Array, backend: Backend | None = None) -> tuple[jax.Array, ...]:
        *inputs, dout = operands
        return jax.vjp(functools.partial(_attend, heads, backend=backend), *inputs)[1](dout)

    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        shape = rows, tokens, heads * VALUE
        return *_draw(rows, tokens, heads, key), jax.random.normal(jax.random.fold_in(key, 1), shape, jnp.bfloat16)
    return Case("mla_attention_gradients", f"B={rows} T={tokens} H={heads}", tokens, draw, run, _in_float32(run),
                _pairs(rows, tokens, heads) * (4 * (NOPE + ROPE) + 3 * VALUE), "bf16", rivals=_plain(run))


PUBLISHED: dict[OperationName, Callable[[], list[Case]]] = {
    "mla_decode": lambda: [decode(128, 4096), decode(128, 4096, float8=True), decode(128, 4096, queries=2),
                           decode(128, 4096, heads=16), decode(1, 32768)],
    "mla_attention": lambda: [attention(1, 4096), attention(4, 1024)],
    "mla_attention_gradients": lambda: [attention_gradients(1, 4096)]}


def small() -> dict[OperationName, Case]:
    """For an interpreter."""
    return {"mla_decode": decode(2, 128, queries=2, heads=2, latent=128), "mla_attention": attention(1, 72, heads=2),
            "mla_attention_gradients": attention_gradients(1, 72, heads=2)}


def _draw(rows: int, tokens: int, heads: int, key: jax.Array) -> tuple[jax.Array, ...]:
    """As projections give them, heads beside each other."""
    widths = heads * NOPE, heads * ROPE, heads * (NOPE + VALUE), ROPE
    return tuple(jax.random.normal(k, (rows, tokens, width), jnp.bfloat16)
                 for k, width in zip(jax.random.split(key, len(widths)), widths, strict=True))


def _attend(heads: int, q_nope: jax.Array, q_rope: jax.Array, kv: jax.Array, k_rope: jax.Array, *,
            backend: Backend | None = None) -> jax.Array:
    apart = (x.reshape(*x.shape[:2], heads, -1) for x in (q_nope, q_rope, kv))
    out = mla_attention(*apart, k_rope, scale=SCALE, backend=backend)
    return out.reshape(*out.shape[:2], -1)


def _pairs(rows: int, tokens: int, heads: int) -> float:
    """Two FLOPs for each pair of a query and a key that it sees."""
    return 2. * rows * heads * math.comb(tokens + 1, 2)


def _plain(run: Callable[..., Any]) -> dict[str, tuple[Rival, ...]]:
    return {"xla_plain": (Rival(lambda *operands: operands, functools.partial(run, backend="reference")),)}


def _in_float32(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands: run(*(x.astype(jnp.float32) for x in operands), backend="reference")
