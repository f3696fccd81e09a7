"""float8 with one scale a tile: DeepSeek-V3's 1x128 for activations and gradients and 128x128 for weights.

Every operation takes bfloat16 or float32. The rule, with `amax` the largest magnitude in a tile:
- scale = amax * float32(1/448), value = x * (1 / scale) in float32, rounded to the nearest e4m3, ties to even.
- power of two: the smallest scale 2^k with amax <= 448 * 2^k, found exactly; its inverse is exact too.
- A tile of zeros has the scale of amax = 1e-4, and so has one whose amax is below 2^-126. No scale is below 2^-126.
- A tile with inf or NaN has scale NaN and values NaN, so whoever dequantises or multiplies it sees NaN.
- The last tile of a row or column may be smaller; its scale comes from what is there.

Source: DeepSeek-V3 Technical Report, section 3.3.2; "Insights into DeepSeek-V3", section 3.1.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.quantise import reference
from pallas_kernels.quantise.reference import TILE, Tile
from pallas_kernels.targets import Backend, backend_module, dispatch

Quantised = tuple[jax.Array, jax.Array]
"""Values float8_e4m3fn and scales float32."""

TILES: tuple[Tile, ...] = ((1, TILE), (TILE, 1), (TILE, TILE), None)


@jax.named_scope("quantise")
def quantise(x: jax.Array, tile: Tile, *, power_of_two: bool = False, backend: Backend | None = None) -> Quantised:
    """float8 values and their scales.

    Args:
      x: [..., M, K] bfloat16 or float32.
      tile: (1, 128), (128, 1), (128, 128), or None for one scale for each matrix.
      power_of_two: scales are powers of two.
      backend: None picks by the platform that the program is compiled for: Hopper's or TPU's kernel where it serves,
        else the reference, and says so once. The kernels read x once; XLA reads it twice for the reference.

    Returns:
      values float8_e4m3fn [..., M, K] and scales float32 [..., ceil(M / rows), ceil(K / columns)]; x = value * scale.

    Raises:
      ValueError: another dtype or tile, fewer than two dimensions, or a shape that the named `backend` does not serve.
    """
    if tile not in TILES:
        raise ValueError(f"tile {tile} is none of {TILES}")
    return _run(x, _Problem("quantise", x.shape, x.dtype, tile, power_of_two), backend)


@jax.named_scope("quantise_transposed")
def quantise_transposed(x_MK: jax.Array, *, power_of_two: bool = False, backend: Backend | None = None) -> Quantised:
    """The transpose of x, in tiles of 128 along M, laid out for a product that sums over M.

    Args:
      x_MK: [..., M, K] bfloat16 or float32.
      power_of_two: scales are powers of two.
      backend: as in `quantise`.

    Returns:
      values float8_e4m3fn [..., K, M] and scales float32 [..., K, ceil(M / 128)].

    Raises:
      ValueError: as in `quantise`.
    """
    return _run(x_MK, _Problem("quantise_transposed", x_MK.shape, x_MK.dtype, (TILE, 1), power_of_two), backend)


@jax.named_scope("quantise_both")
def quantise_both(x_MK: jax.Array, *, power_of_two: bool = False,
                  backend: Backend | None = None) -> tuple[Quantised, Quantised]:
    """(`quantise` with tile (1, 128), `quantise_transposed`) from one read of x: for the forward product, which sums
    over K, and for the weights' gradient, which sums over M."""
    return _run(x_MK, _Problem("quantise_both", x_MK.shape, x_MK.dtype, (TILE, 1), power_of_two), backend)


@jax.named_scope("swiglu_quantise")
def swiglu_quantise(gate_up: jax.Array, *, power_of_two: bool = False, backend: Backend | None = None) -> Quantised:
    """`quantise` with tile (1, 128) of silu(gate) * up, which is never written.

    Args:
      gate_up: [..., P, 2F] bfloat16 or float32, the gate in the first half. The product is made in float32 and rounded
        to this dtype before it is quantised, so the result is that of the two steps.
      power_of_two: scales are powers of two.
      backend: as in `quantise`.

    Returns:
      values float8_e4m3fn [..., P, F] and scales float32 [..., P, ceil(F / 128)].

    Raises:
      ValueError: as in `quantise`, or the width is odd.
    """
    if gate_up.ndim and gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up are halves of the last dimension, which is odd: {gate_up.shape}")
    return _run(gate_up, _Problem("swiglu_quantise", gate_up.shape, gate_up.dtype, (1, TILE), power_of_two), backend)


@jax.named_scope("dequantise")
def dequantise(values: jax.Array, scales: jax.Array, tile: Tile,
               dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """values * scales, multiplied in float32 and rounded to `dtype`; arguments as `quantise` returns them."""
    return reference.dequantise(values, scales, tile, dtype)


class _Problem(NamedTuple):
    """What to do, and all that the choice of a backend depends on."""

    operation: Literal["quantise", "quantise_transposed", "quantise_both", "swiglu_quantise"]
    shape: tuple[int, ...]
    dtype: Any
    tile: Tile
    power_of_two: bool

    def misfit(self, backend: Backend) -> str:
        """See `targets.Problem`."""
        if backend == "reference":
            return ""
        return backend_module("quantise", backend).misfit(self.operation, self.shape, self.dtype, self.tile)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)  # so that a model's many equal casts are traced once
def _run(x: jax.Array, problem: _Problem, backend: Backend | None) -> Any:
    if x.dtype not in (jnp.bfloat16, jnp.float32) or x.ndim < 2:
        raise ValueError(f"quantise takes bfloat16 or float32 [..., M, K], not {x.dtype} {x.shape}")
    return dispatch(functools.partial(_compute, problem), problem, backend, x)


def _compute(problem: _Problem, backend: Backend, x: jax.Array) -> Any:
    # Each module has the operations as `operation(x, [tile,] power_of_two)`.
    function = getattr(backend_module("quantise", backend), problem.operation)
    return function(x, *([problem.tile] if problem.operation == "quantise" else []), problem.power_of_two)
