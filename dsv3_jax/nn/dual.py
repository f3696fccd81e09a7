"""Two halves of a batch through the same layers, the exchanges of one beside the computing of the other (paper 1,
section 2.3.1; paper 2, section 3.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from dsv3_jax.expert_parallel.overlap import overlapped
from dsv3_jax.mesh import (
    AXES,
    COMPUTE,
    SPREAD,
    TOKENS,
    axes_of,
    constrain_batch,
    context_size,
    copy_for_each_device,
    gather_for_compute,
    is_one_device,
    on_each_device,
    shardings,
)
from dsv3_jax.nn.moe import RouterStats

Halves = tuple[jax.Array, jax.Array]
"""Every other sequence of a batch, [B/2, T, ...] each: two micro-batches that depend on each other in nothing."""
Layer = Callable[[Any, nnx.State], tuple[Any, RouterStats | None]]
"""(hidden or halves, weights) -> (the same, statistics of routing)."""
KEPT = "kept_by_halves"
"""Name of what the backward of such layers keeps."""


def halves(x_BTD: jax.Array) -> Halves:
    """Each device has as many sequences of one as of the other."""
    pairs = x_BTD.reshape(-1, 2, *x_BTD.shape[1:])
    return constrain_batch(pairs[:, 0]), constrain_batch(pairs[:, 1])


def joined(both: Halves) -> jax.Array:
    """The batch again."""
    pairs = jnp.stack(both, axis=1)
    return constrain_batch(pairs.reshape(-1, *pairs.shape[2:]))


def on_both(function: Callable[[jax.Array], tuple[jax.Array, RouterStats | None]], hidden: jax.Array | Halves) -> Any:
    """`function` of a batch, or of its halves, with the statistics of the whole."""
    if isinstance(hidden, jax.Array):
        return function(hidden)
    (one, stats), (other, other_stats) = (function(half) for half in hidden)
    if stats is None or other_stats is None:
        return (one, other), None
    return (one, other), stats.with_other_half(other_stats)


def run_layers(make_layer: Callable[[jax.Array], Layer], both: Halves, weights: Sequence[nnx.State],
               positions_T: jax.Array) -> tuple[Halves, list[RouterStats | None]]:
    """Halves through some layers.

    Args:
      make_layer: positions [T] -> a layer.
      weights: of each layer, as they are stored.
    """
    def function(weights: Sequence[nnx.State], values: tuple[Halves, jax.Array]) -> tuple[Halves, list]:
        hidden, positions_T = values
        layer, stats = make_layer(positions_T), []
        for state in weights:
            hidden, of_layer = layer(hidden, state)
            stats.append(of_layer)
        return hidden, stats
    # Devices that share a sequence exchange keys and values by the partitioner's means, which nothing here can order.
    if is_one_device() or context_size() > 1:
        return function(weights, (both, positions_T))
    policy = jax.checkpoint_policies.save_only_these_names(KEPT)
    return jax.checkpoint(_on_devices, policy=policy, static_argnums=(0,))(function, weights, both, positions_T)


def _on_devices(function: Callable[[Any, Any], Any], weights: Sequence[nnx.State], both: Halves,
                positions_T: jax.Array) -> tuple[Halves, list[RouterStats | None]]:
    """Each device has its part of all. Weights that all have enter as copies, so that the sum of their gradients is the
    partitioner's, see `mesh.copy_for_each_device`."""
    weights = [gather_for_compute(state) for state in weights]
    leaves, tree = jax.tree.flatten(weights)
    layouts = jax.tree.leaves(shardings(weights, jax.sharding.get_abstract_mesh(), COMPUTE))
    is_own = [any(axes_of(axes) for axes in layout.spec) for layout in layouts]
    arrays = [x if own else copy_for_each_device(x) for x, own in zip(leaves, is_own, strict=True)]
    specs = [layout.spec if own else PartitionSpec(SPREAD) for layout, own in zip(layouts, is_own, strict=True)]

    def local(arrays: list[jax.Array], both: Halves, positions_T: jax.Array) -> tuple[Halves, Any]:
        own = jax.tree.unflatten(tree, [x if own else x[0] for x, own in zip(arrays, is_own, strict=True)])
        hidden, stats = overlapped(function, lambda kept: checkpoint_name(kept, KEPT))(own, (both, positions_T))
        return hidden, jax.tree.map(lambda x: jnp.asarray(x)[None], stats)
    run = on_each_device(local, (specs, (TOKENS, TOKENS), PartitionSpec()),
                         ((TOKENS, TOKENS), PartitionSpec(AXES)))
    hidden, stats = run(arrays, both, positions_T)
    return hidden, [None if each is None else each.over_devices() for each in stats]
