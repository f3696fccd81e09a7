"""Layers for two halves of the rows, the exchanges of one beside the products of the other (paper 1, section 2.3.1;
paper 2, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from dsv3_jax.expert_parallel.overlap import Task, side_by_side
from dsv3_jax.inference.paged_storage import PAGES, ROWS, PagedStorage
from dsv3_jax.mesh import (
    COMPUTE,
    DEVICES,
    TOKENS,
    batch_shards,
    gather_for_compute,
    is_one_device,
    on_each_device,
    shardings,
)
from dsv3_jax.nn.block import Block

if TYPE_CHECKING:
    from dsv3_jax.inference.forward import Span

LAYERS_AT_ONCE = 2
"""The last exchange of so many layers has what is left of its own half beside it, the others the other half."""
RunBlock = Callable[[Block, jax.Array, "Span", Any, Any], tuple[jax.Array, Any, jax.Array | None]]
"""(block, hidden [B, Q, D], span, storage, layer) -> (hidden, storage, tokens sent to slots [H, S] if they count)."""


def have_halves(rows: int) -> bool:
    """Whether so many rows of all devices are evenly many on each, and there is somebody to exchange with."""
    if is_one_device():
        return False
    return rows % (2 * batch_shards(jax.sharding.get_abstract_mesh())) == 0


def run_in_halves(run_block: RunBlock, blocks: Block | nnx.List, hidden_BQD: jax.Array, span: Span,
                  storage: PagedStorage, first: int) -> tuple[jax.Array, PagedStorage, jax.Array | None]:
    """Blocks in order, a stack or a list of them; also what they sent to slots, [L, H, S], if they count.

    Args:
      first: of the cache's layers, that of the first block.
    """
    if isinstance(blocks, nnx.List):
        states = [nnx.split(block)[1] for block in blocks]
        graphdef, count = nnx.split(blocks[0])[0], len(states)

        def layer_at(index: Any) -> nnx.State:
            return states[index]
    else:
        graphdef, stack = nnx.split(blocks)
        count = len(jax.tree.leaves(stack)[0])

        def layer_at(index: Any) -> nnx.State:
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)

    def some(carry: tuple[jax.Array, PagedStorage], at: Any, number: int = LAYERS_AT_ONCE) -> tuple[tuple, Any]:
        weights = [gather_for_compute(layer_at(at + layer)) for layer in range(number)]
        hidden_BQD, storage, sent = _on_devices(run_block, graphdef, weights, *carry, span, first + at)
        return (hidden_BQD, storage), sent
    groups, rest = divmod(count, LAYERS_AT_ONCE)
    starts, carry, parts = [group * LAYERS_AT_ONCE for group in range(groups)], (hidden_BQD, storage), []
    if isinstance(blocks, nnx.List):
        for at in starts:
            carry, sent = some(carry, at)
            parts.append(sent)
    elif groups:
        carry, sent = jax.lax.scan(some, carry, jnp.array(starts), unroll=groups == 1)
        parts.append(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), sent))
    if rest:
        carry, sent = some(carry, count - rest, rest)
        parts.append(sent)
    return *carry, jax.tree.map(lambda *each: jnp.concatenate(each), *parts)


def _on_devices(run_block: RunBlock, graphdef: nnx.GraphDef, weights: Sequence[nnx.State], hidden_BQD: jax.Array,
                storage: PagedStorage, span: Span, first: Any) -> tuple[jax.Array, PagedStorage, Any]:
    """Each device has its part of all, and halves its own rows."""
    leaves, tree = jax.tree.flatten(weights)
    specs = [layout.spec for layout in jax.tree.leaves(shardings(weights, jax.sharding.get_abstract_mesh(), COMPUTE))]
    fresh = span.fresh
    of_span = ((span.positions_BQ, span.real_BQ, span.number_BQ), span.lengths_B)

    def both(leaves: Any, values: Any) -> Any:
        hidden_BQD, (of_tokens, lengths_B), arrays_LPSx, table_BJ, first = values
        halves = [[x[number::2] for x in (hidden_BQD, table_BJ, *of_tokens, lengths_B)] for number in range(2)]
        held, told = storage, []
        for number, state in enumerate(jax.tree.unflatten(tree, leaves)):
            block, counts = nnx.merge(graphdef, state), []
            for half in halves:
                hidden, table, positions, real, numbers, lengths = half
                own = type(span)(positions, real, lengths, fresh, numbers)
                held = _with(held, arrays_LPSx, table)
                half[0], held, sent = run_block(block, hidden, own, held, first + number)
                arrays_LPSx = held.arrays_LPSx
                counts.append(sent)
            told.append(jax.tree.map(jnp.add, *counts))
        joined = jnp.stack([half[0] for half in halves], axis=1).reshape(hidden_BQD.shape)
        return joined, arrays_LPSx, jax.tree.map(lambda *each: jnp.stack(each), *told)

    def local(leaves: Any, *values: Any) -> Any:
        return side_by_side(Task(both, leaves, values))[0]
    run = on_each_device(local, (specs, TOKENS, (TOKENS, ROWS), PAGES, ROWS, PartitionSpec()),
                         (TOKENS, PAGES, PartitionSpec(None, *DEVICES)))
    hidden_BQD, arrays_LPSx, sent = run(leaves, hidden_BQD, of_span, storage.arrays_LPSx, storage.table_BJ,
                                        jnp.asarray(first))
    return hidden_BQD, _with(storage, arrays_LPSx, storage.table_BJ), sent


def _with(storage: PagedStorage, arrays_LPSx: tuple[jax.Array, ...], table_BJ: jax.Array) -> PagedStorage:
    return PagedStorage(arrays_LPSx, table_BJ, storage.format)
