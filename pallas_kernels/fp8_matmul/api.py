"""Picks the backend of the block-scaled float8 product."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.targets import Backend, backend_module, dispatch


@functools.partial(jax.jit, static_argnames=("dtype", "backend"), inline=True)
@jax.named_scope("fp8_matmul")
def fp8_matmul(x_MK: jax.Array, x_scales: jax.Array, w_NK: jax.Array, w_scales: jax.Array, *,
               dtype: jax.typing.DTypeLike = jnp.bfloat16, backend: Backend | None = None) -> jax.Array:
    """x w^T, both dequantised: sum over 128-wide blocks of K of (x block) (w block)^T * x's scale * w's scale.

    The paper's Fprop and Dgrad (DeepSeek-V3, section 3.3). A block's sum leaves the tensor cores after 128 terms and is
    scaled and added in float32. Arithmetic floor on an H100: 2 M N K / 1979 TFLOP/s, and (M K + N K + 2 M N bytes) /
    3.35 TB/s; M=4096, N=4096, K=7168 is bound by the first, 122 us, and M=128 by the second, 9.3 us.

    Args:
      x_MK: float8_e4m3fn [M, K]; any M.
      x_scales: float32 [M, ceil(K/128)], what x's 1x128 tiles were divided by.
      w_NK: float8_e4m3fn [N, K].
      w_scales: float32 [ceil(N/128), ceil(K/128)], of 128x128 blocks.
      dtype: bfloat16 or float32.
      backend: None picks by the platform that the program is compiled for: Hopper's or TPU's kernel where it serves,
        else the reference, dequantised to float32, and says so once.

    Returns:
      [M, N], accumulated in float32 and rounded once.

    Raises:
      ValueError: a type, or a shape that the named `backend` does not serve.
    """
    check_types(dtype, x_MK, w_NK)
    rows, terms = x_MK.shape
    columns = w_NK.shape[0]
    chex.assert_shape((x_scales, w_NK, w_scales),
                      ((rows, blocks(terms)), (columns, terms), (blocks(columns), blocks(terms))))

    def run(name: Backend, *operands: jax.Array) -> jax.Array:
        return backend_module("fp8_matmul", name).product(*operands, dtype)
    return dispatch(run, _Problem(rows, columns, terms), backend, x_MK, x_scales, w_NK, w_scales)


def blocks(size: int) -> int:
    """Blocks of 128 that cover `size`."""
    return -(-size // BLOCK)


def check_types(dtype: jax.typing.DTypeLike, *values: jax.Array) -> None:
    """Raises ValueError unless values are float8_e4m3fn and the result one of its two types."""
    if any(v.dtype != jnp.float8_e4m3fn for v in values) or dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"float8_e4m3fn operands give bfloat16 or float32, not {[v.dtype.name for v in values]} "
                         f"{jnp.dtype(dtype).name}")


class _Problem(NamedTuple):
    """What the choice of a backend depends on."""

    rows: int
    columns: int
    terms: int

    def misfit(self, backend: Backend) -> str:
        """See `targets.Problem`."""
        if backend == "hopper" and (self.terms % BLOCK or self.columns % 64 or not self.rows * self.terms):
            return "K divisible by 128, N divisible by 64, and rows"
        if backend == "tpu" and (self.terms % BLOCK or not self.rows * self.terms):
            return "K divisible by 128, and rows"
        return ""
