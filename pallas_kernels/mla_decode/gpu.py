"""The Hopper backend: blocks of 64 entries through shared memory, each multiplied by 64 rows of queries.

A block of threads has 64 rows (heads and queries of one sequence) and a share of its pages. Its four warpgroups have
one task each: one brings entries into two slots, one computes scores and weights, and two sum, each half of the columns
of the result, which is as much as their registers hold. While those sum one block of entries, the scores of the next
are computed. What lies between them:

    query_full                   the queries have landed
    free -> full                 of each slot: both have summed; entries are there
    weights_free -> weights_full both have summed; weights of the next block are there

Latents in 8 bits become bfloat16 on their way into the slot, by the threads of the warpgroup that brings them: the
others do not know. Where sequences are fewer than multiprocessors, each is split among several (`splits_for`), and XLA
merges their results.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.mla_decode.reference import TILE, Attended, Pages, QuantizedPages, merge

if TYPE_CHECKING:
    from pallas_kernels.mla_decode.api import Problem

ROWS, BLOCK, SLOTS = 64, 64, 2
SUMMING = 2
"""Warpgroups that sum: the first ones, followed by the one that scores and the one that brings."""
PIECE = 64
"""Columns of a product of weights and latents."""
LARGEST_LATENT, ROPE = 512, 64
"""With these the queries and both slots take 216 of the 227 KiB."""
ENDS = 4
"""What a block of threads takes to start and to write its results, in blocks of entries: a guess, until a card says."""

REGISTERS = {"bring": 80, "score": 80, "sum": 176}
"""Of a thread. Those of the four warpgroups make 512, which is all that there are."""

Ref = Any


def misfit(problem: Problem) -> str:
    """What the kernel needs and the problem is not; empty if it is served."""
    if problem.dtype != "bfloat16" or not hasattr(plgpu, "store"):
        return "bfloat16, and jax 0.12"
    if problem.latent % (SUMMING * PIECE) or problem.latent > LARGEST_LATENT or problem.rope != ROPE:
        return f"a latent of 128, 256, 384 or {LARGEST_LATENT} and {ROPE} rotated values"
    fits = problem.table and problem.rows and problem.page % BLOCK == 0
    return "" if fits else f"pages divisible by {BLOCK}, and some rows"


def splits_for(tiles: int, blocks: int) -> int:
    """Among how many multiprocessors each of so many tiles of rows shares its blocks of entries: as many as let the
    last finish first."""
    def time(splits: int) -> float:
        return math.ceil(tiles * splits / hopper.MULTIPROCESSORS) * (math.ceil(blocks / splits) + ENDS)
    return min(range(1, max(1, min(blocks, hopper.MULTIPROCESSORS)) + 1), key=time)


class _Scratch(NamedTuple):
    """Shared memory and barriers of a block of threads."""

    query: Ref
    latents: Ref
    """[slots, entries, C]."""
    rope: Ref
    """[slots, entries, rotated values]."""
    weights: Ref
    """[rows, entries], for those who sum."""
    rows: Ref
    """float32 [rows], likewise: by how much sums fade, and in the end what they are divided by."""
    query_full: Ref
    landed: Ref
    full: Ref
    free: Ref
    weights_full: Ref
    weights_free: Ref


def _scratch(latent: int) -> _Scratch:
    # Latents and rotated keys arrive apart.
    return _Scratch(
        hopper.swizzled((ROWS, latent + ROPE), jnp.bfloat16), hopper.swizzled((SLOTS, BLOCK, latent), jnp.bfloat16),
        hopper.swizzled((SLOTS, BLOCK, ROPE), jnp.bfloat16), hopper.swizzled((ROWS, BLOCK), jnp.bfloat16),
        plgpu.SMEM((ROWS,), jnp.float32), plgpu.Barrier(), plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS), plgpu.Barrier(num_arrivals=SUMMING, num_barriers=SLOTS),
        plgpu.Barrier(), plgpu.Barrier(num_arrivals=SUMMING))


class _Share(NamedTuple):
    """What a block of threads computes."""

    row: jax.Array
    first_query: jax.Array
    first: jax.Array
    """Entry."""
    used: jax.Array
    """Entries of the row."""
    steps: jax.Array
    """Blocks of entries."""


def _share(used_B: Ref, split: jax.Array, splits: int) -> _Share:
    row, used = jax.lax.axis_index("row"), used_B[jax.lax.axis_index("row")]
    blocks = jax.lax.div(used + (BLOCK - 1), BLOCK)
    each = jax.lax.div(blocks + (splits - 1), splits)
    return _Share(row, jax.lax.axis_index("tile") * ROWS, split * each * BLOCK, used,
                  jnp.clip(blocks - split * each, 0, each))


def attend(query_BRW: jax.Array, pages: Pages, table_BN: jax.Array, seen_BQ: jax.Array, latent: int,
           scale: float) -> Attended:
    """See `reference.attend`."""
    rows, count, _ = query_BRW.shape
    arrays = tuple(pages) if isinstance(pages, QuantizedPages) else (pages,)
    tiles = pl.cdiv(count, ROWS)
    splits = splits_for(rows * tiles, table_BN.shape[1] * (arrays[0].shape[1] // BLOCK))
    # TMA cuts what it reads into 8 rows, and fills with zeros what lies past the last of these.
    query_BRW = jnp.pad(query_BRW, ((0, 0), (0, -count % 8), (0, 0)))
    seen_BR = jnp.pad(jnp.repeat(seen_BQ, count // seen_BQ.shape[1], axis=1), ((0, 0), (0, -count % ROWS)))

    def body(table_BN: Ref, seen_BR: Ref, used_B: Ref, query_BRW: Ref, *refs: Ref) -> None:
        sources, (out, lse), scratch = refs[:len(arrays)], refs[len(arrays):][:2], _Scratch(*refs[len(arrays) + 2:])
        split = jax.lax.axis_index("split")

        # Each warpgroup works it out for itself: what they shared would be kept in memory, for want of registers.
        def share() -> _Share:
            return _share(used_B, split, splits)

        def sum_half(half: int) -> None:
            plgpu.set_max_registers(REGISTERS["sum"], action="increase")
            _sum(share(), scratch, half, out.at[split])

        def score() -> None:
            plgpu.set_max_registers(REGISTERS["score"], action="decrease")
            _score(share(), scratch, seen_BR, scale, lse.at[split])

        def bring() -> None:
            plgpu.set_max_registers(REGISTERS["bring"], action="decrease")
            _bring(share(), scratch, table_BN, query_BRW, sources)
        jax.lax.switch(jax.lax.axis_index("warpgroup"),
                       [*(functools.partial(sum_half, half) for half in range(SUMMING)), score, bring])
    body.__name__ = "mla_decode"
    padded = tiles * ROWS
    parts = plgpu.kernel(
        body, out_type=[
            jax.ShapeDtypeStruct((splits, rows, padded, latent), jnp.float32 if splits > 1 else query_BRW.dtype),
            jax.ShapeDtypeStruct((splits, rows, padded), jnp.float32)],
        # The tiles of a row run beside each other, and find its entries in L2.
        grid=(splits, rows, tiles), grid_names=("split", "row", "tile"), num_threads=SUMMING + 2,
        thread_name="warpgroup", scratch_types=list(_scratch(latent)),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0,
                                             lowering_semantics=plgpu.LoweringSemantics.Warpgroup))(
        table_BN, seen_BR, jnp.max(seen_BQ, axis=1), query_BRW, *arrays)
    out, lse = (part[:, :, :count] for part in parts)
    return merge(Attended(out, lse), query_BRW.dtype) if splits > 1 else Attended(out[0], lse[0])


def _bring(share: _Share, scratch: _Scratch, table_BN: Ref, query_BRW: Ref, sources: tuple[Ref, ...]) -> None:
    """Copies the queries, and every block of entries into the next slot as soon as it is free."""
    plgpu.copy_gmem_to_smem(query_BRW.at[share.row, pl.ds(share.first_query, ROWS)], scratch.query, scratch.query_full)
    page_size, latent = jnp.int32(sources[0].shape[1]), scratch.latents.shape[2]

    @pl.loop(0, share.steps)
    def _(step):
        slot, entry = _slot(step), share.first + step * BLOCK
        page, inside = table_BN[share.row, jax.lax.div(entry, page_size)], jax.lax.rem(entry, page_size)
        block, at = [source.at[page] for source in sources], pl.ds(inside, BLOCK)
        latents, full, partial = scratch.latents.at[slot], scratch.full.at[slot], entry + BLOCK > share.used
        plgpu.barrier_wait(scratch.free.at[slot])
        if len(sources) == 1:
            plgpu.copy_gmem_to_smem(block[0].at[at, pl.ds(latent, ROPE)], scratch.rope.at[slot], full)
            _bring_latents(block[0].at[at, pl.ds(0, latent)], latents, full, scratch.landed, partial)
        else:
            plgpu.copy_gmem_to_smem(block[2].at[at, pl.ds(0, ROPE)], scratch.rope.at[slot], full)
            _dequantise(block[0].at[at], block[1].at[:, at], latents)

        @pl.when(partial)
        def _():
            _clear(latents, share.used - entry)

        @pl.when(partial | (len(sources) > 1))
        def _():
            plgpu.barrier_arrive(full)

    # No warpgroup may still be on its way to a barrier when the block of threads ends.
    @pl.loop(0, SLOTS)
    def _(i):
        plgpu.barrier_wait(scratch.free.at[_slot(share.steps + i)])


def _bring_latents(source: Ref, latents: Ref, full: Ref, landed: Ref, partial: jax.Array) -> None:
    """Copies a block. Of one that is not all in use the threads must clear the rest before they say that it is full."""
    @pl.when(partial)
    def _():
        plgpu.copy_gmem_to_smem(source, latents, landed)
        plgpu.barrier_wait(landed)

    @pl.when(~partial)
    def _():
        plgpu.copy_gmem_to_smem(source, latents, full)


def _dequantise(codes: Ref, scales: Ref, latents: Ref) -> None:
    """Codes times scales, by the threads, which hold the rows as `wgmma` would."""
    for g in range(latents.shape[1] // TILE):
        tile = pl.ds(g * TILE, TILE)
        values = plgpu.load(codes.at[:, tile], layout=plgpu.Layout.WGMMA_UPCAST_2X, optimized=False)
        values = plgpu.layout_cast(values.astype(jnp.float16), plgpu.Layout.WGMMA).astype(jnp.float32)
        latents[:, tile] = (values * _wide(_load_rows(scales.at[g]), TILE)).astype(latents.dtype)
    plgpu.commit_smem()


def _score(share: _Share, scratch: _Scratch, seen_BR: Ref, scale: float, lse: Ref) -> None:
    """Weights of every block of entries. Scores are in units of log 2: the card's exponential is of 2."""
    rows, latent = pl.ds(share.first_query, ROWS), scratch.latents.shape[2]
    plgpu.barrier_wait(scratch.query_full)
    seen_R = _load_rows(seen_BR.at[share.row, rows])

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (top, total), slot = carry, _slot(i)
        plgpu.barrier_wait(scratch.full.at[slot])

        def multiply(acc: Ref) -> jax.Array:
            plgpu.wgmma(acc, scratch.query.at[:, pl.ds(0, latent)], scratch.latents.at[slot].transpose((1, 0)))
            plgpu.wgmma(acc, scratch.query.at[:, pl.ds(latent, ROPE)], scratch.rope.at[slot].transpose((1, 0)))
            return acc[...]
        scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, BLOCK), jnp.float32)) * (scale * math.log2(math.e))
        entry = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) + (share.first + i * BLOCK)
        scores = jnp.where(entry < _wide(seen_R, BLOCK), scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        fade, weights = jnp.exp2(top - new_top), jnp.exp2(scores - _wide(new_top, BLOCK))
        plgpu.barrier_wait(scratch.weights_free)
        scratch.rows[...] = fade
        scratch.weights[...] = weights.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.weights_full)
        return new_top, total * fade + jnp.sum(weights, axis=1)
    # The lowest number, not -inf: a row that has seen nothing yet then fades by 1.
    lowest = jnp.full((ROWS,), jnp.finfo(jnp.float32).min, jnp.float32)
    top, total = jax.lax.fori_loop(0, share.steps, step, (lowest, jnp.zeros((ROWS,), jnp.float32)))
    some = total > 0
    total = jnp.where(some, total, 1)
    lse[share.row, rows] = jnp.where(some, top * math.log(2) + jnp.log(total), -jnp.inf)
    plgpu.barrier_wait(scratch.weights_free)
    scratch.rows[...] = 1 / total
    plgpu.commit_smem()
    plgpu.barrier_arrive(scratch.weights_full)


def _sum(share: _Share, scratch: _Scratch, me: int, out: Ref) -> None:
    """The weighted latents of all blocks of entries, in `me`'s half of the columns."""
    half = scratch.latents.shape[2] // SUMMING

    @pl.loop(0, SLOTS)
    def _(slot):
        plgpu.barrier_arrive(scratch.free.at[slot])
    plgpu.barrier_arrive(scratch.weights_free)

    def columns(piece: int) -> Any:
        return pl.ds(me * half + piece * PIECE, PIECE)

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slot = _slot(i)
        plgpu.barrier_wait(scratch.full.at[slot])
        plgpu.barrier_wait(scratch.weights_full)
        fade = _load_rows(scratch.rows)

        def add(piece: int, before: jax.Array) -> jax.Array:
            def multiply(acc: Ref) -> jax.Array:
                plgpu.wgmma(acc, scratch.weights, scratch.latents.at[slot, :, columns(piece)])
                return acc[...]
            return before * _wide(fade, PIECE) + pl.run_scoped(multiply, plgpu.ACC((ROWS, PIECE), jnp.float32))
        sums = tuple(add(piece, before) for piece, before in enumerate(sums))
        plgpu.barrier_arrive(scratch.weights_free)
        plgpu.barrier_arrive(scratch.free.at[slot])
        return sums
    zeros = tuple(jnp.zeros((ROWS, PIECE), jnp.float32) for _ in range(half // PIECE))
    sums = jax.lax.fori_loop(0, share.steps, step, zeros)
    plgpu.barrier_wait(scratch.weights_full)
    inverse = _load_rows(scratch.rows)
    for piece, part in enumerate(sums):
        at = out.at[share.row, pl.ds(share.first_query, ROWS), columns(piece)]
        plgpu.store(at, (part * _wide(inverse, PIECE)).astype(out.dtype), optimized=False)


def _clear(latents: Ref, used: jax.Array) -> None:
    """Zeros for entries that are not in use: a weight of zero does not silence a NaN."""
    for at in range(0, latents.shape[1], PIECE):
        values = latents[:, pl.ds(at, PIECE)]
        entry = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        latents[:, pl.ds(at, PIECE)] = jnp.where(entry < used, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def _slot(step: jax.Array) -> jax.Array:
    return jax.lax.rem(step, jnp.int32(SLOTS))


def _load_rows(ref: Ref) -> jax.Array:
    """A number for each row, as the rows of products lie in registers."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def _wide(vector: jax.Array, columns: int) -> jax.Array:
    return jax.lax.broadcast_in_dim(vector, (ROWS, columns), (0,))
