"""Problems of causal attention, and what it and its gradient give, in NumPy float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.mla_attention import mla_attention
from pallas_kernels.targets import Backend

SCALE = 0.1
NAMES = "out", "dq_nope", "dq_rope", "dkv", "dk_rope"


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of these lengths, and queries that begin at `start`."""

    queries: int
    keys: int
    lengths: tuple[int, ...]
    start: int = 0
    heads: int = 2
    nope: int = 128
    rope: int = 64
    value: int = 128
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Operands, the gradient of the result, and what they should give: [value, what roundings are relative to]."""

    operands: list[np.ndarray]
    dout: np.ndarray
    want: list[np.ndarray]


def draw(case: Case) -> Drawn:
    """Numbers of order one; padding has ordinary numbers too."""
    rng = np.random.default_rng(0)
    rows, both = len(case.lengths), case.nope + case.value
    shapes = ((rows, case.queries, case.heads, case.nope), (rows, case.queries, case.heads, case.rope),
              (rows, case.keys, case.heads, both), (rows, case.keys, case.rope),
              (rows, case.queries, case.heads, case.value))
    dtype = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[case.dtype]
    *operands, dout = (rng.normal(size=shape).astype(dtype) for shape in shapes)
    return Drawn(operands, dout, oracle(case, *(x.astype(np.float64) for x in (*operands, dout))))


def oracle(case: Case, q_nope: np.ndarray, q_rope: np.ndarray, kv: np.ndarray, k_rope: np.ndarray,
           dout: np.ndarray) -> list[np.ndarray]:
    """Head by head.

    Magnitudes, of which each rounding is a part: of the weights and of the result in `out` and in the values' gradient;
    of the others' gradients, of `ds` twice (once through the weights), of `delta` by that of `out`, and of the result.
    """
    n = case.nope
    out, *gradients = (np.zeros((2, *x.shape)) for x in (dout, q_nope, q_rope, kv, k_rope))
    dq_nope, dq_rope, dkv, dk_rope = gradients
    position = case.start + np.arange(case.queries)[:, None]
    for b, length in enumerate(case.lengths):
        seen = (np.arange(case.keys) <= position) & (position < length)
        for h in range(case.heads):
            query = np.concatenate([q_nope[b, :, h], q_rope[b, :, h]], axis=1)
            key, value = np.concatenate([kv[b, :, h, :n], k_rope[b]], axis=1), kv[b, :, h, n:]
            scores = np.where(seen, np.exp(SCALE * query @ key.T), 0)
            weights = scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-300)
            mine = dout[b, :, h]
            out[:, b, :, h] = weights @ value, weights @ np.abs(value)
            terms = mine * out[0, b, :, h]
            ds = SCALE * weights * (mine @ value.T - terms.sum(axis=1, keepdims=True))
            rough = 2 * np.abs(ds) + SCALE * weights * np.abs(terms).sum(axis=1, keepdims=True)
            dq, dk = (np.stack([x @ y, r @ np.abs(y) + np.abs(x @ y)])
                      for x, r, y in ((ds, rough, key), (ds.T, rough.T, query)))
            dq_nope[:, b, :, h], dq_rope[:, b, :, h] = dq[..., :n], dq[..., n:]
            dkv[:, b, :, h, :n] = dk[..., :n]
            dkv[:, b, :, h, n:] = weights.T @ mine, 2 * weights.T @ np.abs(mine)
            dk_rope[:, b] += dk[..., n:]
    out[1] += np.abs(out[0])
    return [out, *gradients]


def check(case: Case, drawn: Drawn, backend: Backend | None) -> None:
    """Each rounding to bfloat16 is 2^-8 of its magnitude at most; float32 sums add 1e-5."""
    lengths, start = jnp.asarray(case.lengths, jnp.int32), jnp.int32(case.start)

    @jax.jit
    def run(operands: list[jax.Array], dout: jax.Array, lengths: jax.Array, start: jax.Array) -> tuple:
        out, pull = jax.vjp(lambda *x: mla_attention(*x, lengths, start, scale=SCALE, backend=backend), *operands)
        return out, *pull(dout)
    found = run([jnp.asarray(x) for x in drawn.operands], jnp.asarray(drawn.dout), lengths, start)
    for name, got, (want, magnitude) in zip(NAMES, found, drawn.want, strict=True):
        assert got.dtype == case.dtype, name
        assert got.shape == want.shape, name
        limit = magnitude * ((2 ** -8 if case.dtype == "bfloat16" else 0) + 1e-5)
        np.testing.assert_array_less(np.abs(np.asarray(got, np.float64) - want), limit + 1e-30, err_msg=name)
