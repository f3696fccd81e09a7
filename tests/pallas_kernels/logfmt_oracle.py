"""LogFMT in NumPy and float64, a loop over tiles: every value of a tile is tried, and the nearest taken."""

from __future__ import annotations

import numpy as np

EPSILON = 2.0 ** -16
"""How far decoded values may be from the formula's, relative: float32's logarithms and powers of up to 32 octaves lose
2^-18 on a CPU, and an H100's fast ones 2^-17."""


def values(tile: np.ndarray, bits: int) -> np.ndarray:
    """float64 [2^(bits-1)]: what codes 0, 1, 2, ... of this tile stand for; NaN for a tile with inf or NaN."""
    magnitudes = np.abs(tile.astype(np.float64))
    if not np.isfinite(magnitudes).all():
        return np.full(2 ** (bits - 1), np.nan)
    logs = np.log(magnitudes[magnitudes >= 2.0 ** -126])
    if not logs.size:
        return np.zeros(2 ** (bits - 1))
    largest = logs.max()
    smallest = max(logs.min(), largest - np.log(2.0 ** 32))
    step = (largest - smallest) / (2 ** (bits - 1) - 2)
    return np.concatenate([[0], np.exp(smallest + step * np.arange(2 ** (bits - 1) - 1))])


def each_tile(x_MK: np.ndarray):
    """(row, columns) of each tile."""
    for row in range(len(x_MK)):
        for start in range(0, x_MK.shape[1], 128):
            yield row, slice(start, start + 128)


def nearest(x: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The first code whose value is nearest to each magnitude."""
    return np.argmin(np.abs(np.abs(x.astype(np.float64))[:, None] - of), axis=1)


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [M, tiles * 16 bits] -> codes [M, tiles * 128], bit by bit."""
    tiles = packed.shape[1] // (16 * bits)
    codes = np.zeros((len(packed), tiles * 128), np.int64)
    begin = shift = 0
    for size in (8, 8, 4, 2, 1):
        if bits - shift < size:
            continue
        for tile in range(tiles):
            for j in range(128):
                byte = packed[:, begin + tile * 16 * size + j % (16 * size)].astype(np.int64)
                part = byte >> (j // (16 * size) * size) & (1 << size) - 1
                codes[:, tile * 128 + j] |= part << shift
        begin, shift = begin + tiles * 16 * size, shift + size
    return codes


def assert_encoded(x_MK: np.ndarray, packed: np.ndarray, ends: np.ndarray, bits: int) -> None:
    """Codes are the nearest, but where another is as near within EPSILON; signs and ends are the tile's."""
    x_MK, ends = x_MK.astype(np.float32), np.asarray(ends).astype(np.float32)
    codes, tiles = unpack(np.asarray(packed), bits), ends.shape[1] // 2
    top = 2 ** (bits - 1) - 1
    for row, at in each_tile(x_MK):
        tile, table = x_MK[row, at], values(x_MK[row, at], bits)
        code, sign = codes[row, at][:tile.size] & top, codes[row, at][:tile.size] >> (bits - 1)
        np.testing.assert_array_equal(ends[row, at.start // 128::tiles],
                                      np.array([table[1], table[-1]]).astype(np.float32))
        if np.isnan(table[0]):
            assert (code > 0).all()
            continue
        np.testing.assert_array_equal(sign, np.signbit(tile))
        want, size = nearest(tile, table), np.abs(tile.astype(np.float64))
        distance, best = np.abs(size - table[code]), np.abs(size - table[want])
        assert (distance <= best + EPSILON * size).all(), (row, at, np.abs(code - want).max())
        assert ((code == 0) == (want == 0))[size != table[1] / 2].all()


def assert_decoded(x_MK: np.ndarray, got_MK: np.ndarray, packed: np.ndarray, bits: int) -> None:
    """Values are the formula's for these codes, within EPSILON and the rounding to the result's dtype."""
    codes, top = unpack(np.asarray(packed), bits), 2 ** (bits - 1) - 1
    rounding = 2.0 ** -8 if got_MK.dtype != np.float32 else 0.0
    x_MK, got_MK = x_MK.astype(np.float32), np.asarray(got_MK).astype(np.float32)
    for row, at in each_tile(x_MK):
        code = codes[row, at][:x_MK[row, at].size]
        want = values(x_MK[row, at], bits)[code & top] * np.where(code > top, -1, 1)
        np.testing.assert_allclose(got_MK[row, at], want, rtol=EPSILON + rounding, atol=0)
        assert (np.signbit(got_MK[row, at]) == (code > top))[~np.isnan(want)].all()
