"""LogFMT-nBit, DeepSeek-V3's logarithmic format for the combine: n bits a number, in tiles of 1x128.

With l = log|x| of a tile's numbers that are not zero, max the largest and min the smallest, but no less than
max - log(2^32), and Step = (max - min) / (2^(n-1) - 2):
- the leading bit is the sign, the others a code K: 0 is zero, whose sign is kept, and K from 1 to 2^(n-1) - 1 is
  exp(min + Step * (K - 1)). Any base serves; here it is 2.
- a number gets the code whose value is nearest, as numbers and not as logarithms; so do numbers below min, which may
  become zero or min. A tie goes to the larger magnitude.
- A tile of zeros has the ends zero, and one of equal magnitudes the Step 0: it decodes to what it was.
- All of a tile with inf or NaN decodes to NaN, so whoever reads it sees NaN.
- The last tile of a row may be shorter: it is filled up with zeros, which do not change its ends.
- Magnitudes below 2^-126 count as zero.

Decoded values are those of the formula within a factor of 1 +- 2^-16: float32 logarithms and powers of 32 octaves lose
as much, differently on each machine, and bfloat16 keeps less. Codes are the nearest for values that are off by so much.

Packing: a row has planes, of the codes' low 8 bits, and then of as many more as there are in groups of 8, 4, 2 and 1
bits, largest first. A plane of p bits has 16 p bytes for a tile, and its byte j holds code j in its low p bits, then
code j + 16 p, and so on: parts of a tile are shifted over each other whole, and bytes stay where codes were. A tile has
16 n bytes of codes and 2 numbers of x's dtype: for bfloat16 164 bytes with n = 10, where bfloat16 itself has 256.

Source: "Insights into DeepSeek-V3", section 3.2. The paper does not say how codes are packed or how min and max travel.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.logfmt.reference import TILE
from pallas_kernels.targets import Backend, backend_module, dispatch

BITS = range(4, 17)
"""Sign included."""


@jax.named_scope("logfmt_encode")
def encode(x: jax.Array, bits: int, *, backend: Backend | None = None) -> tuple[jax.Array, jax.Array]:
    """Packed codes and the ends of each tile's range.

    Args:
      x: [..., K] bfloat16 or float32.
      bits: n, from 4 to 16.
      backend: None picks by the platform that the program is compiled for: Hopper's or TPU's kernel where it serves,
        else the reference, and says so once.

    Returns:
      codes uint8 [..., ceil(K / 128) * 16 n], packed as above; and ends [..., 2 ceil(K / 128)] in x's dtype: the
      magnitudes of code 1 of all tiles, then those of the last code.

    Raises:
      ValueError: another dtype or n, no dimension, or a shape that the named `backend` does not serve.
    """
    if bits not in BITS:
        raise ValueError(f"LogFMT has from {BITS[0]} to {BITS[-1]} bits, not {bits}")
    if x.dtype not in (jnp.bfloat16, jnp.float32) or x.ndim < 1:
        raise ValueError(f"LogFMT takes bfloat16 or float32 [..., K], not {x.dtype} {x.shape}")
    return _run(_Problem("encode", math.prod(x.shape[:-1]), x.shape[-1], bits, x.dtype), backend, x)


@jax.named_scope("logfmt_decode")
def decode(codes: jax.Array, ends: jax.Array, *, width: int | None = None, dtype: jax.typing.DTypeLike | None = None,
           backend: Backend | None = None) -> jax.Array:
    """The numbers that codes stand for.

    Args:
      codes, ends: as `encode` returns them; their shapes tell n.
      width: K, if 128 does not divide it.
      dtype: bfloat16 or float32, by default that of `ends`.
      backend: as in `encode`.

    Returns:
      [..., K], computed in float32 and rounded to `dtype`.

    Raises:
      ValueError: codes and ends do not fit each other or `width`; another dtype; or a shape that the named `backend`
        does not serve.
    """
    tiles, dtype = ends.shape[-1] // 2, jnp.dtype(ends.dtype if dtype is None else dtype)
    bits, rest = divmod(codes.shape[-1], max(tiles, 1) * TILE // 8)
    width = tiles * TILE if width is None else width
    if not tiles:
        return jnp.zeros((*codes.shape[:-1], 0), dtype)
    if rest or bits not in BITS or ends.shape[-1] % 2 or codes.shape[:-1] != ends.shape[:-1]:
        raise ValueError(f"codes {codes.shape} and ends {ends.shape} are not [..., tiles * 16 n] and [..., 2 tiles]")
    if -(-width // TILE) != tiles:
        raise ValueError(f"{tiles} tiles of {TILE} do not make a width of {width}")
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"LogFMT is decoded to bfloat16 or float32, not {dtype}")
    return _run(_Problem("decode", math.prod(codes.shape[:-1]), width, bits, dtype), backend, codes, ends)


class _Problem(NamedTuple):
    """What to do, and all that the choice of a backend depends on."""

    operation: Literal["encode", "decode"]
    rows: int
    width: int
    bits: int
    dtype: Any
    """Of what is encoded or decoded."""

    def misfit(self, backend: Backend) -> str:
        """See `targets.Problem`."""
        if backend == "reference":
            return ""
        return backend_module("logfmt", backend).misfit(self.rows, self.width, self.bits, self.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)  # so that a model's many equal casts are traced once
def _run(problem: _Problem, backend: Backend | None, *operands: jax.Array) -> Any:
    return dispatch(functools.partial(_compute, problem), problem, backend, *operands)


def _compute(problem: _Problem, backend: Backend, *operands: jax.Array) -> Any:
    module = backend_module("logfmt", backend)
    if problem.operation == "encode":
        return module.encode(*operands, problem.bits)
    return module.decode(*operands, problem.bits, problem.width, problem.dtype)
