"""The gradient on a TPU: one kernel for the queries', which walks over keys, and one for the keys' and values', which
walks over queries.

Both make the weights again, p = exp(score - lse). With dp = dout v^T and delta = sum(dout out), the scores' gradient is
ds = p (dp - delta); then dq = ds k, dk = ds^T q and dv = p^T dout. The second kernel has keys as rows, so that nothing
is transposed, and sums the rotated keys' gradient over all heads before it leaves VMEM.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention.reference import Extent, Operands
from pallas_kernels.mla_attention.tpu_blocks import (
    VMEM_BYTES,
    Needed,
    Ref,
    Shape,
    by_need,
    head_of,
    lengthened,
    prepared,
    product,
    sees,
    specs_of,
)


def backward(operands: Operands, extent: Extent, out: jax.Array, lse: jax.Array, dout: jax.Array,
             scale: float) -> Operands:
    """See `reference.backward`."""
    s, padded = prepared(operands)
    lse = lengthened(lse, s.queries, axis=2)[:, :, None]
    out, dout = (lengthened(x.reshape(*x.shape[:2], -1), s.queries) for x in (out, dout))
    dq_nope, dq_rope, delta = _queries(s, padded, extent, dout, lse, out, scale)
    dkv, dk_rope = _keys(s, padded, extent, dout, lse, delta, scale)
    return Operands(*(gradient[:, :x.shape[1]].reshape(x.shape) for gradient, x in zip(
        (dq_nope, dq_rope, dkv, dk_rope), operands, strict=True)))


def _queries(s: Shape, operands: Operands, extent: Extent, dout: jax.Array, lse: jax.Array, out: jax.Array,
             scale: float) -> list[jax.Array]:
    """Both gradients, and delta [B, H, 1, Q]."""
    def keys(b: Any, h: Any, i: Any, j: Any, lengths_B: Ref, start_1: Ref) -> tuple:
        needed = Needed(s, lengths_B[b], start_1[0]).keys(i)
        return b, h, jnp.minimum(j, jnp.maximum(needed - 1, 0))
    specs = specs_of(s, lambda b, h, i, j, *_: (b, h, i), keys)
    return pl.pallas_call(
        functools.partial(_queries_body, s, scale), name="mla_attention_queries",
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*operands[:2], lse)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(s.rows, *s.steps),
            in_specs=[*specs.operands, specs.out, specs.row, specs.out],
            out_specs=[*specs.operands[:2], specs.row],
            scratch_shapes=[pltpu.VMEM((s.group, s.block_q, width), jnp.float32) for width in (s.nope, s.rope, 1)]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES))(
        *extent, *operands, dout, lse, out)


def _queries_body(s: Shape, scale: float, lengths_B: Ref, start_1: Ref, *refs: Ref) -> None:
    operands, (dout, lse, out, dq_nope, dq_rope, delta, sum_nope, sum_rope, delta_GQ1) = Operands(*refs[:4]), refs[4:]
    b, i, j = (pl.program_id(axis) for axis in (0, 2, 3))
    values = [slice(g * s.value, (g + 1) * s.value) for g in range(s.group)]
    needed = Needed(s, lengths_B[b], start_1[0])

    @pl.when(j == 0)
    def _():
        sum_nope[...], sum_rope[...] = jnp.zeros_like(sum_nope), jnp.zeros_like(sum_rope)
        for g, mine in enumerate(values):
            terms = dout[:, mine].astype(jnp.float32) * out[:, mine].astype(jnp.float32)
            delta_GQ1[g] = jnp.sum(terms, axis=1, keepdims=True)
            delta[g] = delta_GQ1[g].T

    def step(masked: bool) -> None:
        for g, mine in enumerate(values):
            head = head_of(s, g, operands)
            scores_QK = scale * (product(head.q_nope, head.k_nope, (1, 1)) + product(head.q_rope, head.k_rope, (1, 1)))
            weights_QK = jnp.exp(scores_QK - lse[g].T)
            if masked:
                weights_QK = jnp.where(sees(Extent(lengths_B, start_1), s, b, i, j), weights_QK, 0)
            from_values_QK = product(dout[:, mine], head.value, (1, 1))
            ds_QK = (scale * weights_QK * (from_values_QK - delta_GQ1[g])).astype(dout.dtype)
            sum_nope[g] += product(ds_QK, head.k_nope)
            sum_rope[g] += product(ds_QK, head.k_rope)
    by_need(step, j < needed.keys(i), needed.all_seen(i, j))

    @pl.when(j == s.steps[2] - 1)
    def _():
        for g in range(s.group):
            dq_nope[:, g * s.nope:(g + 1) * s.nope] = sum_nope[g].astype(dq_nope.dtype)
            dq_rope[:, g * s.rope:(g + 1) * s.rope] = sum_rope[g].astype(dq_rope.dtype)


def _keys(s: Shape, operands: Operands, extent: Extent, dout: jax.Array, lse: jax.Array, delta: jax.Array,
          scale: float) -> list[jax.Array]:
    groups, blocks_q, blocks_k = s.steps

    def queries(b: Any, j: Any, h: Any, i: Any, lengths_B: Ref, start_1: Ref) -> tuple:
        first, end = Needed(s, lengths_B[b], start_1[0]).queries(j)
        return b, h, jnp.minimum(jnp.maximum(i, first), jnp.maximum(end - 1, 0))
    specs = specs_of(s, queries, lambda b, j, h, i, *_: (b, h, j))
    return pl.pallas_call(
        functools.partial(_keys_body, s, scale), name="mla_attention_keys",
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[2:]],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(s.rows, blocks_k, groups, blocks_q),
            in_specs=[*specs.operands, specs.out, specs.row, specs.row], out_specs=specs.operands[2:],
            scratch_shapes=[*(pltpu.VMEM((s.group, s.block_k, width), jnp.float32) for width in (s.nope, s.value)),
                            pltpu.VMEM((s.block_k, s.rope), jnp.float32)]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES))(
        *extent, *operands, dout, lse, delta)


def _keys_body(s: Shape, scale: float, lengths_B: Ref, start_1: Ref, *refs: Ref) -> None:
    operands, (dout, lse, delta, dkv, dk_rope, sum_nope, sum_value, sum_rope) = Operands(*refs[:4]), refs[4:]
    b, j, h, i = (pl.program_id(axis) for axis in range(4))
    groups, blocks_q = s.steps[:2]
    needed = Needed(s, lengths_B[b], start_1[0])
    first, end = needed.queries(j)

    @pl.when(i == 0)
    def _():
        sum_nope[...], sum_value[...] = jnp.zeros_like(sum_nope), jnp.zeros_like(sum_value)

    @pl.when((h == 0) & (i == 0))
    def _():
        sum_rope[...] = jnp.zeros_like(sum_rope)

    def step(masked: bool) -> None:
        for g in range(s.group):
            head = head_of(s, g, operands)
            mine = dout[:, g * s.value:(g + 1) * s.value]
            scores_KQ = scale * (product(head.k_nope, head.q_nope, (1, 1)) + product(head.k_rope, head.q_rope, (1, 1)))
            weights_KQ = jnp.exp(scores_KQ - lse[g])
            if masked:
                seen_KQ = sees(Extent(lengths_B, start_1), s, b, i, j, queries_last=True)
                weights_KQ = jnp.where(seen_KQ, weights_KQ, 0)
            sum_value[g] += product(weights_KQ.astype(dout.dtype), mine)
            ds_KQ = (scale * weights_KQ * (product(head.value, mine, (1, 1)) - delta[g])).astype(dout.dtype)
            sum_nope[g] += product(ds_KQ, head.q_nope)
            sum_rope[...] += product(ds_KQ, head.q_rope)
    by_need(step, (first <= i) & (i < end), needed.all_seen(i, j))

    @pl.when(i == blocks_q - 1)
    def _():
        for g in range(s.group):
            at = g * (s.nope + s.value)
            dkv[:, at:at + s.nope] = sum_nope[g].astype(dkv.dtype)
            dkv[:, at + s.nope:at + s.nope + s.value] = sum_value[g].astype(dkv.dtype)

    @pl.when((h == groups - 1) & (i == blocks_q - 1))
    def _():
        dk_rope[...] = sum_rope[...].astype(dk_rope.dtype)
