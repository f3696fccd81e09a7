"""The Hopper backend: 128 queries of a head by blocks of 64 keys, with the running softmax in registers.

Of three warpgroups one copies blocks of keys and values into a ring of slots, rotated keys from where all heads have
them; the other two attend from 64 queries each. The sum of a block's weighted values leaves the tensor cores and is
added in float32. Weights go through shared memory, where `wgmma` finds them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention.gpu_backward import backward
from pallas_kernels.mla_attention.gpu_blocks import (
    BLOCK,
    PIECE,
    Place,
    Ref,
    Shape,
    blocks_of,
    free_all,
    kernel,
    multiplied,
    place_of,
    prepared,
    ring,
    slot_of,
    transposed,
    wide,
    write,
)
from pallas_kernels.mla_attention.reference import Extent, Operands

if TYPE_CHECKING:
    from pallas_kernels.mla_attention.api import Problem

__all__ = ["backward", "forward", "misfit"]

CONSUMERS, SLOTS = 2, 3
TILE = CONSUMERS * BLOCK
REGISTERS = 232, 232, 40


def misfit(problem: Problem) -> str:
    """What the kernels need and the problem is not; empty if it is served."""
    if problem.dtype != "bfloat16" or not problem.some:
        return "bfloat16, and some rows"
    fits = problem.nope in (64, 128) and problem.value in (64, 128) and problem.rope == 64
    return "" if fits else "keys of 64 or 128 values and 64 rotated ones, values of 64 or 128"


class _Scratch(NamedTuple):
    """Shared memory and barriers of a block of threads."""

    q_nope: Ref
    q_rope: Ref
    k_nope: Ref
    k_rope: Ref
    value: Ref
    weights: Ref
    """Of each consumer; results leave through it."""
    query_full: Ref
    full: Ref
    free: Ref


def _scratch(s: Shape) -> _Scratch:
    return _Scratch(
        blocks_of(TILE, s.nope), blocks_of(TILE, s.rope), blocks_of(BLOCK, s.nope, SLOTS),
        blocks_of(BLOCK, s.rope, SLOTS), blocks_of(BLOCK, s.value, SLOTS), blocks_of(BLOCK, BLOCK, CONSUMERS),
        plgpu.Barrier(num_arrivals=2), plgpu.Barrier(num_arrivals=3, num_barriers=SLOTS),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS))


def forward(operands: Operands, extent: Extent, scale: float) -> tuple[jax.Array, jax.Array]:
    """See `reference.forward`."""
    queries = operands.q_nope.shape[1]
    s, padded = prepared(operands)
    tiles = pl.cdiv(s.queries, TILE)

    def body(lengths_B: Ref, start_1: Ref, *refs: Ref) -> list:
        sources, out, lse, scratch = Operands(*refs[:4]), refs[4], refs[5], _Scratch(*refs[6:])

        # The tiles with most keys come first. Each warpgroup works out its own place: see mla_decode.
        def first() -> jax.Array:
            return (tiles - 1 - jax.lax.axis_index("tile")) * TILE

        def attend(me: int) -> None:
            _attend(place_of(lengths_B, start_1), first(), me, scratch, scale, out, lse)

        def bring() -> None:
            _bring(s, place_of(lengths_B, start_1), first(), scratch, sources)
        return [lambda: attend(0), lambda: attend(1), bring]
    out, lse = kernel(
        "mla_attention", s, tiles, body,
        [jax.ShapeDtypeStruct((s.rows, s.queries, s.heads, s.value), jnp.bfloat16),
         jax.ShapeDtypeStruct((s.rows, s.heads, tiles * TILE), jnp.float32)], _scratch(s), REGISTERS, padded, extent)
    return out[:, :queries], lse[:, :, :queries]


def _bring(s: Shape, place: Place, first: jax.Array, scratch: _Scratch, sources: Ref) -> None:
    """The tile's queries, and the keys and values that any of them sees."""
    queries = pl.ds(first, TILE)
    for source, target in ((sources.q_nope, scratch.q_nope), (sources.q_rope, scratch.q_rope)):
        plgpu.copy_gmem_to_smem(source.at[place.row, queries, place.head], target, scratch.query_full)

    def copies(step: jax.Array, slot: jax.Array) -> list[tuple[Ref, Ref]]:
        keys = pl.ds(step * BLOCK, BLOCK)
        kv = sources.kv.at[place.row, keys, place.head]
        return [(kv.at[:, pl.ds(0, s.nope)], scratch.k_nope.at[slot]),
                (sources.k_rope.at[place.row, keys], scratch.k_rope.at[slot]),
                (kv.at[:, pl.ds(s.nope, s.value)], scratch.value.at[slot])]
    ring(place.keys(first, TILE), SLOTS, scratch.full, scratch.free, copies)


def _attend(place: Place, first: jax.Array, me: int, scratch: _Scratch, scale: float, out: Ref, lse: Ref) -> None:
    """One consumer's queries. Scores are in units of log 2, since the card's exponential is one of 2."""
    query, steps, value = first + me * BLOCK, place.keys(first, TILE), scratch.value.shape[2]
    weights = scratch.weights.at[me]
    free_all(SLOTS, scratch.free)
    plgpu.barrier_wait(scratch.query_full)
    q_nope, q_rope = (ref.at[pl.ds(me * BLOCK, BLOCK)] for ref in (scratch.q_nope, scratch.q_rope))

    def step(masked: bool, j: jax.Array, carry: tuple) -> tuple:
        (sums, top, total), slot = carry, slot_of(j, SLOTS)
        plgpu.barrier_wait(scratch.full.at[slot])
        k_nope, k_rope = (transposed(ref.at[slot]) for ref in (scratch.k_nope, scratch.k_rope))
        scores = multiplied((q_nope, k_nope), (q_rope, k_rope)) * (scale * math.log2(math.e))
        if masked:
            scores = jnp.where(place.sees(query, j * BLOCK), scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        fade, weight = jnp.exp2(top - new_top), jnp.exp2(scores - wide(new_top))
        weights[...] = weight.astype(jnp.bfloat16)
        plgpu.commit_smem()
        total = total * fade + jnp.sum(weight, axis=1)
        sums = sums * wide(fade, size=value) + multiplied((weights, scratch.value.at[slot]), columns=value)
        plgpu.barrier_arrive(scratch.free.at[slot])
        return sums, new_top, total
    # The lowest number, not -inf: a query that has seen nothing yet then fades by 1.
    lowest = jnp.full((BLOCK,), jnp.finfo(jnp.float32).min, jnp.float32)
    carry: Any = jnp.zeros((BLOCK, value), jnp.float32), lowest, jnp.zeros((BLOCK,), jnp.float32)
    whole = jnp.minimum(place.all_seen(query), steps)
    carry = jax.lax.fori_loop(0, whole, lambda j, carry: step(False, j, carry), carry)
    sums, top, total = jax.lax.fori_loop(whole, steps, lambda j, carry: step(True, j, carry), carry)
    total = jnp.where(total > 0, total, 1)
    lse[place.row, place.head, pl.ds(query, BLOCK)] = top * math.log(2) + jnp.log(total)
    write(sums * wide(1 / total, size=value), weights,
          lambda column: out.at[place.row, pl.ds(query, BLOCK), place.head, pl.ds(column, PIECE)])
