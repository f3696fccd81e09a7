"""Published float8: e4m3 codes in blocks of 128 x 128, each block with one float32 scale.

A weight is code * scale of its block. The scale is the block's largest magnitude over 448, the largest e4m3 number;
blocks that hang over the edge of the matrix count as filled up with zeros. Source: the `weight_scale_inv` tensors of
DeepSeek-V3's files, and paper 2, section 3.3.2.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

BLOCK = 128
E4M3_MAX = 448.0
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_VALUES = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks along each dimension of a matrix of `shape`."""
    return tuple(-(-size // BLOCK) for size in shape)


def quantise(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N, K] -> (e4m3 codes [N, K], float32 scales [ceil(N/128), ceil(K/128)]).

    A block of zeros has scale 1. Rounding is to the nearest code, ties to the even one.
    """
    blocks = scale_shape(weight.shape)
    padded = np.zeros((blocks[0] * BLOCK, blocks[1] * BLOCK), np.float32)
    padded[:weight.shape[0], :weight.shape[1]] = weight
    tiles = padded.reshape(blocks[0], BLOCK, blocks[1], BLOCK)
    largest = np.maximum(tiles.max(axis=(1, 3)), -tiles.min(axis=(1, 3)))
    scales = largest / np.float32(E4M3_MAX)
    scales[scales == 0] = 1  # zeros, or so small that their scale vanishes
    tiles /= scales[:, None, :, None]
    # Division may round past the largest code, which would become NaN.
    np.clip(tiles, -E4M3_MAX, E4M3_MAX, out=tiles)
    return padded[:weight.shape[0], :weight.shape[1]].astype(E4M3), scales


def dequantise(codes: np.ndarray, scales: np.ndarray, first: tuple[int, int] = (0, 0)) -> np.ndarray:
    """float32 weights of a slice of a matrix.

    Args:
      codes: e4m3 [n, k].
      scales: float32, of every block that the slice touches.
      first: row and column of the slice's first element in the matrix.
    """
    out = _VALUES[codes.view(np.uint8)]
    row_blocks, column_blocks = ((np.arange(size) + start) // BLOCK - start // BLOCK
                                 for size, start in zip(codes.shape, first, strict=True))
    for block in range(scales.shape[0]):
        rows = slice(*np.searchsorted(row_blocks, (block, block + 1)))
        out[rows] *= scales[block, column_blocks]
    return out
