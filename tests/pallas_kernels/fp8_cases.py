"""Operands of the float8 products and what they should give, in NumPy float64."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np

Quantised = tuple[np.ndarray, np.ndarray]
"""float8_e4m3fn values and the float32 scales of their tiles."""


def quantise(values_XK: np.ndarray, rows: int = 1) -> Quantised:
    """In blocks of `rows` x 128 of the last two axes; each scale maps the largest magnitude to 448."""
    *lead, x, k = values_XK.shape
    blocks = -(-x // rows), -(-k // 128)
    padded = np.zeros((*lead, blocks[0] * rows, blocks[1] * 128))
    padded[..., :x, :k] = values_XK
    tiles = padded.reshape(*lead, blocks[0], rows, blocks[1], 128)
    scales = (np.maximum(np.abs(tiles).max(axis=(-3, -1)), 1e-35) / 448).astype(np.float32)
    values = (tiles / scales[..., :, None, :, None].astype(np.float64)).reshape(padded.shape)[..., :x, :k]
    return np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn), scales


def dequantised(operand: Quantised, rows: int = 1) -> np.ndarray:
    values, scales = operand
    wide = np.repeat(np.repeat(scales.astype(np.float64), rows, axis=-2), 128, axis=-1)
    return values.astype(np.float64) * wide[..., :values.shape[-2], :values.shape[-1]]


def difference(got, want: np.ndarray) -> float:
    """DeepGEMM's metric: 0 for equal, about half of the squared relative error."""
    x, y = np.asarray(got, np.float64).ravel(), want.ravel()
    scale = max(np.abs(y).max(initial=0), 1e-300)
    x, y = x / scale, y / scale
    squares = np.sum(x * x + y * y)
    return float(1 - 2 * np.sum(x * y) / squares) if squares else 0.0


LIMITS = {jnp.bfloat16: 1e-5, jnp.float32: 1e-10}
"""One rounding to bfloat16 gives 3e-6 at most (2^-9 relative, squared, halved); float32 sums 1e-13."""


def grouped_case(sizes: list[int], total: int, columns: int) -> tuple[Quantised, Quantised, tuple[Quantised, Quantised],
                                                                      np.ndarray, np.ndarray]:
    """(rows, weights, tokens of both sides of a gradient, product, gradient); what lies past the groups is NaN."""
    rng = np.random.default_rng(2)
    groups, used = len(sizes), sum(sizes)
    x, w = quantise(rng.normal(size=(total, 256))), quantise(rng.normal(size=(groups, columns, 256)), 128)
    tokens = quantise(rng.normal(size=(128, total))), quantise(rng.normal(size=(64, total)))
    product, gradient = np.zeros((total, columns)), np.zeros((groups, 128, 64))
    for e, end in enumerate(np.cumsum(sizes)):
        part = slice(end - sizes[e], end)
        product[part] = dequantised(x)[part] @ dequantised((w[0][e], w[1][e]), 128).T
        gradient[e] = dequantised(tokens[0])[:, part] @ dequantised(tokens[1])[:, part].T
    x[0][used:] = x[1][used:] = np.nan
    for values, scales in tokens:
        values[:, used:] = scales[:, used // 128:] = np.nan
    return x, w, tokens, product, gradient
