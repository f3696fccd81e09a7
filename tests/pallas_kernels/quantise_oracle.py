"""Tile quantisation in NumPy, a loop over tiles: what every backend must equal, bit for bit."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def scale_of(tile: np.ndarray, power_of_two: bool, limit: float = 448.0) -> np.float32:
    """The scale of one tile of float32."""
    largest = np.abs(tile).max()
    if not np.isfinite(largest):
        return np.float32(np.nan)
    if largest < 2.0 ** -126:
        largest = np.float32(1e-4)
    if power_of_two:
        return np.float32(2.0 ** max(smallest_power(float(largest), limit), -126))
    return np.maximum(largest * np.float32(1 / limit), np.float32(2.0 ** -126))


def smallest_power(largest: float, limit: float) -> int:
    """The smallest k with largest <= limit * 2^k; found by trying, in float64, where both sides are exact."""
    k = math.floor(math.log2(largest / limit)) - 2
    while largest > limit * 2.0 ** k:
        k += 1
    return k


def quantise(x: np.ndarray, tile: tuple[int, int] | None, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """(values e4m3, scales float32) of a matrix."""
    x = x.astype(np.float32)
    rows, columns = tile or x.shape
    values = np.zeros(x.shape, E4M3)
    scales = np.zeros((-(-x.shape[0] // rows), -(-x.shape[1] // columns)), np.float32)
    for (i, j), _ in np.ndenumerate(scales):
        at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
        scales[i, j] = scale_of(x[at], power_of_two)
        with np.errstate(invalid="ignore"):
            values[at] = (x[at] * (np.float32(1) / scales[i, j])).astype(E4M3)
    return values, scales


def assert_same(got: tuple, want: tuple) -> None:
    """Equal values and scales to the bit; every NaN counts as equal."""
    for name, a, b in zip(("values", "scales"), got, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).astype(np.float32), np.asarray(b).astype(np.float32), err_msg=name)
