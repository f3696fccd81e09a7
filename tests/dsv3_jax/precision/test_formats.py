"""E5M6 against a table of its 4096 codes, written in NumPy from the format's definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision.formats import (
    E5M6_MAX,
    decode_e5m6,
    dequantise_e5m6,
    encode_e5m6,
    pack_12_bits,
    quantise_e5m6,
    unpack_12_bits,
)

CODES = np.arange(4096)
INFINITY = 31 << 6


def number(code: int) -> float:
    sign, exponent, fraction = -1.0 if code >> 11 else 1.0, code >> 6 & 31, code & 63
    if exponent == 31:
        return np.nan if fraction else sign * np.inf
    return sign * (fraction * 2.0 ** -20 if exponent == 0 else (1 + fraction / 64) * 2.0 ** (exponent - 15))


TABLE = np.array([number(code) for code in CODES])


def nearest(x: np.ndarray) -> np.ndarray:
    """The code nearest to each number, the even one on ties; as if 2^16 came after the largest, which is infinity."""
    positive = np.append(TABLE[:INFINITY], 2.0 ** 16)
    magnitude = np.abs(x.astype(np.float64))
    above = np.clip(np.searchsorted(positive, magnitude), 1, INFINITY)
    low, high = magnitude - positive[above - 1], positive[above] - magnitude
    code = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    return code | np.where(np.signbit(x), 0x800, 0)


def test_decodes_every_code():
    got = np.asarray(jax.jit(decode_e5m6)(CODES))
    np.testing.assert_array_equal(got, TABLE.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(got), CODES >= 2048)
    assert np.nanmax(got[np.isfinite(got)]) == E5M6_MAX == 65024


def test_encodes_to_the_nearest():
    """Every number itself, every midpoint, the float32 on both sides of it, and a random sweep."""
    numbers = np.append(TABLE[:INFINITY], 2.0 ** 16)
    ties = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    sweep = rng.uniform(1, 2, 100_000) * 2.0 ** rng.integers(-24, 18, 100_000)
    x = np.concatenate([numbers, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf), sweep, [1e-30, 3e38, np.inf]])
    x = np.concatenate([x, -x]).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(encode_e5m6)(x), nearest(x))
    assert np.isnan(decode_e5m6(encode_e5m6(jnp.float32(np.nan))))


def test_packs_every_pair_of_nibbles():
    codes = np.concatenate([CODES.reshape(64, 64), np.random.default_rng(0).permutation(CODES).reshape(64, 64)], axis=1)
    packed = pack_12_bits(jnp.asarray(codes))
    assert (packed.shape, packed.dtype) == ((64, 192), jnp.uint8)
    np.testing.assert_array_equal(packed[:, :128], codes % 256)
    np.testing.assert_array_equal(packed[:, 128:], codes[:, :64] // 256 + 16 * (codes[:, 64:] // 256))
    np.testing.assert_array_equal(unpack_12_bits(packed), codes)
    with pytest.raises(ValueError, match="odd"):
        pack_12_bits(jnp.zeros((2, 3), jnp.int32))


@pytest.mark.parametrize("tile", [(1, 128), (128, 1)], ids=str)
def test_quantises_tiles(tile):
    """Scales are the smallest powers of two that fit; numbers that are 2^-36 of the largest or more keep 6 bits."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 320)) * 2.0 ** rng.integers(-20, 20, size=(200, 320))).astype(np.float32)
    x[0] = x[:, 0] = 0
    values, scales = jax.jit(quantise_e5m6, static_argnums=1)(x, tile)
    assert (values.shape, values.dtype) == ((200, 480), jnp.uint8)
    back = np.asarray(dequantise_e5m6(values, scales, tile))
    for (i, j), scale in np.ndenumerate(np.asarray(scales)):
        at = slice(i * tile[0], (i + 1) * tile[0]), slice(j * tile[1], (j + 1) * tile[1])
        largest = np.abs(x[at]).max() or np.float32(1e-4)
        assert np.log2(scale) % 1 == 0
        assert E5M6_MAX * scale / 2 < largest <= E5M6_MAX * scale
        np.testing.assert_array_equal(back[at], TABLE[nearest(x[at] / scale)] * scale)


def test_a_tile_with_nan_is_nan():
    x = np.ones((2, 256), np.float32)
    x[1, 3] = np.inf
    tile = (1, 128)
    back = jax.jit(lambda x: dequantise_e5m6(*quantise_e5m6(x, tile), tile, jnp.bfloat16))(x)
    assert back.dtype == jnp.bfloat16
    expected = np.zeros(x.shape, bool)
    expected[1, :128] = True
    np.testing.assert_array_equal(np.isnan(back), expected)
