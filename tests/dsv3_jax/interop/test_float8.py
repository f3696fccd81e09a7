"""Quantising in blocks against an oracle that loops over them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.interop.float8 import dequantise, quantise

CODES = np.arange(256, dtype=np.uint8)
CODE_VALUES = CODES.view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _nearest(values):
    """The nearest of all 254 finite codes, by search; of two, the one whose last bit is 0. Zero keeps its sign."""
    finite = CODES[np.isfinite(CODE_VALUES)]
    out = np.empty(values.shape, np.uint8)
    for index, value in np.ndenumerate(values):
        distance = np.abs(CODE_VALUES[finite].astype(np.float64) - float(value))
        best = finite[distance == distance.min()]
        best = best[(best >> 7) == np.signbit(value)] if CODE_VALUES[best[0]] == 0 else best
        out[index] = min(best, key=lambda code: code & 1)
    return out


def _blocks(weight):
    for i in range(0, weight.shape[0], 128):
        for j in range(0, weight.shape[1], 128):
            yield slice(i, i + 128), slice(j, j + 128), (i // 128, j // 128)


@pytest.mark.parametrize("magnitude", [1e-28, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 256), (576, 8), (130, 40)], ids=str)
def test_quantise_equals_the_oracle(shape, magnitude):
    """Exactly: codes are those nearest to the float32 quotient, scales are amax/448 of what lies in the matrix."""
    random = np.random.default_rng(shape[0])
    weight = (magnitude * random.standard_normal(shape) * 8.0 ** random.integers(-4, 4, shape)).astype(np.float32)
    codes, scales = quantise(weight)
    assert codes.shape == shape
    assert scales.shape == tuple(-(-size // 128) for size in shape)
    for rows, columns, block in _blocks(weight):
        inside = weight[rows, columns]
        assert scales[block] == np.abs(inside).max() / np.float32(448)
        # Some of the values, since the search is slow.
        quotient = np.clip(inside[:40, :8] / scales[block], -448, 448)
        np.testing.assert_array_equal(codes[rows, columns][:40, :8].view(np.uint8), _nearest(quotient))


def test_extremes():
    weight = np.zeros((300, 130), np.float32)
    weight[0, 0] = 3e38
    weight[130, 0] = -1e-45  # its scale vanishes in float32
    weight[260, 129] = -5e-39
    codes, scales = quantise(weight)
    assert np.isfinite(codes.astype(np.float32)).all()
    assert (scales > 0).all()
    back = dequantise(codes, scales)
    np.testing.assert_allclose(back[0, 0], 3e38, rtol=1e-6)
    assert back[130, 0] == 0
    # A subnormal scale has few bits itself: half a step of 1.4e-45 in 1e-41.
    np.testing.assert_allclose(back[260, 129], -5e-39, rtol=1e-3)
    assert np.count_nonzero(back) == 2


@pytest.mark.parametrize("first", [(0, 0), (128, 0), (5, 250), (127, 127)], ids=str)
def test_dequantise_any_slice(first):
    random = np.random.default_rng(7)
    codes = random.integers(0, 127, (400, 390), np.uint8).view(ml_dtypes.float8_e4m3fn)
    scales = random.uniform(1e-4, 1e-2, (4, 4)).astype(np.float32)
    whole = np.empty(codes.shape, np.float32)
    for rows, columns, block in _blocks(codes):
        whole[rows, columns] = codes[rows, columns].astype(np.float32) * scales[block]
    (i, j), (m, n) = first, (first[0] + 140, first[1] + 120)
    touched = scales[i // 128:(m + 127) // 128, j // 128:(n + 127) // 128]
    np.testing.assert_array_equal(dequantise(codes[i:m, j:n], touched, first), whole[i:m, j:n])


def test_a_second_quantisation_keeps_every_code():
    """A weight that came out of float8 goes back to the same codes; scales may differ in their last bit, since
    448 * scale / 448 is rounded twice."""
    random = np.random.default_rng(8)
    codes, scales = quantise(random.standard_normal((576, 300)).astype(np.float32))
    again, scales_again = quantise(dequantise(codes, scales))
    np.testing.assert_array_equal(again.view(np.uint8), codes.view(np.uint8))
    np.testing.assert_allclose(scales_again, scales, rtol=2.0 ** -23)
