"""What the Hopper kernels share: blocks of 64 queries or keys, and which of them see each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.mla_attention.reference import Extent, Operands

BLOCK = 64
"""Queries of one warpgroup, and keys: what `wgmma` takes as rows."""
PIECE = 64
"""Columns that are swizzled and copied together."""

Ref = Any


class Shape(NamedTuple):
    """Sizes of a problem; queries and keys are padded to what TMA cuts them into, 8."""

    rows: int
    queries: int
    keys: int
    heads: int
    nope: int
    rope: int
    value: int


def prepared(operands: Operands) -> tuple[Shape, Operands]:
    """Padded to multiples of 8."""
    def padded(x_BT: jax.Array) -> jax.Array:
        return jnp.pad(x_BT, [(0, -size % 8 if axis == 1 else 0) for axis, size in enumerate(x_BT.shape)])
    padded_operands = Operands(*map(padded, operands))
    (rows, queries, heads, nope), (_, keys, _, both) = padded_operands.q_nope.shape, padded_operands.kv.shape
    return Shape(rows, queries, keys, heads, nope, operands.k_rope.shape[2], both - nope), padded_operands


class Place(NamedTuple):
    """A row and a head, and scalars of the row."""

    row: jax.Array
    head: jax.Array
    length: jax.Array
    start: jax.Array

    def sees(self, query: jax.Array, key: jax.Array, queries_last: bool = False) -> jax.Array:
        """bool [queries, keys], or [keys, queries], of the blocks that begin there."""
        axis = int(queries_last)
        at_query, at_key = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), a) for a in (axis, 1 - axis))
        position = at_query + (self.start + query)
        return (at_key + key <= position) & (position < self.length)

    def all_seen(self, query: jax.Array) -> jax.Array:
        """How many blocks of keys all queries of a block see."""
        position = self.start + query
        return jnp.where(position + BLOCK <= self.length, jax.lax.div(position + 1, jnp.int32(BLOCK)), 0)

    def keys(self, query: jax.Array, count: int) -> jax.Array:
        """How many blocks of keys so many queries need together."""
        first = self.start + query
        end = jnp.minimum(first + count, self.length)
        return jnp.where(first < self.length, jax.lax.div(end + (BLOCK - 1), jnp.int32(BLOCK)), 0)

    def queries(self, key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """The first block of queries that sees a block of keys, and the end of them, of so many queries."""
        first = jax.lax.div(jnp.maximum(key - self.start, 0), jnp.int32(BLOCK))
        end = jax.lax.div(jnp.clip(self.length - self.start, 0, count) + (BLOCK - 1), jnp.int32(BLOCK))
        return first, jnp.where(key < self.length, jnp.maximum(end, first), first)


def place_of(lengths_B: Ref, start_1: Ref) -> Place:
    """Of this block of threads."""
    row = jax.lax.axis_index("row")
    return Place(row, jax.lax.axis_index("head"), lengths_B[row], start_1[0])


def kernel(name: str, s: Shape, tiles: int, body: Callable[..., Sequence[Callable[[], None]]], outs: Sequence[Any],
           scratch: Sequence[Any], registers: Sequence[int], operands: Operands, extent: Extent,
           *more: jax.Array) -> Sequence[jax.Array]:
    """Runs the functions that `body(*references)` gives, each in a warpgroup with so many registers a thread, of which
    there are 512 for all.

    Tiles of one head run beside each other, and find its keys and values in L2.
    """
    def run(*refs: Ref) -> None:
        def task(act: Callable[[], None], count: int) -> Callable[[], None]:
            def with_registers() -> None:
                plgpu.set_max_registers(count, action="decrease" if count < 512 // len(registers) else "increase")
                act()
            return with_registers
        tasks = [task(act, count) for act, count in zip(body(*refs), registers, strict=True)]
        jax.lax.switch(jax.lax.axis_index("warpgroup"), tasks)
    run.__name__ = name
    return plgpu.kernel(
        run, out_type=list(outs), grid=(s.rows, s.heads, tiles), grid_names=("row", "head", "tile"),
        num_threads=len(registers), thread_name="warpgroup", scratch_types=list(scratch),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0,
                                             lowering_semantics=plgpu.LoweringSemantics.Warpgroup))(
        *extent, *operands, *more)


def ring(steps: jax.Array, slots: int, full: Ref, free: Ref, copies: Callable[[jax.Array, jax.Array],
                                                                              Sequence[tuple[Ref, Ref]]]) -> None:
    """Makes `copies(step, slot)`, pairs of source and target, as soon as each slot is free."""
    @pl.loop(0, steps)
    def _(step):
        slot = slot_of(step, slots)
        plgpu.barrier_wait(free.at[slot])
        for source, target in copies(step, slot):
            plgpu.copy_gmem_to_smem(source, target, full.at[slot])

    # No warpgroup may still be on its way to a barrier when the block of threads ends.
    @pl.loop(0, slots)
    def _(i):
        plgpu.barrier_wait(free.at[slot_of(steps + i, slots)])


def free_all(slots: int, free: Ref) -> None:
    """Before the first turn of a ring."""
    @pl.loop(0, slots)
    def _(slot):
        plgpu.barrier_arrive(free.at[slot])


def slot_of(step: jax.Array, slots: int) -> jax.Array:
    """Of a ring."""
    return jax.lax.rem(step, jnp.int32(slots))


def multiplied(*pairs: tuple[Ref, Ref], columns: int = BLOCK) -> jax.Array:
    """The sum of products [BLOCK, columns], in float32."""
    def multiply(acc: Ref) -> jax.Array:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]
    return pl.run_scoped(multiply, plgpu.ACC((BLOCK, columns), jnp.float32))


def transposed(ref: Ref) -> Ref:
    """Only another way to read it."""
    return ref.transpose((1, 0))


def load(ref: Ref, axis: int) -> jax.Array:
    """A number for each row (axis 0) or column (1), as those of products lie in registers."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def wide(vector: jax.Array, axis: int = 0, size: int = BLOCK) -> jax.Array:
    """A number for each row, or for each column, everywhere."""
    return jax.lax.broadcast_in_dim(vector, (BLOCK, size) if axis == 0 else (size, BLOCK), (axis,))


def write(values: jax.Array, stage: Ref, target: Callable[[int], Ref]) -> None:
    """A result through shared memory, piece by piece of columns: what TMA writes ends where the array does."""
    for column in range(0, values.shape[1], PIECE):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        stage[...] = values[:, column:column + PIECE].astype(stage.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stage, target(column))
    plgpu.wait_smem_to_gmem(0)


def blocks_of(count: int, width: int, slots: int | None = None) -> Any:
    """Shared memory for [count, width] of an operand, or for as many as there are slots."""
    return hopper.swizzled((count, width) if slots is None else (slots, count, width), jnp.bfloat16)
