"""Weights from where they are stored to the ranks that compute with them. One device's part, linear in the weights:
gradients take the transpose of it back.

Stored, every weight is spread over the mesh, `pipe` included, and every rank has a part of every layer. A rank gets its
layers whole: parts of its layers from all ranks by an all-to-all over `pipe`, while they are smallest, then an
all-gather over each other axis that spreads them, slow networks first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.mesh import axes_of
from dsv3_jax.pipeline.account import stages_of
from dsv3_jax.pipeline.schedule import Schedule
from dsv3_jax.pipeline.stages import StageLayers


class Cut(NamedTuple):
    """Schedules for the same ranks, and which layers their stages have."""

    schedules: tuple[Schedule, ...]
    """The first one says which stages a rank has."""
    layers: tuple[StageLayers, ...]

    @property
    def slots(self) -> int:
        """MoE layers of the stage that has most."""
        return max(len(stage.moe) for stage in self.layers)

    @property
    def stages(self) -> np.ndarray:
        """int [ranks, chunks]: the stages of each rank, ascending."""
        first = self.schedules[0]
        return np.array([stages_of(first, rank) for rank in range(first.ranks)])

    @property
    def layer_RCL(self) -> np.ndarray:
        """int32 [ranks, chunks, slots]: which MoE layer is in each place; 0 in places that a stage has no layer for."""
        filled = [[*stage.moe, *[0] * (self.slots - len(stage.moe))] for stage in self.layers]
        return np.array(filled, np.int32).reshape(len(filled), self.slots)[self.stages]

    @property
    def kinds(self) -> list[StageLayers]:
        """Stages that differ in what they compute; see `kind_of`."""
        return list(dict.fromkeys(map(kind_of, self.layers)))


def kind_of(stage: StageLayers) -> StageLayers:
    """The stage, its MoE layers numbered from 0: they are its own, and of equal shape."""
    return stage._replace(moe=range(len(stage.moe)))


def lay_out(cut: Cut, state: nnx.State, stored: nnx.State) -> tuple[Any, Any]:
    """(weights of the rank's stages: a tuple over slots with leaves [chunks, ...]; all others, whole).

    Args:
      state: parameters or router biases as they are stored, this device's parts. Dense layers come out as a tuple.
      stored: the same tree with the `PartitionSpec` of each leaf.
    """
    def each(function: Callable[[jax.Array, _Spread], jax.Array], name: str) -> Any:
        def one(variable: nnx.Variable, spec: nnx.Variable) -> nnx.Variable:
            return variable.replace(function(variable.get_value(), _spread(variable, spec)))
        return jax.tree.map(one, state[name], stored[name], is_leaf=lambda x: isinstance(x, nnx.Variable))
    moe = each(functools.partial(_of_stages, cut.layer_RCL), "moe_layers")
    own = tuple(jax.tree.map(lambda x, slot=slot: x[:, slot], moe) for slot in range(cut.slots))
    rest = {name: each(_whole, name) for name in state if name != "moe_layers"}
    if "dense_layers" in rest:
        count = len(jax.tree.leaves(rest["dense_layers"])[0])
        rest["dense_layers"] = tuple(jax.tree.map(lambda x, n=n: x[n], rest["dense_layers"]) for n in range(count))
    return own, rest


_Spread = list[tuple[str, ...]]
"""Mesh axes that spread each dimension and are to be gathered, major first."""


def _spread(variable: nnx.Variable, spec: nnx.Variable) -> _Spread:
    names, value = variable.get_metadata("axes"), spec.get_value()
    dimensions = ("layer", *names) if variable.get_value().ndim == len(names) + 1 else names
    axes = [axes_of(entry) for entry in value] + [()] * (len(dimensions) - len(value))
    return [() if name == "expert" else entry for name, entry in zip(dimensions, axes, strict=True)]


def _whole(x: jax.Array, spread: _Spread) -> jax.Array:
    for dimension, axes in enumerate(spread):
        for axis in reversed(axes):
            x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
    return x


def _of_stages(layer_RCL: np.ndarray, x: jax.Array, spread: _Spread) -> jax.Array:
    """[layers, ...] -> [chunks, slots, ...]."""
    over_ranks = [dimension for dimension, axes in enumerate(spread) if "pipe" in axes]
    if not over_ranks:
        mine_CL = jnp.asarray(layer_RCL)[jax.lax.axis_index("pipe")]
        return _whole(x[mine_CL], [(), *spread])
    # `pipe` is the major axis of its dimension: parts from ranks stay apart until the others are gathered.
    (split,) = over_ranks
    parts = jax.lax.all_to_all(x[layer_RCL], "pipe", split_axis=0, concat_axis=0, tiled=True)
    parts = _whole(parts, [(), (), *(tuple(axis for axis in axes if axis != "pipe") for axes in spread)])
    parts = jnp.moveaxis(parts, 0, split + 1)
    return parts.reshape(*parts.shape[:split + 1], -1, *parts.shape[split + 3:])
