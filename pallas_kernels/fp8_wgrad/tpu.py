"""The TPU backend of the weight gradient: tiles of a group's matrix stay in VMEM while its tokens pass by."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.fp8_matmul.reference import BLOCK
from pallas_kernels.fp8_matmul.tpu import VMEM_BYTES, even_tile, scaled_product

ROWS, COLUMNS, TOKENS = 512, 1024, 512
"""Of a tile and a step, at most; a step's tokens are of one group."""


def gradient(x_AM: jax.Array, x_scales: jax.Array, y_BM: jax.Array, y_scales: jax.Array,
             accumulate_AB: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `api.fp8_wgrad`: one group that has every token."""
    more = ((0, 0), (0, -x_AM.shape[1] % BLOCK))
    x_AM, y_BM = jnp.pad(x_AM, more), jnp.pad(y_BM, more)
    tokens = next(tokens for tokens in (TOKENS, 256, BLOCK) if x_AM.shape[1] % tokens == 0)
    steps = jnp.full((1,), x_AM.shape[1] // tokens, jnp.int32)
    return _gradient(x_AM, x_scales, y_BM, y_scales, steps, accumulate_AB, tokens, dtype)[0]


def grouped_gradient(x_AP: jax.Array, x_scales: jax.Array, y_BP: jax.Array, y_scales: jax.Array,
                     group_sizes_E: jax.Array, alignment: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `grouped_fp8_matmul.api.grouped_fp8_wgrad`."""
    return _gradient(x_AP, x_scales, y_BP, y_scales, group_sizes_E // alignment, None, alignment, dtype)


def _visits(steps_E: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(visits, the group of each, its step or -1): an empty group is visited once, to be filled with zero."""
    visits_E = jnp.maximum(steps_E, 1)
    ends_E = jnp.cumsum(visits_E)
    visit = jnp.arange(most + steps_E.shape[0] - 1)
    group = jnp.minimum(jnp.searchsorted(ends_E, visit, side="right", method="compare_all"), steps_E.shape[0] - 1)
    first_E = jnp.cumsum(steps_E) - steps_E
    step = first_E[group] + visit - (ends_E - visits_E)[group]
    step = jnp.where(steps_E[group] > 0, step, -1)
    return ends_E[-1:].astype(jnp.int32), group.astype(jnp.int32), step.astype(jnp.int32)


def _gradient(x_AP: jax.Array, x_scales: jax.Array, y_BP: jax.Array, y_scales: jax.Array, steps_E: jax.Array,
              accumulate_AB: jax.Array | None, tokens: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[E, A, B]: each group's steps of `tokens` tokens, added up; `accumulate_AB` is for one group."""
    (a, terms), b = x_AP.shape, y_BP.shape[0]
    rows, columns, scales = even_tile(a, ROWS), even_tile(b, COLUMNS), tokens // BLOCK
    visits = _visits(steps_E, terms // tokens)
    added = () if accumulate_AB is None else (accumulate_AB,)

    def body(visits_1, group, step, x_ref, x_scales_ref, y_ref, y_scales_ref, *refs):
        *added, out_ref, sum_ref = refs
        visit, last = pl.program_id(2), visits_1[0] - 1
        mine = group[visit]

        @pl.when((visit == 0) | (group[jnp.maximum(visit - 1, 0)] != mine))
        def _():
            sum_ref[...] = added[0][...] if added else jnp.zeros_like(sum_ref)

        @pl.when((visit <= last) & (step[visit] >= 0))
        def _():
            for k in range(scales):
                at = pl.ds(k * BLOCK, BLOCK)
                sum_ref[...] += scaled_product(x_ref[:, at], x_scales_ref[k], y_ref[:, at], y_scales_ref[k])

        @pl.when((visit == last) | ((visit < last) & (group[jnp.minimum(visit + 1, last)] != mine)))
        def _():
            out_ref[...] = sum_ref[...].astype(out_ref.dtype)

    def tokens_of(visit, visits_1, step):
        # Visits past the last one point to what is in VMEM already.
        return jnp.maximum(step[jnp.minimum(visit, visits_1[0] - 1)], 0)
    call = pl.pallas_call(
        body, name="fp8_gradient",
        out_shape=jax.ShapeDtypeStruct((steps_E.shape[0], a, b), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(a, rows), pl.cdiv(b, columns), visits[1].shape[0]),
            in_specs=[
                pl.BlockSpec((rows, tokens), lambda i, j, k, n, group, step: (i, tokens_of(k, n, step))),
                pl.BlockSpec((scales, 1, rows), lambda i, j, k, n, group, step: (tokens_of(k, n, step), 0, i)),
                pl.BlockSpec((columns, tokens), lambda i, j, k, n, group, step: (j, tokens_of(k, n, step))),
                pl.BlockSpec((scales, 1, columns), lambda i, j, k, n, group, step: (tokens_of(k, n, step), 0, j)),
                *(pl.BlockSpec((rows, columns), lambda i, j, k, n, group, step: (i, j)) for _ in added)],
            out_specs=pl.BlockSpec((None, rows, columns),
                                   lambda i, j, k, n, group, step: (group[jnp.minimum(k, n[0] - 1)], i, j)),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"),
                                             vmem_limit_bytes=VMEM_BYTES))
    return call(*visits, x_AP, x_scales.T[:, None], y_BP, y_scales.T[:, None], *added)
