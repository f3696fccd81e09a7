"""The gradient on Hopper: one kernel for the queries', which walks over keys, and one for the keys' and values', which
walks over queries. See `tpu_backward` for the formulas.

In the first, two warpgroups have 64 queries each, and their gradient stays in the tensor cores' accumulators. In the
second a block of threads has 64 keys, as rows. One warpgroup makes the weights and sums the values' gradient; the other
takes these weights, rounded, and sums the keys'. The rotated keys' gradient leaves in float32 for each head, and XLA
sums it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention.gpu_blocks import (
    BLOCK,
    PIECE,
    Place,
    Ref,
    Shape,
    blocks_of,
    free_all,
    kernel,
    load,
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

CONSUMERS = 2
TILE = CONSUMERS * BLOCK
SLOTS_OF_KEYS, SLOTS_OF_QUERIES = 2, 3
REGISTERS = 232, 232, 40


def backward(operands: Operands, extent: Extent, out: jax.Array, lse: jax.Array, dout: jax.Array,
             scale: float) -> Operands:
    """See `reference.backward`."""
    s, padded = prepared(operands)
    delta_BHQ = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    rest = -lse.shape[2] % TILE
    lse, delta = (jnp.pad(x, ((0, 0), (0, 0), (0, rest))) for x in (lse * math.log2(math.e), delta_BHQ))
    dout = jnp.pad(dout, ((0, 0), (0, s.queries - dout.shape[1]), (0, 0), (0, 0)))
    dq_nope, dq_rope = _queries(s, padded, extent, dout, lse, delta, scale)
    dkv, dk_rope_BHT = _keys(s, padded, extent, dout, lse, delta, scale)
    gradients = dq_nope, dq_rope, dkv, jnp.sum(dk_rope_BHT, axis=1).astype(dkv.dtype)
    return Operands(*(gradient[:, :x.shape[1]] for gradient, x in zip(gradients, operands, strict=True)))


class _QueriesScratch(NamedTuple):
    """Shared memory and barriers of the first kernel."""

    q_nope: Ref
    q_rope: Ref
    dout: Ref
    k_nope: Ref
    k_rope: Ref
    value: Ref
    ds: Ref
    """Of each consumer; results leave through it."""
    query_full: Ref
    full: Ref
    free: Ref


def _queries(s: Shape, operands: Operands, extent: Extent, dout: jax.Array, lse: jax.Array, delta: jax.Array,
             scale: float) -> Any:
    slots, tiles = SLOTS_OF_KEYS, pl.cdiv(s.queries, TILE)
    scratch = _QueriesScratch(
        blocks_of(TILE, s.nope), blocks_of(TILE, s.rope), blocks_of(TILE, s.value), blocks_of(BLOCK, s.nope, slots),
        blocks_of(BLOCK, s.rope, slots), blocks_of(BLOCK, s.value, slots), blocks_of(BLOCK, BLOCK, CONSUMERS),
        plgpu.Barrier(num_arrivals=3), plgpu.Barrier(num_arrivals=3, num_barriers=slots),
        plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots))

    def body(lengths_B: Ref, start_1: Ref, *refs: Ref) -> list:
        sources, (dout, lse, delta, dq_nope, dq_rope), own = Operands(*refs[:4]), refs[4:9], _QueriesScratch(*refs[9:])

        def first() -> jax.Array:
            return (tiles - 1 - jax.lax.axis_index("tile")) * TILE

        def sum_queries(me: int) -> None:
            _sum_queries(place_of(lengths_B, start_1), first(), me, own, scale, lse, delta, dq_nope, dq_rope)

        def bring() -> None:
            _bring_keys(s, place_of(lengths_B, start_1), first(), own, sources, dout)
        return [lambda: sum_queries(0), lambda: sum_queries(1), bring]
    return kernel("mla_attention_queries", s, tiles, body,
                  [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:2]], scratch, REGISTERS, operands, extent,
                  dout, lse, delta)


def _bring_keys(s: Shape, place: Place, first: jax.Array, own: _QueriesScratch, sources: Ref, dout: Ref) -> None:
    for source, target in ((sources.q_nope, own.q_nope), (sources.q_rope, own.q_rope), (dout, own.dout)):
        plgpu.copy_gmem_to_smem(source.at[place.row, pl.ds(first, TILE), place.head], target, own.query_full)

    def copies(step: jax.Array, slot: jax.Array) -> list[tuple[Ref, Ref]]:
        keys = pl.ds(step * BLOCK, BLOCK)
        kv = sources.kv.at[place.row, keys, place.head]
        return [(kv.at[:, pl.ds(0, s.nope)], own.k_nope.at[slot]),
                (sources.k_rope.at[place.row, keys], own.k_rope.at[slot]),
                (kv.at[:, pl.ds(s.nope, s.value)], own.value.at[slot])]
    ring(place.keys(first, TILE), SLOTS_OF_KEYS, own.full, own.free, copies)


def _sum_queries(place: Place, first: jax.Array, me: int, own: _QueriesScratch, scale: float, lse: Ref, delta: Ref,
                 dq_nope: Ref, dq_rope: Ref) -> None:
    """The gradient of one consumer's queries."""
    query, steps, ds = first + me * BLOCK, place.keys(first, TILE), own.ds.at[me]
    free_all(SLOTS_OF_KEYS, own.free)
    plgpu.barrier_wait(own.query_full)
    q_nope, q_rope, dout = (ref.at[pl.ds(me * BLOCK, BLOCK)] for ref in (own.q_nope, own.q_rope, own.dout))
    lse_Q, delta_Q = (load(ref.at[place.row, place.head, pl.ds(query, BLOCK)], 0) for ref in (lse, delta))

    def accumulate(sum_nope: Ref, sum_rope: Ref) -> tuple[jax.Array, jax.Array]:
        @pl.loop(0, steps)
        def _(j):
            slot = slot_of(j, SLOTS_OF_KEYS)
            plgpu.barrier_wait(own.full.at[slot])
            scores = multiplied((q_nope, transposed(own.k_nope.at[slot])), (q_rope, transposed(own.k_rope.at[slot])))
            weights = jnp.exp2(scores * (scale * math.log2(math.e)) - wide(lse_Q))
            weights = jnp.where(place.sees(query, j * BLOCK), weights, 0)
            from_values = multiplied((dout, transposed(own.value.at[slot])))
            ds[...] = (scale * weights * (from_values - wide(delta_Q))).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.wgmma(sum_nope, ds, own.k_nope.at[slot])
            plgpu.wgmma(sum_rope, ds, own.k_rope.at[slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(own.free.at[slot])
        return sum_nope[...], sum_rope[...]
    nope, rope = pl.run_scoped(accumulate, *(plgpu.ACC((BLOCK, ref.shape[2]), jnp.float32)
                                             for ref in (own.k_nope, own.k_rope)))
    mine = place.row, pl.ds(query, BLOCK), place.head
    write(nope, ds, lambda column: dq_nope.at[*mine, pl.ds(column, PIECE)])
    write(rope, ds, lambda column: dq_rope.at[*mine, pl.ds(column, PIECE)])


class _KeysScratch(NamedTuple):
    """Shared memory and barriers of the second kernel."""

    k_nope: Ref
    k_rope: Ref
    value: Ref
    q_nope: Ref
    q_rope: Ref
    dout: Ref
    lse: Ref
    delta: Ref
    weights: Ref
    ds: Ref
    keys_full: Ref
    full: Ref
    free: Ref
    weights_full: Ref
    weights_free: Ref


def _keys(s: Shape, operands: Operands, extent: Extent, dout: jax.Array, lse: jax.Array, delta: jax.Array,
          scale: float) -> Any:
    slots, tiles = SLOTS_OF_QUERIES, pl.cdiv(s.keys, BLOCK)
    scratch = _KeysScratch(
        blocks_of(BLOCK, s.nope), blocks_of(BLOCK, s.rope), blocks_of(BLOCK, s.value), blocks_of(BLOCK, s.nope, slots),
        blocks_of(BLOCK, s.rope, slots), blocks_of(BLOCK, s.value, slots), plgpu.SMEM((slots, BLOCK), jnp.float32),
        plgpu.SMEM((slots, BLOCK), jnp.float32), blocks_of(BLOCK, BLOCK), blocks_of(BLOCK, BLOCK),
        plgpu.Barrier(num_arrivals=3), plgpu.Barrier(num_arrivals=5, num_barriers=slots),
        plgpu.Barrier(num_arrivals=2, num_barriers=slots), plgpu.Barrier(), plgpu.Barrier())

    def body(lengths_B: Ref, start_1: Ref, *refs: Ref) -> list:
        sources, (dout, lse, delta, dkv, dk_rope), own = Operands(*refs[:4]), refs[4:9], _KeysScratch(*refs[9:])

        def first() -> jax.Array:
            return jax.lax.axis_index("tile") * BLOCK

        def sum_values() -> None:
            _sum_values(s, place_of(lengths_B, start_1), first(), own, scale, dkv)

        def sum_keys() -> None:
            _sum_keys(s, place_of(lengths_B, start_1), first(), own, scale, dkv, dk_rope)

        def bring() -> None:
            _bring_queries(s, place_of(lengths_B, start_1), first(), own, sources, (dout, lse, delta))
        return [sum_values, sum_keys, bring]
    return kernel("mla_attention_keys", s, tiles, body,
                  [jax.ShapeDtypeStruct(operands.kv.shape, jnp.bfloat16),
                   jax.ShapeDtypeStruct((s.rows, s.heads, tiles * BLOCK, s.rope), jnp.float32)],
                  scratch, REGISTERS, operands, extent, dout, lse, delta)


def _bring_queries(s: Shape, place: Place, key: jax.Array, own: _KeysScratch, sources: Ref,
                   more: tuple[Ref, Ref, Ref]) -> None:
    keys, (dout, lse, delta) = pl.ds(key, BLOCK), more
    kv = sources.kv.at[place.row, keys, place.head]
    for source, target in ((kv.at[:, pl.ds(0, s.nope)], own.k_nope), (kv.at[:, pl.ds(s.nope, s.value)], own.value),
                           (sources.k_rope.at[place.row, keys], own.k_rope)):
        plgpu.copy_gmem_to_smem(source, target, own.keys_full)
    first, end = place.queries(key, s.queries)

    def copies(step: jax.Array, slot: jax.Array) -> list[tuple[Ref, Ref]]:
        queries = pl.ds((first + step) * BLOCK, BLOCK)
        whole = [(source.at[place.row, queries, place.head], target.at[slot]) for source, target in (
            (sources.q_nope, own.q_nope), (sources.q_rope, own.q_rope), (dout, own.dout))]
        return [*whole, *((source.at[place.row, place.head, queries], target.at[slot])
                          for source, target in ((lse, own.lse), (delta, own.delta)))]
    ring(end - first, SLOTS_OF_QUERIES, own.full, own.free, copies)


def _sum_values(s: Shape, place: Place, key: jax.Array, own: _KeysScratch, scale: float, dkv: Ref) -> None:
    """The weights of each block of queries, and the values' gradient."""
    first, end = place.queries(key, s.queries)
    free_all(SLOTS_OF_QUERIES, own.free)
    plgpu.barrier_wait(own.keys_full)

    def accumulate(total: Ref) -> jax.Array:
        @pl.loop(0, end - first)
        def _(step):
            slot = slot_of(step, SLOTS_OF_QUERIES)
            plgpu.barrier_wait(own.full.at[slot])
            scores = multiplied((own.k_nope, transposed(own.q_nope.at[slot])),
                                (own.k_rope, transposed(own.q_rope.at[slot])))
            weights = jnp.exp2(scores * (scale * math.log2(math.e)) - wide(load(own.lse.at[slot], 1), 1))
            weights = jnp.where(place.sees((first + step) * BLOCK, key, queries_last=True), weights, 0)
            plgpu.barrier_wait(own.weights_free)
            own.weights[...] = weights.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.barrier_arrive(own.weights_full)
            plgpu.wgmma(total, own.weights, own.dout.at[slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(own.free.at[slot])
        return total[...]
    values = pl.run_scoped(accumulate, plgpu.ACC((BLOCK, s.value), jnp.float32))
    plgpu.barrier_wait(own.weights_free)
    write(values, own.weights, lambda column: dkv.at[
        place.row, pl.ds(key, BLOCK), place.head, pl.ds(s.nope + column, PIECE)])


def _sum_keys(s: Shape, place: Place, key: jax.Array, own: _KeysScratch, scale: float, dkv: Ref, dk_rope: Ref) -> None:
    """The keys' gradient, by the other's weights."""
    first, end = place.queries(key, s.queries)
    free_all(SLOTS_OF_QUERIES, own.free)
    plgpu.barrier_arrive(own.weights_free)
    plgpu.barrier_wait(own.keys_full)

    def accumulate(sum_nope: Ref, sum_rope: Ref) -> tuple[jax.Array, jax.Array]:
        @pl.loop(0, end - first)
        def _(step):
            slot = slot_of(step, SLOTS_OF_QUERIES)
            plgpu.barrier_wait(own.full.at[slot])
            from_values = multiplied((own.value, transposed(own.dout.at[slot])))
            plgpu.barrier_wait(own.weights_full)
            weights = plgpu.load(own.weights, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            plgpu.barrier_arrive(own.weights_free)
            ds = scale * weights * (from_values - wide(load(own.delta.at[slot], 1), 1))
            own.ds[...] = ds.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.wgmma(sum_nope, own.ds, own.q_nope.at[slot])
            plgpu.wgmma(sum_rope, own.ds, own.q_rope.at[slot])
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(own.free.at[slot])
        return sum_nope[...], sum_rope[...]
    nope, rope = pl.run_scoped(accumulate, *(plgpu.ACC((BLOCK, width), jnp.float32) for width in (s.nope, s.rope)))
    dk_rope[place.row, place.head, pl.ds(key, BLOCK)] = rope
    write(nope, own.ds, lambda column: dkv.at[place.row, pl.ds(key, BLOCK), place.head, pl.ds(column, PIECE)])
