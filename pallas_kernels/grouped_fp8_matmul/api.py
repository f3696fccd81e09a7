"""Picks the backend of the grouped float8 product and of its weight gradient."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul.api import blocks, check_types
from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.targets import Backend, backend_module, dispatch


@functools.partial(jax.jit, static_argnames=("alignment", "dtype", "backend"), inline=True)
@jax.named_scope("grouped_fp8_matmul")
def grouped_fp8_matmul(x_PK: jax.Array, x_scales: jax.Array, w_ENK: jax.Array, w_scales: jax.Array,
                       group_sizes_E: jax.Array, *, alignment: int = BLOCK, dtype: jax.typing.DTypeLike = jnp.bfloat16,
                       backend: Backend | None = None) -> jax.Array:
    """rows of group e times w[e]^T, dequantised, for every group; see `fp8_matmul`.

    Args:
      x_PK: float8_e4m3fn [P, K], sorted by group; rows past the last group are ignored.
      x_scales: float32 [P, ceil(K/128)], of 1x128 tiles.
      w_ENK: float8_e4m3fn [E, N, K].
      w_scales: float32 [E, ceil(N/128), ceil(K/128)], of 128x128 blocks.
      group_sizes_E: int32 [E], at most P in all; a group may be empty.
      alignment: a number that divides P and every group size.
      dtype: bfloat16 or float32.
      backend: None picks by the platform that the program is compiled for, as `fp8_matmul` does.

    Returns:
      [P, N], accumulated in float32 and rounded once; zero past the last group.

    Raises:
      ValueError: a type, rows that `alignment` does not divide, or a shape that the named `backend` does not serve.
    """
    check_types(dtype, x_PK, w_ENK)
    (rows, terms), (groups, columns, _) = x_PK.shape, w_ENK.shape
    chex.assert_shape((x_scales, w_ENK, w_scales, group_sizes_E),
                      ((rows, blocks(terms)), (groups, columns, terms), (groups, blocks(columns), blocks(terms)),
                       (groups,)))
    _check_alignment(rows, alignment)

    def run(name: Backend, *operands: jax.Array) -> jax.Array:
        return backend_module("grouped_fp8_matmul", name).product(*operands, alignment, dtype)
    problem = _Problem("product", rows, columns, terms, groups, alignment)
    return dispatch(run, problem, backend, x_PK, x_scales, w_ENK, w_scales, group_sizes_E)


@functools.partial(jax.jit, static_argnames=("dtype", "backend"), inline=True)
@jax.named_scope("grouped_fp8_wgrad")
def grouped_fp8_wgrad(x_AP: jax.Array, x_scales: jax.Array, y_BP: jax.Array, y_scales: jax.Array,
                      group_sizes_E: jax.Array, *, dtype: jax.typing.DTypeLike = jnp.float32,
                      backend: Backend | None = None) -> jax.Array:
    """x y^T, dequantised, summed over the tokens of each group; see `fp8_wgrad`.

    Args:
      x_AP: float8_e4m3fn [A, P], tokens sorted by group; those past the last group are ignored.
      x_scales: float32 [A, P/128], of 1x128 tiles.
      y_BP: float8_e4m3fn [B, P].
      y_scales: float32 [B, P/128].
      group_sizes_E: int32 [E], multiples of 128 with at most P in all; a group may be empty.
      dtype: float32 or bfloat16.
      backend: None picks by the platform that the program is compiled for, as `fp8_matmul` does.

    Returns:
      [E, A, B], accumulated in float32 and rounded once; zero for an empty group.

    Raises:
      ValueError: a type, P that 128 does not divide, or a shape that the named `backend` does not serve.
    """
    check_types(dtype, x_AP, y_BP)
    (rows, terms), columns, groups = x_AP.shape, y_BP.shape[0], group_sizes_E.shape[0]
    chex.assert_shape((x_scales, y_BP, y_scales), ((rows, blocks(terms)), (columns, terms), (columns, blocks(terms))))
    _check_alignment(terms, BLOCK)

    def run(name: Backend, *operands: jax.Array) -> jax.Array:
        return backend_module("grouped_fp8_matmul", name).gradient(*operands, BLOCK, dtype)
    problem = _Problem("gradient", rows, columns, terms, groups, BLOCK)
    return dispatch(run, problem, backend, x_AP, x_scales, y_BP, y_scales, group_sizes_E)


def _check_alignment(tokens: int, alignment: int) -> None:
    if tokens % alignment:
        raise ValueError(f"rows ({tokens}) must be divisible by the groups' alignment ({alignment})")


class _Problem(NamedTuple):
    """What the choice of a backend depends on."""

    operation: str
    rows: int
    columns: int
    terms: int
    groups: int
    alignment: int

    def misfit(self, backend: Backend) -> str:
        """See `targets.Problem`."""
        if backend == "reference":
            return ""
        if self.operation == "product":
            multiple = 64 if backend == "hopper" else 1
            fits = self.terms % BLOCK == 0 and self.columns % multiple == 0 and self.alignment % BLOCK == 0
            need = f"K and alignment divisible by 128, N divisible by {multiple}"
        else:
            fits = backend == "tpu" or self.rows % 64 == self.columns % 64 == 0
            need = "A and B divisible by 64"
        return "" if fits and self.rows * self.terms else need + ", and rows"
