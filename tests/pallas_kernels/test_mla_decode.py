"""Attention to a paged cache in plain JAX: against float64, against attention to projected keys, and in parts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_decode import Attended, QuantizedPages, merge, mla_decode
from tests.pallas_kernels.mla_decode_cases import SCALE, Case, attend, check, draw

CASES = {
    "ragged, empty, whole pages, one more": Case((70, 0, 64, 65, 1), heads=3, queries=2),
    "no entry at all": Case((0, 0), queries=2),
    "pages of 8, widths of no tile": Case((17, 8, 9), page=8, latent=24, rope=6, kind="float32"),
    "128 heads, four queries": Case((130,), heads=128, queries=4),
    "first queries before, inside and after": Case((40, 40, 7), queries=3, page=16, first=(-1, 12, 9)),
    "float8": Case((70, 0, 5), heads=4, kind="float8", latent=256),
    "float8, a part of a tile": Case((20,), kind="float8", latent=200, page=16),
    "int8": Case((70, 64), heads=4, queries=2, kind="int8"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_that_of_float64(case):
    drawn = draw(case)
    check(case, drawn, attend(case, drawn, "reference"), drawn.of_rounded)


@pytest.mark.parametrize("heads", [1, 2, 16, 128])
def test_equals_attention_to_projected_keys_and_values(heads):
    """The plain way of equations 2 and 5 of arXiv 2412.19437: every latent projected up, one head after the other.

    Tolerance: float32 sums of 64 products of order one, on both sides of the softmax.
    """
    rng = np.random.default_rng(1)
    latent, rope, width, tokens = 64, 16, 32, 37
    query, query_rope = rng.normal(size=(heads, width)), rng.normal(size=(heads, rope))
    entries = rng.normal(size=(tokens, latent + rope))
    keys_up, values_up = (rng.normal(size=(heads, latent, width)) / 8 for _ in range(2))
    want = []
    for head in range(heads):
        keys, values = (entries[:, :latent] @ up[head] for up in (keys_up, values_up))
        scores = SCALE * (keys @ query[head] + entries[:, latent:] @ query_rope[head])
        weights = np.exp(scores - scores.max())
        want.append(weights @ values / weights.sum())
    absorbed = np.concatenate([np.einsum("hcd,hd->hc", keys_up, query), query_rope], axis=-1)
    pages = np.zeros((3, 16, latent + rope))
    pages.reshape(-1, latent + rope)[:tokens] = entries
    got = mla_decode(jnp.asarray(absorbed[None, None], jnp.float32), jnp.asarray(pages[::-1], jnp.float32),
                     jnp.asarray([[2, 1, 0]]), jnp.asarray([tokens]), latent=latent, scale=SCALE)
    np.testing.assert_allclose(np.einsum("hc,hcd->hd", got.out[0, 0], values_up), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["bf16", "float8"])
def test_wider_entries_change_nothing(kind):
    case = Case((70, 3), kind=kind)
    drawn = draw(case)

    def widened(array):
        return jnp.pad(array, ((0, 0), (0, 0), (0, 64)), constant_values=np.nan)
    pages = drawn.pages
    pages = pages._replace(rope_PSR=widened(pages.rope_PSR)) if kind == "float8" else widened(pages)
    wide = dataclasses.replace(drawn, pages=pages)
    for got, want in zip(attend(case, wide, "reference"), attend(case, drawn, "reference"), strict=True):
        np.testing.assert_array_equal(got, want)


def test_parts_of_a_sequence_merge_to_the_whole():
    """One of the parts has nothing for some rows, and one row has nothing at all. Tolerance: float32 sums."""
    case = Case((150, 64, 0), kind="float32", spare=3)
    drawn = draw(case)
    whole = attend(case, drawn, "reference")
    parts = []
    for first in (0, 64, 128):
        lengths = np.clip(np.asarray(case.lengths) - first, 0, 64)
        # Each row has one query, which is that of its last entry.
        parts.append(mla_decode(jnp.asarray(drawn.query), drawn.pages, jnp.asarray(drawn.table[:, first // 64:]),
                                jnp.asarray(lengths), latent=case.latent, scale=SCALE, backend="reference"))
    merged = merge(Attended(*map(jnp.stack, zip(*parts, strict=True))), jnp.float32)
    np.testing.assert_allclose(merged.out, whole.out, atol=1e-6)
    np.testing.assert_allclose(merged.lse, whole.lse, atol=1e-6)


@pytest.mark.parametrize(("change", "message"), [
    ({"latent": 200}, r"pages \(3, 64, 192\) must be \[P, S, 192 or more\]"),
    ({"pages": jnp.zeros((3, 64, 100), jnp.bfloat16)}, r"pages \(3, 64, 100\) must be"),
    ({"pages": jnp.zeros((3, 64, 192))}, r"8 bits \(float32\) must have the queries' type \(bfloat16\)"),
    ({"pages": QuantizedPages(jnp.zeros((3, 64, 100), jnp.int8), jnp.zeros((3, 1, 64)),
                              jnp.zeros((3, 64, 64), jnp.bfloat16))}, r"codes \(100\) must be as wide as the latent"),
    ({"pages": QuantizedPages(*[jnp.zeros((3, 64, 128), jnp.bfloat16)] * 3)}, "codes are float8_e4m3fn or int8"),
    ({"backend": "tpu", "pages": jnp.zeros((3, 8, 192), jnp.bfloat16)}, "no tpu kernel .* pages divisible by 16"),
    ({"backend": "hopper", "pages": jnp.zeros((3, 32, 192), jnp.bfloat16)}, "no hopper kernel .* divisible by 64"),
    ({"backend": "hopper", "query": jnp.zeros((1, 1, 2, 192)), "pages": jnp.zeros((3, 64, 192))},
     "no hopper kernel .* needs bfloat16"),
    ({"backend": "tpu", "query": jnp.zeros((1, 4, 512, 192), jnp.bfloat16)}, "at most 1024 queries times heads"),
    ({"backend": "tpu", "table": jnp.zeros((1, 2 ** 17 + 1), jnp.int32)}, "tables of at most 131072 pages in all")])
def test_mistakes_are_told(change, message):
    arguments = {"query": jnp.zeros((1, 1, 2, 192), jnp.bfloat16), "pages": jnp.zeros((3, 64, 192), jnp.bfloat16),
                 "table": jnp.zeros((1, 2), jnp.int32), "latent": 128, "backend": None} | change
    operands = [arguments.pop(name) for name in ("query", "pages", "table")]
    with pytest.raises(ValueError, match=message):
        mla_decode(*operands, jnp.ones(1, jnp.int32), scale=1., **arguments)


def test_is_one_program_for_all_lengths():
    """Lengths and positions are traced: another step of decoding compiles nothing."""
    case = Case((5, 3), page=16)
    drawn = draw(case)
    run = jax.jit(functools.partial(mla_decode, latent=case.latent, scale=SCALE))
    for lengths in ((5, 3), (2, 0)):
        run(jnp.asarray(drawn.query), drawn.pages, jnp.asarray(drawn.table), jnp.asarray(lengths))
    assert run._cache_size() == 1
