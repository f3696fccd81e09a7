"""Whether a kernel is right on the device at hand.

The oracle is the plain reference in float32, computed on the same device: a sample of rows on the host would miss tiles
that are wrong, and a host needs minutes for what a card needs 0.04 s for. What that rests on, the device's own float32
product, is compared with NumPy's float64 first. Magnitudes are of order one; tests cover the others.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.benchmark.case import Case
from pallas_kernels.quantise import dequantise
from pallas_kernels.targets import Backend

BF16_LIMIT = 1e-5
"""One rounding to bfloat16 gives 3e-6 at most (2^-9 relative, squared, halved), and half of that on average; the
gradients of attention have four, at times of one sum."""
F32_LIMIT = 1e-10
HOPPER_F32_LIMIT = 1e-6
"""A card's tensor cores add float8 with about 14 bits: 2^-13 of the largest partial sum of 128 terms, squared and
halved, with room for four. Interpreted, they add in float32."""
ORACLE_LIMIT = 1e-11


class Check(NamedTuple):
    """How far a result is from the oracle's."""

    error: float
    """DeepGEMM's metric, or of a cast the share of values and scales that differ."""
    limit: float

    @property
    def correct(self) -> bool:
        return self.error <= self.limit  # not so for NaN


@jax.jit
def difference(got: jax.Array, want: jax.Array) -> jax.Array:
    """DeepGEMM's 1 - 2 sum(xy) / sum(x^2 + y^2), which is sum((x - y)^2) / sum(x^2 + y^2): written so, float32 tells
    1e-10 from nothing."""
    x, y = got.astype(jnp.float32), want.astype(jnp.float32)
    squares = jnp.sum(x * x + y * y)
    return jnp.where(squares == 0, 0, jnp.sum((x - y) ** 2) / squares)


@jax.jit
def share_of_other_bits(got: Any, want: Any) -> jax.Array:
    """Of pairs of values and scales, or a pair of them."""
    def other(a: jax.Array, b: jax.Array) -> jax.Array:
        unsigned = {1: jnp.uint8, 4: jnp.uint32}[a.dtype.itemsize]
        bits = functools.partial(jax.lax.bitcast_convert_type, new_dtype=unsigned)
        return jnp.mean(bits(a) != bits(b))
    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(other, got, want))))


def check(case: Case, operands: tuple[jax.Array, ...], backend: Backend | None, real: bool) -> Check:
    """The larger error of the case as drawn and with its other group sizes. `real`: not interpreted."""
    draws = [operands, *([(*operands[:-1], jnp.asarray(case.other_sizes, jnp.int32))] if case.other_sizes else [])]
    return max((_check_one(case, draw, backend, real) for draw in draws),
               key=lambda found: np.inf if np.isnan(found.error) else found.error)


def _check_one(case: Case, operands: tuple[jax.Array, ...], backend: Backend | None, real: bool) -> Check:
    got = jax.jit(functools.partial(case.run, backend=backend))(*operands)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(case.oracle)(*operands)
    if case.operation == "swiglu_quantise" and real:
        # The exponential and the division of two compilers differ in the last place, so a code may be the next one.
        wide = [dequantise(values, scales, (1, 128)) for values, scales in (got, want)]
        return Check(float(difference(*wide)), BF16_LIMIT)
    if case.is_cast:
        return Check(float(share_of_other_bits(got, want)), 0)
    tensor_cores = HOPPER_F32_LIMIT if real and backend == "hopper" else F32_LIMIT
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    limit = BF16_LIMIT if pairs[0][0].dtype == jnp.bfloat16 else tensor_cores
    return Check(float(jnp.max(jnp.stack([difference(*pair) for pair in pairs]))), limit)


def check_oracle() -> float:
    """The metric between the device's float32 product, as oracles have it, and NumPy's float64.

    Raises:
      RuntimeError: they differ so much that nothing could be said of kernels.
    """
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(128, 4096)).astype(np.float32) for _ in range(2))
    got = np.asarray(jnp.dot(x, y.T, precision="highest"), np.float64)
    want = x.astype(np.float64) @ y.astype(np.float64).T
    error = float(np.sum((got - want) ** 2) / np.sum(got ** 2 + want ** 2))
    if not error < ORACLE_LIMIT:
        raise RuntimeError(f"a float32 product of {jax.devices()[0].device_kind} at precision 'highest' is {error:.1e} "
                           f"from float64, not below {ORACLE_LIMIT:g}: results can't be checked on this device")
    return error
