"""Picks the backend of the float8 weight gradient."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul.api import blocks, check_types
from pallas_kernels.targets import Backend, backend_module, dispatch


@functools.partial(jax.jit, static_argnames=("dtype", "backend"), inline=True)
@jax.named_scope("fp8_wgrad")
def fp8_wgrad(x_AM: jax.Array, x_scales: jax.Array, y_BM: jax.Array, y_scales: jax.Array,
              accumulate_AB: jax.Array | None = None, *, dtype: jax.typing.DTypeLike = jnp.float32,
              backend: Backend | None = None) -> jax.Array:
    """x y^T, both dequantised, summed over tokens; plus `accumulate_AB`.

    The paper's Wgrad (DeepSeek-V3, section 3.3): both operands were transposed and quantised along the tokens. Every
    128 tokens' sum leaves the tensor cores, is scaled by both sides' scales and added in float32. Floor on an H100:
    2 A B M / 1979 TFLOP/s; A=4096, B=7168, M=4096 takes 122 us at least, and 84 us for its bytes with `accumulate_AB`.

    Args:
      x_AM: float8_e4m3fn [A, M].
      x_scales: float32 [A, ceil(M/128)], what x's 1x128 tiles were divided by.
      y_BM: float8_e4m3fn [B, M].
      y_scales: float32 [B, ceil(M/128)].
      accumulate_AB: float32 [A, B], added if given.
      dtype: float32 or bfloat16.
      backend: None picks by the platform that the program is compiled for, as `fp8_matmul` does.

    Returns:
      [A, B], accumulated in float32 and rounded once.

    Raises:
      ValueError: a type, or a shape that the named `backend` does not serve.
    """
    check_types(dtype, x_AM, y_BM)
    (rows, terms), columns = x_AM.shape, y_BM.shape[0]
    chex.assert_shape((x_scales, y_BM, y_scales), ((rows, blocks(terms)), (columns, terms), (columns, blocks(terms))))
    added = () if accumulate_AB is None else (accumulate_AB,)
    chex.assert_shape(added, (rows, columns))

    def run(name: Backend, *operands: jax.Array) -> jax.Array:
        return backend_module("fp8_wgrad", name).gradient(*operands[:4], operands[4] if added else None, dtype)
    return dispatch(run, _Problem(rows, columns, terms), backend, x_AM, x_scales, y_BM, y_scales, *added)


class _Problem(NamedTuple):
    """What the choice of a backend depends on."""

    rows: int
    columns: int
    terms: int

    def misfit(self, backend: Backend) -> str:
        """See `targets.Problem`."""
        if backend == "hopper" and (self.rows % 64 or self.columns % 64 or not self.terms):
            return "A and B divisible by 64, and tokens"
        if backend == "tpu" and not self.terms:
            return "tokens"
        return ""
