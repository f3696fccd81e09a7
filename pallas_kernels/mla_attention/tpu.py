"""The TPU backend: blocks of queries by blocks of keys, with the running softmax of each query in VMEM.

Heads lie beside each other in the last dimension, as projections give them: nothing is transposed. A step takes as many
heads as fill whole lanes with their rotated queries, two of DeepSeek-V3's. Blocks of keys that no query sees are steps
that do nothing: they point to the block that is in VMEM already.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention.reference import Extent, Operands
from pallas_kernels.mla_attention.tpu_backward import backward
from pallas_kernels.mla_attention.tpu_blocks import (
    LANES,
    VMEM_BYTES,
    Needed,
    Ref,
    Shape,
    by_need,
    head_of,
    heads_of_step,
    prepared,
    product,
    sees,
    specs_of,
)

if TYPE_CHECKING:
    from pallas_kernels.mla_attention.api import Problem

__all__ = ["backward", "forward", "misfit"]

LOWEST = -1e30
"""Below all scores, and finite: a query that has seen nothing yet fades by 1."""


def misfit(problem: Problem) -> str:
    """What the kernels need and the problem is not; empty if it is served."""
    if problem.dtype not in ("bfloat16", "float32"):
        return "bfloat16 or float32"
    if problem.nope % LANES or problem.value % LANES:
        return f"keys and values of heads divisible by {LANES}"
    if not problem.some or not problem.rope:
        return "rotated keys, and some rows"
    group = heads_of_step(problem.rope)
    return "" if problem.heads % group == 0 else f"heads divisible by {group}"


def forward(operands: Operands, extent: Extent, scale: float) -> tuple[jax.Array, jax.Array]:
    """See `reference.forward`."""
    queries = operands.q_nope.shape[1]
    shape, padded = prepared(operands)
    out, lse = _forward(shape, padded, extent, scale)
    return (out.reshape(*out.shape[:2], shape.heads, shape.value)[:, :queries], lse[:, :, 0, :queries])


def _forward(s: Shape, operands: Operands, extent: Extent, scale: float) -> tuple[jax.Array, jax.Array]:
    def keys(b: Any, h: Any, i: Any, j: Any, lengths_B: Ref, start_1: Ref) -> Any:
        needed = Needed(s, lengths_B[b], start_1[0]).keys(i)
        return jnp.minimum(j, jnp.maximum(needed - 1, 0))
    specs = specs_of(s, lambda b, h, i, j, *_: (b, h, i), lambda b, h, i, j, *more: (b, h, keys(b, h, i, j, *more)))
    return pl.pallas_call(
        functools.partial(_body, s, scale), name="mla_attention",
        out_shape=[jax.ShapeDtypeStruct((s.rows, s.queries, s.heads * s.value), operands.kv.dtype),
                   jax.ShapeDtypeStruct((s.rows, s.heads, 1, s.queries), jnp.float32)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(s.rows, *s.steps), in_specs=specs.operands, out_specs=[specs.out, specs.row],
            scratch_shapes=[pltpu.VMEM((s.group, s.block_q, s.value), jnp.float32),
                            *[pltpu.VMEM((s.group, s.block_q, 1), jnp.float32)] * 2]),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES))(*extent, *operands)


def _body(s: Shape, scale: float, lengths_B: Ref, start_1: Ref, *refs: Ref) -> None:
    operands, (out, lse, sums, tops, totals) = Operands(*refs[:4]), refs[4:]
    b, i, j = (pl.program_id(axis) for axis in (0, 2, 3))
    needed = Needed(s, lengths_B[b], start_1[0])

    @pl.when(j == 0)
    def _():
        sums[...], totals[...] = jnp.zeros_like(sums), jnp.zeros_like(totals)
        tops[...] = jnp.full_like(tops, LOWEST)

    def step(masked: bool) -> None:
        for g in range(s.group):
            head = head_of(s, g, operands)
            scores_QK = scale * (product(head.q_nope, head.k_nope, (1, 1)) + product(head.q_rope, head.k_rope, (1, 1)))
            if masked:
                scores_QK = jnp.where(sees(Extent(lengths_B, start_1), s, b, i, j), scores_QK, -jnp.inf)
            top = jnp.maximum(tops[g], jnp.max(scores_QK, axis=1, keepdims=True))
            fade, weights_QK = jnp.exp(tops[g] - top), jnp.exp(scores_QK - top)
            tops[g] = top
            totals[g] = totals[g] * fade + jnp.sum(weights_QK, axis=1, keepdims=True)
            sums[g] = sums[g] * fade + product(weights_QK.astype(head.value.dtype), head.value)
    by_need(step, j < needed.keys(i), needed.all_seen(i, j))

    @pl.when(j == s.steps[2] - 1)
    def _():
        for g in range(s.group):
            total = jnp.where(totals[g] > 0, totals[g], 1)
            out[:, g * s.value:(g + 1) * s.value] = (sums[g] / total).astype(out.dtype)
            lse[g] = (tops[g] + jnp.log(total)).T
