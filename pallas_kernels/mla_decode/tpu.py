"""The TPU backend: a row at a time, its pages through two buffers in VMEM.

A block of pages is copied while the one before is multiplied, the first block of the next row too, so that copies never
pause between rows. Only pages in use are copied. All heads and queries of a row are the rows of the products. The
grid's first dimension halves the rows between the two cores of a chip that has two (v5p); on others the halves follow
each other.

Scales of 8-bit latents are not multiplied into them: a scale belongs to an entry, which is a column of the scores, so
it multiplies the scores of its tile, and the weights before their product with the codes. bfloat16 holds all codes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_decode.reference import TILE, Attended, Pages, QuantizedPages

if TYPE_CHECKING:
    from pallas_kernels.mla_decode.api import Problem

BLOCK = 512
"""Entries that are multiplied at once, at most, unless a page has more."""
MOST_ROWS, MOST_TABLE = 1024, 2 ** 17
"""The latter takes half of the memory for scalars: 512 rows of 32k entries in pages of 128."""
PACKED_ROWS = {"bfloat16": 16, "float32": 8}
"""Rows of a register."""
PACKED_CODES = 32
CORES = 2
VMEM_BYTES = 48 * 2 ** 20
"""Asked for; the largest block has half of it. Ironwood has 64 MiB, the others more."""

Ref = Any


def misfit(problem: Problem) -> str:
    """What the kernel needs and the problem is not; empty if it is served."""
    if problem.dtype not in PACKED_ROWS:
        return "bfloat16 or float32"
    unit = PACKED_CODES if problem.quantized else PACKED_ROWS[problem.dtype]
    if not problem.table or not problem.rope or problem.latent % TILE or problem.page % unit:
        return f"a latent divisible by {TILE}, a rotated part, pages divisible by {unit}, and some rows"
    if not 0 < problem.rows <= MOST_ROWS or problem.table > MOST_TABLE:
        return f"at most {MOST_ROWS} queries times heads, and tables of at most {MOST_TABLE} pages in all"
    return ""


class _Order(NamedTuple):
    """In which blocks are copied: scalars that the copies of the next block are found by."""

    table: jax.Array
    """The tables of all rows in one dimension: with two, scalars' memory would pad the second."""
    seen: jax.Array
    """Entries that each query sees, likewise."""
    pages_B: jax.Array
    """Pages in use."""
    before_B: jax.Array
    """Blocks of the same core's earlier rows: a block's turn says which buffer it takes."""
    next_B: jax.Array
    """The same core's next row that has entries, -1 for none."""


def _order(table_BN: jax.Array, seen_BQ: jax.Array, page: int, block: int, cores: int) -> _Order:
    used_KB = jnp.max(seen_BQ, axis=1).reshape(cores, -1)
    blocks_KB, none = pl.cdiv(used_KB, block), used_KB.size
    here_KB = jnp.where(used_KB > 0, jnp.arange(none).reshape(cores, -1), none)
    after_KB = jnp.pad(here_KB[:, 1:], ((0, 0), (0, 1)), constant_values=none)
    next_KB = jax.lax.cummin(after_KB, axis=1, reverse=True)
    parts = (table_BN, seen_BQ, pl.cdiv(used_KB, page), jnp.cumsum(blocks_KB, axis=1) - blocks_KB,
             jnp.where(next_KB == none, -1, next_KB))
    return _Order(*(part.reshape(-1).astype(jnp.int32) for part in parts))


def attend(query_BRW: jax.Array, pages: Pages, table_BN: jax.Array, seen_BQ: jax.Array, latent: int,
           scale: float) -> Attended:
    """See `reference.attend`."""
    (rows, count, width), queries = query_BRW.shape, seen_BQ.shape[1]
    arrays = tuple(pages) if isinstance(pages, QuantizedPages) else (pages,)
    page = arrays[0].shape[1]
    pages_of_block = max(1, BLOCK // page)
    cores = CORES if rows % CORES == 0 else 1
    heads = count // queries
    more = -count % PACKED_ROWS[query_BRW.dtype.name]
    query_BRW = jnp.pad(query_BRW, ((0, 0), (0, more), (0, 0)))
    order = _order(table_BN, seen_BQ, page, pages_of_block * page, cores)

    def at(core: Any, i: Any, *_: Ref) -> tuple:
        return core * (rows // cores) + i, 0, 0
    body = functools.partial(_body, rows=rows, heads=heads, latent=latent, scale=scale)
    by_row = functools.partial(pl.BlockSpec, index_map=at)
    padded = count + more
    out_BRC, lse_B1R = pl.pallas_call(
        body, name="mla_decode",
        out_shape=[jax.ShapeDtypeStruct((rows, padded, latent), query_BRW.dtype),
                   jax.ShapeDtypeStruct((rows, 1, padded), jnp.float32)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(order), grid=(cores, rows // cores),
            in_specs=[by_row((None, padded, width)), *(pl.BlockSpec(memory_space=pltpu.HBM) for _ in arrays)],
            out_specs=[by_row((None, padded, latent)), by_row((None, 1, padded))],
            scratch_shapes=[*(pltpu.VMEM((2, pages_of_block, *a.shape[1:]), a.dtype) for a in arrays),
                            pltpu.SemaphoreType.DMA((2,)), pltpu.VMEM((padded, latent), jnp.float32),
                            pltpu.VMEM((padded, 1), jnp.float32), pltpu.VMEM((padded, 1), jnp.float32)]),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"),
                                             vmem_limit_bytes=VMEM_BYTES))(
        *order, query_BRW, *arrays)
    return Attended(out_BRC[:, :count], lse_B1R[:, 0, :count])


def _body(table: Ref, seen: Ref, pages_B: Ref, before_B: Ref, next_B: Ref, query: Ref, *refs: Ref, rows: int,
          heads: int, latent: int, scale: float) -> None:
    """One row: every block of its pages."""
    arrays = (len(refs) - 6) // 2
    sources, (out, lse), buffers = refs[:arrays], refs[arrays:arrays + 2], refs[arrays + 2:-4]
    arrived, total_out, top, total = refs[-4:]
    row = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    each, most, queries = buffers[0].shape[1], table.shape[0] // rows, seen.shape[0] // rows

    def copies(of: Any, block: Any, turn: Any, act: str) -> None:
        """Starts or awaits the copies of a block's pages that are in use."""
        slot = jax.lax.rem(turn, 2)

        @pl.loop(0, jnp.minimum(each, pages_B[of] - block * each))
        def _(i):
            page = table[of * most + block * each + i]
            for source, buffer in zip(sources, buffers, strict=True):
                getattr(pltpu.make_async_copy(source.at[page], buffer.at[slot, i], arrived.at[slot]), act)()
    blocks = pl.cdiv(pages_B[row], each)

    @pl.when((before_B[row] == 0) & (blocks > 0))
    def _():
        copies(row, 0, 0, "start")
    total_out[...] = jnp.zeros_like(total_out)
    top[...] = jnp.full_like(top, jnp.finfo(jnp.float32).min)
    total[...] = jnp.zeros_like(total)
    seen_R1 = _seen([seen[row * queries + q] for q in range(queries)], heads, query.shape[0])

    @pl.loop(0, blocks)
    def _(block):
        turn = before_B[row] + block
        last = block + 1 == blocks
        following = jnp.where(last, next_B[row], row)

        @pl.when(following >= 0)
        def _():
            copies(following, jnp.where(last, 0, block + 1), turn + 1, "start")
        copies(row, block, turn, "wait")
        slot, first = jax.lax.rem(turn, 2), block * each * buffers[0].shape[2]
        _attend_block([buffer.at[slot] for buffer in buffers], query, seen_R1 - first, latent, scale, total_out, top,
                      total)
    some = total[...] > 0
    sums = jnp.where(some, total[...], 1)
    out[...] = (total_out[...] / sums).astype(out.dtype)
    lse[...] = jnp.where(some, top[...] + jnp.log(sums), -jnp.inf).T


def _seen(seen_Q: list[Any], heads: int, rows: int) -> jax.Array:
    """int32 [R, 1]: entries that each row of the queries sees; of rows that are padding, as many as the last."""
    index = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    seen_R1 = jnp.full((rows, 1), seen_Q[0])
    for q, seen in enumerate(seen_Q):
        seen_R1 = jnp.where(index >= q * heads, seen, seen_R1)
    return seen_R1


def _attend_block(block: list[Ref], query: Ref, seen_R1: jax.Array, latent: int, scale: float, total_out: Ref, top: Ref,
                  total: Ref) -> None:
    """Adds a block of entries to the sums of the row."""
    entries = block[0].shape[0] * block[0].shape[1]
    in_use_E1 = jax.lax.broadcasted_iota(jnp.int32, (entries, 1), 0) < jnp.max(seen_R1)
    parts = _parts(block, latent, query.shape[1], query.dtype, in_use_E1)
    scores_RE = functools.reduce(jnp.add, (
        part.scaled(_product(query[:, part.first:part.first + part.keys_EK.shape[1]], part.keys_EK, 1))
        for part in parts)) * scale
    entry_RE = jax.lax.broadcasted_iota(jnp.int32, scores_RE.shape, 1)
    scores_RE = jnp.where(entry_RE < seen_R1, scores_RE, -jnp.inf)
    new_top = jnp.maximum(top[...], jnp.max(scores_RE, axis=1, keepdims=True))
    fade, weights_RE = jnp.exp(top[...] - new_top), jnp.exp(scores_RE - new_top)
    top[...] = new_top
    total[...] = total[...] * fade + jnp.sum(weights_RE, axis=1, keepdims=True)
    for part in parts:
        width = min(part.keys_EK.shape[1], latent - part.first)
        if width > 0:
            at = slice(part.first, part.first + width)
            weighted = _product(part.scaled(weights_RE).astype(query.dtype), part.keys_EK, 0)
            total_out[:, at] = total_out[:, at] * fade + weighted


class _Part(NamedTuple):
    """Some columns of a block of entries that share a scale, if they have one."""

    first: int
    keys_EK: jax.Array
    scales_1E: jax.Array | None

    def scaled(self, values_RE: jax.Array) -> jax.Array:
        return values_RE if self.scales_1E is None else values_RE * self.scales_1E


def _parts(block: list[Ref], latent: int, width: int, dtype: Any, in_use_E1: jax.Array) -> list[_Part]:
    """The tiles of the latents, and the rotated keys; zeros for entries that are not in use."""
    def flat(ref: Ref, at: slice) -> jax.Array:
        keys = ref[:, :, at].reshape(-1, ref[:, :, at].shape[-1]).astype(dtype)
        return jnp.where(in_use_E1, keys, 0)
    if len(block) == 1:
        return [_Part(0, flat(block[0], slice(0, latent)), None),
                _Part(latent, flat(block[0], slice(latent, width)), None)]
    codes, scales, rope = block
    in_use_1E = in_use_E1.T
    parts = []
    for g in range(latent // TILE):
        scales_1E = jnp.concatenate([scales[i, g:g + 1] for i in range(scales.shape[0])], axis=1)
        parts.append(_Part(g * TILE, flat(codes, slice(g * TILE, (g + 1) * TILE)), jnp.where(in_use_1E, scales_1E, 0)))
    return [*parts, _Part(latent, flat(rope, slice(0, width - latent)), None)]


def _product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Over the last axis of x and `axis` of y, in float32."""
    return jax.lax.dot_general(x, y, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32,
                               precision="highest" if x.dtype == jnp.float32 else None)
