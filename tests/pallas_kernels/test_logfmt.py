"""LogFMT by the reference, against a search over all values of each tile in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.logfmt import decode, encode, reference
from tests.pallas_kernels import logfmt_oracle as oracle

BITS = range(4, 17)
encoded = jax.jit(functools.partial(encode, backend="reference"), static_argnums=1)
decoded = jax.jit(functools.partial(decode, backend="reference"), static_argnames=("width", "dtype"))


def matrix(shape: tuple[int, int], dtype=jnp.float32, seed: int = 0) -> jax.Array:
    """Heavy-tailed numbers in rows of unlike magnitude, with some zeros of both signs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, size=shape) * 2.0 ** rng.integers(-20, 20, size=(shape[0], 1))
    return jnp.asarray(np.where(rng.uniform(size=shape) < 0.02, x * 0, x), dtype)


def encoded_codes(x: np.ndarray, bits: int) -> np.ndarray:
    """Without their signs."""
    return oracle.unpack(np.asarray(encoded(jnp.asarray(x, jnp.float32), bits)[0]), bits) & 2 ** (bits - 1) - 1


@pytest.mark.parametrize(("bits", "dtype"), [
    *(pytest.param(bits, jnp.float32, marks=[] if bits in (4, 7, 10, 16) else pytest.mark.slow) for bits in BITS),
    (4, jnp.bfloat16), (10, jnp.bfloat16)])
def test_every_code_is_that_of_the_nearest_value(bits, dtype):
    x = matrix((3, 300), dtype)
    codes, ends = encoded(x, bits)
    assert (codes.shape, codes.dtype) == ((3, 3 * 16 * bits), jnp.uint8)
    assert (ends.shape, ends.dtype) == ((3, 2 * 3), dtype)
    oracle.assert_encoded(np.asarray(x), np.asarray(codes), np.asarray(ends), bits)
    back = decoded(codes, ends, width=300)
    assert back.dtype == dtype
    oracle.assert_decoded(np.asarray(x), np.asarray(back), np.asarray(codes), bits)


@pytest.mark.parametrize("bits", [4, 8, 10, 16])
def test_no_other_code_of_its_own_decoder_is_nearer(bits):
    """Exactly but for the rounding of the mean of two neighbours: 2 units in float32's last place."""
    x = np.asarray(matrix((1, 128), seed=1))
    ends = encoded(x, bits)[1]
    table = reference.values_of(jnp.arange(2 ** (bits - 1)), reference.Ends(*ends[0]), bits)
    values = np.asarray(table, np.float64)
    got = values[encoded_codes(x, bits)[0]]
    best = values[oracle.nearest(x[0], values)]
    size = np.abs(x[0].astype(np.float64))
    assert (np.abs(got - size) <= np.abs(best - size) + 2.0 ** -22 * size).all()


def test_the_ends_of_the_range_have_the_first_and_the_last_code():
    x = np.array([[0.25, -3.0, 0.5, 1.0, 0.0, -0.0, 2.9]], np.float32)
    for bits in (4, 10, 16):
        codes, ends = encoded(x, bits)
        found = oracle.unpack(np.asarray(codes), bits)[0]
        sign, top = 2 ** (bits - 1), 2 ** (bits - 1) - 1
        assert list(found[[0, 1, 4, 5]]) == [1, sign + top, 0, sign]
        assert not found[7:].any()
        np.testing.assert_array_equal(ends, [[0.25, 3.0]])
        back = np.asarray(decoded(codes, ends, width=7))[0]
        np.testing.assert_allclose(back[:2], [0.25, -3.0], rtol=oracle.EPSILON)
        assert back[1] == -3
        assert list(np.signbit(back[[4, 5]])) == [False, True]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_range_ends_32_octaves_below_the_largest(bits):
    """What is below becomes zero or the smallest value, whichever is nearer; a tie the smallest value."""
    smallest = 2.0 ** -31  # of the largest, 2, over 2^32
    factors = np.array([1, 0.99, 0.51, 0.5, 0.49, 1e-3, -0.51, -0.49, 1e-30])
    x = np.concatenate([[2.0], factors * smallest])[None].astype(np.float32)
    codes = encoded_codes(x, bits)[0]
    np.testing.assert_array_equal(codes[:10], [2 ** (bits - 1) - 1, 1, 1, 1, 1, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(encoded(x, bits)[1], [[smallest, 2]])


@pytest.mark.parametrize("magnitude", [2.0 ** -126, 1e-37, 1.0, 0.1, 1e38, float(np.finfo(np.float32).max)])
def test_tiles_of_equal_magnitudes_keep_them(magnitude):
    x = np.full((1, 256), magnitude, np.float32)
    x[0, ::3] *= -1
    x[0, 5] = 0
    for bits in (4, 16):
        np.testing.assert_array_equal(decoded(*encoded(x, bits)), x)


@pytest.mark.parametrize("power", [-126, -110, -60, 60, 95, 127])
def test_every_magnitude(power):
    """Ranges that reach the smallest normal number or the largest."""
    x = np.random.default_rng(0).uniform(1, 1.99, (2, 256)) * 2.0 ** np.arange(0, 32, 0.125)
    x = (x * 2.0 ** min(power, 127 - 32)).astype(np.float32)
    x[:, ::64] = 1.99 * 2.0 ** power
    for bits in (5, 16):
        codes, ends = encoded(x, bits)
        oracle.assert_encoded(x, np.asarray(codes), np.asarray(ends), bits)
        oracle.assert_decoded(x, np.asarray(decoded(codes, ends)), np.asarray(codes), bits)


def test_zeros_and_what_counts_as_zero():
    x = np.zeros((1, 256), np.float32)
    x[0, 1::2] = -0.0
    x[0, 128:] *= 1
    tiny = np.full((1, 128), 2.0 ** -127, np.float32)
    for given in (x, tiny, np.concatenate([tiny, x], axis=1)):
        codes, ends = encoded(given, 8)
        assert not np.asarray(ends).any()
        back = np.asarray(decoded(codes, ends))
        assert not back.any()
        np.testing.assert_array_equal(np.signbit(back), np.signbit(given))


@pytest.mark.parametrize("bits", [4, 10])
@pytest.mark.parametrize("bad", [-np.inf, np.nan, -np.nan])
def test_a_tile_with_inf_or_nan_is_nan(bad, bits):
    """Its zeros too."""
    x = np.ones((2, 384), np.float32)
    x[0, 130], x[0, 140] = bad, 0
    codes, ends = encoded(x, bits)
    expected = np.zeros_like(x, bool)
    expected[0, 128:256] = True
    np.testing.assert_array_equal(np.isnan(decoded(codes, ends)), expected)
    np.testing.assert_array_equal(np.isnan(ends), [[False, True, False] * 2, [False] * 6])


@pytest.mark.parametrize("bits", BITS)
def test_packing_keeps_every_code(bits):
    codes = np.random.default_rng(0).integers(0, 2 ** bits, size=(2, 3, 128))
    codes[0, 0] = 2 ** bits - 1
    packed = reference.pack(jnp.asarray(codes, jnp.int32), bits)
    assert packed.shape == (2, 3 * 16 * bits)
    np.testing.assert_array_equal(oracle.unpack(np.asarray(packed), bits), codes.reshape(2, -1))
    np.testing.assert_array_equal(reference.unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", [8, 10])
def test_codes_are_those_of_the_closed_form(bits):
    """DeepEP's: K = floor((log2|x| - min) / step + 2 - log2((1 + 2^step) / 2) / step), in float64. Its range is 32
    octaves wide too; its tiles have no zeros here. Float32 takes another code for as many numbers as lie within
    2^-17 of one between two values, relative, of the step of about 2^-4 or 2^-6: less than one in a thousand."""
    x = np.asarray(matrix((64, 1280), seed=3))
    x = np.where(x == 0, np.float32(1), x)
    logs = np.log2(np.abs(x.astype(np.float64))).reshape(64, 10, 128)
    largest = logs.max(-1, keepdims=True)
    smallest = np.maximum(logs.min(-1, keepdims=True), largest - 32)
    step = (largest - smallest) / (2 ** (bits - 1) - 2)
    closed = np.floor((logs - smallest) / step + 2 - np.log2((1 + 2 ** step) / 2) / step).reshape(x.shape)
    ours = encoded_codes(x, bits)
    assert np.abs(closed - ours).max() <= 1
    assert np.mean(closed != ours) < 1e-3


@pytest.mark.parametrize("bits", [6, 8])
def test_rounding_has_no_bias_and_that_of_logarithms_has(bits):
    """Of numbers as likely anywhere between two values as elsewhere, the sum of errors is within 4 standard errors of
    zero. With values a factor r apart, rounding logarithms adds (log r)^2 / 8 of the sum of magnitudes, for small r:
    numbers between the geometric and the arithmetic mean of two values, a share of (log r)^2 / 8 / (r - 1) of them, are
    r - 1 larger."""
    x = np.random.default_rng(0).uniform(0.25, 1, size=(4096, 128)).astype(np.float32)
    x[:, 0], x[:, 1] = 2.0 ** -9, 1
    size, back = x[:, 2:].astype(np.float64), np.asarray(decoded(*encoded(x, bits)), np.float64)[:, 2:]
    step = 9 / (2 ** (bits - 1) - 2)
    in_logs = 2.0 ** (np.round(np.log2(size) / step) * step)
    bias, bias_in_logs = (np.sum(values - size) / size.sum() for values in (back, in_logs))
    noise = np.std(back - size) * np.sqrt(size.size) / size.sum()
    assert abs(bias) < 4 * noise
    assert bias_in_logs == pytest.approx((step * np.log(2)) ** 2 / 8, abs=4 * noise, rel=0.1)
    assert bias_in_logs > 8 * noise


def test_leading_dimensions_and_short_rows():
    x = matrix((6, 130))
    codes, ends = encoded(x.reshape(2, 3, 130), 9)
    want = encoded(x, 9)
    np.testing.assert_array_equal(codes.reshape(6, -1), want[0])
    np.testing.assert_array_equal(ends.reshape(6, -1), want[1])
    assert decoded(codes, ends, width=130).shape == (2, 3, 130)
    one = encoded(x[0, :1], 4)
    assert (one[0].shape, one[1].shape) == ((64,), (2,))
    assert decoded(*one, width=1) == x[0, 0]
    codes, ends = encode(jnp.zeros((0, 256), jnp.bfloat16), 10)
    assert decode(codes, ends).shape == (0, 256)
    assert decode(*encode(jnp.zeros((2, 0)), 10)).shape == (2, 0)


@pytest.mark.parametrize(("run", "message"), [
    (lambda: encode(jnp.ones(4), 3), "from 4 to 16 bits, not 3"), (lambda: encode(jnp.ones(4), 17), "not 17"),
    (lambda: encode(jnp.ones(4, jnp.float16), 8), "float16"), (lambda: encode(jnp.float32(1), 8), r"\[..., K\]"),
    (lambda: decode(jnp.ones(100, jnp.uint8), jnp.ones(2)), "ends"),
    (lambda: decode(jnp.ones(128, jnp.uint8), jnp.ones(2), width=129), "width of 129"),
    (lambda: decode(jnp.ones(128, jnp.uint8), jnp.ones(2), dtype=jnp.int8), "int8")])
def test_says_what_it_does_not_take(run, message):
    with pytest.raises(ValueError, match=message):
        run()
