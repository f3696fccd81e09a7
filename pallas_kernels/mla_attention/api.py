"""Picks the backend of causal attention for prefill and training."""

from __future__ import annotations

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mla_attention.reference import Extent, Operands
from pallas_kernels.targets import Backend, backend_module, dispatch


@functools.partial(jax.jit, static_argnames=("scale", "backend"), inline=True)
@jax.named_scope("mla_attention")
def mla_attention(q_nope: jax.Array, q_rope: jax.Array, kv: jax.Array, k_rope: jax.Array,
                  lengths_B: jax.Array | None = None, start: jax.Array | int = 0, *, scale: float,
                  backend: Backend | None = None) -> jax.Array:
    """softmax(scale * (q^C.k^C + q^R.k^R)) v with a causal mask (arXiv 2412.19437, equation 10), and its gradient.

    Neither scores nor rotated keys of each head are ever in device memory; the backward makes scores again, from the
    logarithm of the sum of their exponentials. It takes two kernels, one for the queries' gradients and one for the
    others', so every sum has one order and results are the same each time. Blocks of keys that no query of a block sees
    are neither read nor multiplied.

    Arithmetic floor: 2 B H pairs (N + R + V) FLOPs forward, and 2 B H pairs (3 (N + R) + 2 V) backward, of which the
    two kernels do 1.4 times as many; of a whole sequence pairs = Q (Q + 1) / 2. With 4096 tokens and 128 heads of
    DeepSeek-V3 that is 687 and 1787 GFLOP, 695 and 1807 us on an H100 (989 TFLOP/s).

    Args:
      q_nope: [B, Q, H, N]; q_rope: [B, Q, H, R], rotated.
      kv: [B, T, H, N + V]: keys and values of each head beside each other, as `kv_b_proj` gives them.
      k_rope: [B, T, R], rotated, shared by all heads.
      lengths_B: int32 [B], tokens in use, of T; None: all. What follows must be finite. Queries at positions from there
        on are padding: they see nothing, their results are zeros, and they give nothing to any gradient.
      start: int32, the position of the first query among the keys, as in a chunk of a prompt.
      scale: of the scores.
      backend: None picks by the platform that the program is compiled for: Hopper's or TPU's kernels where they serve,
        else the reference, and says so once.

    Returns:
      [B, Q, H, V] in the operands' dtype. Scores, softmax and sums in float32; weights, and in the backward the scores'
      gradients, are rounded to the operands' dtype before they are multiplied.

    Raises:
      ValueError: types that differ, or a problem that the named `backend` does not serve.
    """
    operands = Operands(q_nope, q_rope, kv, k_rope)
    rows, queries, heads, _ = q_nope.shape
    chex.assert_shape(operands, ((rows, queries, heads, None), (rows, queries, heads, None), (rows, None, heads, None),
                                 (rows, kv.shape[1], q_rope.shape[3])))
    if len({x.dtype for x in operands}) > 1:
        raise ValueError(f"operands must have one type, not {', '.join(x.dtype.name for x in operands)}")
    if kv.shape[3] <= q_nope.shape[3]:
        raise ValueError(f"kv ({kv.shape[3]} values a head) must have a value behind its key of {q_nope.shape[3]}")
    lengths_B = jnp.full((rows,), kv.shape[1], jnp.int32) if lengths_B is None else lengths_B.astype(jnp.int32)
    return _attend(scale, backend, operands, Extent(lengths_B, jnp.asarray(start, jnp.int32).reshape(1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale: float, backend: Backend | None, operands: Operands, extent: Extent) -> jax.Array:
    return _forward(scale, backend, operands, extent)[0]


def _forward(scale: float, backend: Backend | None, operands: Operands, extent: Extent) -> tuple[jax.Array, tuple]:
    def run(name: Backend, *arguments: tuple) -> tuple[jax.Array, jax.Array]:
        return backend_module("mla_attention", name).forward(*arguments, scale)
    out, lse = dispatch(run, _problem(operands), backend, operands, extent)
    return out, (operands, extent, out, lse)


def _backward(scale: float, backend: Backend | None, kept: tuple, dout: jax.Array) -> tuple:
    def run(name: Backend, *arguments: tuple) -> Operands:
        return backend_module("mla_attention", name).backward(*arguments, scale)
    gradients = dispatch(run, _problem(kept[0]), backend, *kept, dout)
    return gradients, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), kept[1])


_attend.defvjp(_forward, _backward)


def _problem(operands: Operands) -> Problem:
    (rows, queries, heads, nope), (_, keys, _, both) = operands.q_nope.shape, operands.kv.shape
    return Problem(heads, nope, operands.k_rope.shape[2], both - nope, operands.kv.dtype.name,
                   bool(rows * queries * heads * keys))


class Problem(NamedTuple):
    """What the choice of a backend depends on."""

    heads: int
    nope: int
    rope: int
    value: int
    dtype: str
    some: bool
    """Whether there is anything at all."""

    def misfit(self, backend: Backend) -> str:
        """See `targets.Problem`."""
        return "" if backend == "reference" else backend_module("mla_attention", backend).misfit(self)
