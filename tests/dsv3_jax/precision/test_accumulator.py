"""Hopper's accumulator, against whole numbers in Python."""

from __future__ import annotations

import math
from fractions import Fraction

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.precision.accumulator import hopper_matmul


def _cut(value: Fraction, exponent: int, bits: int) -> Fraction:
    """`value` without what lies below the last of `bits` fraction bits of a number with this exponent."""
    quantum = Fraction(2) ** (exponent - bits)
    return math.trunc(value / quantum) * quantum


def _exponent(value: Fraction) -> int:
    mantissa, exponent = math.frexp(float(abs(value)))
    assert mantissa > 0
    return exponent - 1


def _dot(x: list[float], w: list[float], promote_every: int | None, bits: int) -> Fraction:
    """One result, term by term in exact arithmetic; promotion rounds to float32."""
    promoted, total = np.float32(0), Fraction(0)
    for start in range(0, len(x), 32):
        terms = [Fraction(a) * Fraction(b) for a, b in zip(x[start:start + 32], w[start:start + 32], strict=True)]
        terms.append(total)
        if any(terms):
            largest = max(_exponent(t) for t in terms if t)
            total = sum((_cut(t, largest, bits) for t in terms), Fraction(0))
            total = _cut(total, _exponent(total), bits) if total else total
        if promote_every is not None and (start + 32) % promote_every == 0:
            promoted, total = np.float32(promoted + np.float32(float(total))), Fraction(0)
    return Fraction(float(np.float32(promoted + np.float32(float(total)))))


def _float8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """E4M3 values over the whole range of exponents, zeros too."""
    spread = rng.normal(size=shape) * 2.0 ** rng.integers(-8, 6, size=shape)
    return np.where(rng.random(shape) < 0.1, 0, spread).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


@pytest.mark.parametrize(("promote_every", "bits"), [(None, 13), (128, 13), (32, 13), (128, 5)])
def test_every_result_is_the_exact_one_of_the_rule(promote_every, bits):
    rng = np.random.default_rng(0)
    x, w = _float8(rng, 3, 300), _float8(rng, 300, 4)
    x[1] = 0
    got = np.asarray(hopper_matmul(jnp.asarray(x), jnp.asarray(w), promote_every=promote_every, fraction_bits=bits))
    want = [[float(_dot(x[m].tolist(), w[:, n].tolist(), promote_every, bits)) for n in range(4)] for m in range(3)]
    np.testing.assert_array_equal(got, np.array(want, np.float32))


def test_long_sums_of_one_sign_lose_percents_and_promotion_cures_it():
    """Paper 2, section 3.3.2: nearly 2% of 4096 random terms; each of its 13 or 14 bits more halves the loss."""
    rng = np.random.default_rng(1)
    x, w = (rng.random(shape).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) for shape in ((32, 4096), (4096, 32)))
    exact = x.astype(np.float64) @ w

    def error(promote_every, bits):
        out = np.asarray(hopper_matmul(x, w, promote_every=promote_every, fraction_bits=bits))
        assert (out <= exact * (1 + 1e-5)).all(), "bits are cut off, not rounded up"
        return np.max((exact - out) / exact)
    assert 0.02 < error(None, 14) < 0.04 < error(None, 13) < 0.08
    assert error(128, 13) < 1e-3
    assert error(128, 14) < error(512, 14) < error(None, 14)


@pytest.mark.parametrize("wrong", [{"promote_every": 48}, {"promote_every": 0}, {"fraction_bits": 18}])
def test_refuses_what_it_cannot_simulate(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        hopper_matmul(jnp.ones((2, 64)), jnp.ones((64, 2)), **wrong)
