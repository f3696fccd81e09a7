"""Picks the backend of the grouped matrix product."""

from __future__ import annotations

from typing import Literal

import chex
import jax

from pallas_kernels.grouped_matmul.reference import grouped_matmul_reference
from pallas_kernels.grouped_matmul.tiled import grouped_matmul_tiled

Backend = Literal["reference", "tiled", "ragged_dot"]


@jax.named_scope("grouped_matmul")
def grouped_matmul(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, *, alignment: int = 1,
                   backend: Backend | None = None) -> jax.Array:
    """rows of group e times weights[e], for every group.

    Args:
      rows_PD: [P, D], sorted by group; rows past the last group are ignored.
      weights_EDF: [E, D, F] of the same dtype.
      group_sizes_E: int32 [E]; a group may be empty. The sum is at most P.
      alignment: a number that divides P and every group size, if the caller padded them so; lets the CPU work tile by
        tile.
      backend: None picks by platform: XLA's `ragged_dot` on TPU and GPU; on CPU, where XLA computes every row with
        every group, the tiled loop if groups are aligned, and otherwise the reference.

    Returns:
      [P, F] in rows' dtype, accumulated in float32; zero past the last group.
    """
    chex.assert_equal(rows_PD.shape[1], weights_EDF.shape[1])
    chex.assert_shape(group_sizes_E, (weights_EDF.shape[0],))
    if backend is None:
        on_cpu = jax.default_backend() == "cpu"
        backend = "ragged_dot" if not on_cpu else "tiled" if alignment > 1 else "reference"
    if backend == "tiled":
        return grouped_matmul_tiled(rows_PD, weights_EDF, group_sizes_E, alignment)
    if backend == "reference":
        return grouped_matmul_reference(rows_PD, weights_EDF, group_sizes_E)
    return jax.lax.ragged_dot(rows_PD, weights_EDF, group_sizes_E)
