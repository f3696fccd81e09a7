"""What the TPU kernels share: blocks of queries by blocks of keys, and which of them see each other."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mla_attention.reference import Extent, Operands

BLOCK = 512
"""Queries, and keys, of a step at most."""
LANES = 128
VMEM_BYTES = 48 * 2 ** 20
"""Asked for: the largest kernel needs a third. Ironwood has 64 MiB, the others more."""

Ref = Any


def heads_of_step(rope: int) -> int:
    """Whose rotated queries fill whole lanes."""
    return math.lcm(rope, LANES) // rope


class Shape(NamedTuple):
    """Sizes of a problem, padded to whole blocks."""

    rows: int
    queries: int
    keys: int
    heads: int
    nope: int
    rope: int
    value: int

    @property
    def group(self) -> int:
        """Heads of a step."""
        return heads_of_step(self.rope)

    @property
    def block_q(self) -> int:
        return min(BLOCK, self.queries)

    @property
    def block_k(self) -> int:
        return min(BLOCK, self.keys)

    @property
    def steps(self) -> tuple[int, int, int]:
        """Groups of heads, blocks of queries, blocks of keys."""
        return self.heads // self.group, self.queries // self.block_q, self.keys // self.block_k


class Needed(NamedTuple):
    """Which blocks of queries and of keys have pairs that see each other: scalars of one row."""

    shape: Shape
    length: Any
    start: Any

    def keys(self, i: Any) -> Any:
        """How many blocks of keys the block `i` of queries needs."""
        first = self.start + i * self.shape.block_q
        end = jnp.minimum(first + self.shape.block_q, self.length)
        return jnp.where(first < self.length, pl.cdiv(end, self.shape.block_k), 0)

    def queries(self, j: Any) -> tuple[Any, Any]:
        """The first block of queries that needs the block `j` of keys, and the end of them."""
        first = jax.lax.div(jnp.maximum(j * self.shape.block_k - self.start, 0), jnp.int32(self.shape.block_q))
        end = pl.cdiv(jnp.maximum(self.length - self.start, 0), self.shape.block_q)
        return first, jnp.where(j * self.shape.block_k < self.length, jnp.minimum(end, self.shape.steps[1]), 0)

    def all_seen(self, i: Any, j: Any) -> Any:
        """Whether every query of the block sees every key of the other."""
        first = self.start + i * self.shape.block_q
        return ((j + 1) * self.shape.block_k <= first + 1) & (first + self.shape.block_q <= self.length)


def prepared(operands: Operands) -> tuple[Shape, Operands]:
    """Padded to whole blocks, heads beside each other: [B, Q, H*N], [B, Q, H*R], [B, T, H*(N+V)], [B, T, R]."""
    (rows, queries, heads, nope), (_, keys, _, both) = operands.q_nope.shape, operands.kv.shape
    shape = Shape(rows, _whole(queries), _whole(keys), heads, nope, operands.k_rope.shape[2], both - nope)
    return shape, Operands(*(lengthened(x.reshape(*x.shape[:2], -1), to) for x, to in zip(
        operands, (shape.queries, shape.queries, shape.keys, shape.keys), strict=True)))


def lengthened(x_BT: jax.Array, size: int, axis: int = 1) -> jax.Array:
    """With zeros up to `size` along `axis`."""
    return jnp.pad(x_BT, [(0, size - x_BT.shape[axis] if a == axis else 0) for a in range(x_BT.ndim)])


def _whole(size: int) -> int:
    block = min(BLOCK, -(-size // LANES) * LANES)
    return -(-size // block) * block


class Specs(NamedTuple):
    """How steps share the arrays."""

    operands: list[pl.BlockSpec]
    out: pl.BlockSpec
    """[B, Q, H*V]."""
    row: pl.BlockSpec
    """[B, H, 1, Q]: a number for each query."""


def specs_of(s: Shape, queries: Callable[..., tuple], keys: Callable[..., tuple]) -> Specs:
    """`queries` and `keys` give (row, group of heads, block) of a step."""
    def of(where: Callable[..., tuple], block: int, width: int, shared: bool = False) -> pl.BlockSpec:
        def at(*step: Any) -> tuple:
            row, group, index = where(*step)
            return row, index, 0 if shared else group
        return pl.BlockSpec((None, block, width), at)

    def row_at(*step: Any) -> tuple:
        row, group, index = queries(*step)
        return row, group, 0, index
    return Specs([of(queries, s.block_q, s.group * s.nope), of(queries, s.block_q, s.group * s.rope),
                  of(keys, s.block_k, s.group * (s.nope + s.value)), of(keys, s.block_k, s.rope, shared=True)],
                 of(queries, s.block_q, s.group * s.value), pl.BlockSpec((None, s.group, 1, s.block_q), row_at))


class Head(NamedTuple):
    """What one head of a step has of the operands."""

    q_nope: jax.Array
    q_rope: jax.Array
    k_nope: jax.Array
    k_rope: jax.Array
    value: jax.Array


def head_of(s: Shape, g: int, operands: Operands) -> Head:
    """Of references to a step's blocks."""
    def part(ref: Ref, width: int, first: int, size: int) -> jax.Array:
        return ref[:, g * width + first:g * width + first + size]
    both = s.nope + s.value
    return Head(part(operands.q_nope, s.nope, 0, s.nope), part(operands.q_rope, s.rope, 0, s.rope),
                part(operands.kv, both, 0, s.nope), operands.k_rope[...], part(operands.kv, both, s.nope, s.value))


def product(x: jax.Array, y: jax.Array, across: tuple[int, int] = (1, 0)) -> jax.Array:
    """Over these axes of x and y, in float32."""
    return jax.lax.dot_general(x, y, (((across[0],), (across[1],)), ((), ())), preferred_element_type=jnp.float32,
                               precision="highest" if x.dtype == jnp.float32 else None)


def by_need(step: Callable[[bool], None], wanted: Any, whole: Any) -> None:
    """`step(masked)`, if it is wanted at all; without a mask where nothing would be masked."""
    pl.when(wanted & whole)(functools.partial(step, False))
    pl.when(wanted & ~whole)(functools.partial(step, True))


def sees(extent: Extent, s: Shape, row: Any, i: Any, j: Any, queries_last: bool = False) -> jax.Array:
    """bool [queries, keys] of two blocks, or [keys, queries]: which see which."""
    axis = int(queries_last)
    shape = (s.block_k, s.block_q) if queries_last else (s.block_q, s.block_k)
    query, key = (jax.lax.broadcasted_iota(jnp.int32, shape, a) for a in (axis, 1 - axis))
    return j * s.block_k + key < extent.seen(row, i * s.block_q, query)
