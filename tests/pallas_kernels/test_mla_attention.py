"""Causal attention in plain JAX: against float64, and what its caller may rely on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_attention import mla_attention, reference
from tests.pallas_kernels.mla_attention_cases import SCALE, Case, check, draw

CASES = {
    "one row": Case(33, 33, (33,), dtype="float32"),
    "a chunk, a row that ends in it, one before it": Case(16, 48, (48, 37, 10), start=32, dtype="float32"),
    "one query": Case(1, 20, (20, 0), start=19, dtype="float32"),
    "small widths": Case(12, 12, (12,), heads=3, nope=6, rope=4, value=5, dtype="float32"),
    "no rotated part": Case(9, 9, (9,), rope=0, dtype="float32"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_that_of_float64(case):
    check(case, draw(case), "reference")


def test_some_queries_at_a_time_are_the_same(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 16)
    case = Case(48, 64, (64, 50, 0), start=16, dtype="float32")
    check(case, draw(case), "reference")


def test_without_lengths_every_token_counts():
    case = Case(20, 20, (20, 20), dtype="float32")
    operands = [jnp.asarray(x) for x in draw(case).operands]
    np.testing.assert_array_equal(mla_attention(*operands, scale=SCALE),
                                  mla_attention(*operands, jnp.asarray([20, 20]), 0, scale=SCALE))


@pytest.mark.parametrize(("change", "message"), [
    ({"kv": jnp.zeros((1, 8, 2, 128))}, r"kv \(128 values a head\) must have a value behind its key of 128"),
    ({"k_rope": jnp.zeros((1, 8, 64), jnp.bfloat16)}, "operands must have one type, not float32.*bfloat16"),
    ({"backend": "hopper"}, "no hopper kernel .* needs bfloat16"),
    ({"backend": "tpu", "kv": jnp.zeros((1, 8, 2, 200))}, "no tpu kernel .* divisible by 128")])
def test_mistakes_are_told(change, message):
    arguments = {"q_nope": jnp.zeros((1, 8, 2, 128)), "q_rope": jnp.zeros((1, 8, 2, 64)),
                 "kv": jnp.zeros((1, 8, 2, 256)), "k_rope": jnp.zeros((1, 8, 64)), "scale": 1.} | change
    with pytest.raises(ValueError, match=message):
        mla_attention(**arguments)


def test_padding_gives_nothing_to_any_gradient():
    """Whatever the gradient of its results, which are zeros."""
    case = Case(24, 24, (17,), dtype="float32")
    operands = [jnp.asarray(x) for x in draw(case).operands]
    out, pull = jax.vjp(lambda *x: mla_attention(*x, jnp.asarray([17]), scale=SCALE), *operands)
    assert not out[:, 17:].any()
    for gradient in pull(jnp.zeros_like(out).at[:, 17:].set(1e6)):
        assert not gradient.any()


def test_heads_share_the_rotated_keys():
    """With every head its own copy, the gradient of the shared one is the sum of theirs. Tolerance: float32 sums."""
    case = Case(10, 10, (10,), heads=3, dtype="float32")
    drawn = draw(case)
    q_nope, q_rope, kv, k_rope = map(jnp.asarray, drawn.operands)

    def of_one(h: int, k_rope: jax.Array) -> jax.Array:
        one = slice(h, h + 1)
        return jnp.sum(mla_attention(q_nope[:, :, one], q_rope[:, :, one], kv[:, :, one], k_rope, scale=SCALE)
                       * drawn.dout[:, :, one])
    apart = sum(jax.grad(of_one, 1)(h, k_rope) for h in range(3))
    np.testing.assert_allclose(apart, drawn.want[4][0], atol=1e-4)
