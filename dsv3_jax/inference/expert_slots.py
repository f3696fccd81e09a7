"""A model's experts in the slots of a placement: weights, structure, and the way from one placement to the next.

    L  MoE layers, the prediction modules' last      S  slots      E  experts, or the slots they are taken from
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.expert_parallel.replicas import Deployment, Placement
from dsv3_jax.mesh import EXPERT_AXES, FAST_AXES, is_one_device
from dsv3_jax.nn.model import DeepSeekV3
from dsv3_jax.nn.replicated import ReplicatedExperts

WEIGHTS = ("gate_up_proj", "down_proj")


def expert_layers(model: ModelConfig) -> int:
    """L."""
    return model.num_moe_layers + model.num_nextn_predict_layers


def deployment_on(model: ModelConfig, mesh: Mesh, redundant: int = 0, by_group: bool = False) -> Deployment:
    """The model's experts on the mesh.

    Args:
      redundant: slots beyond the model's experts.
      by_group: keep replicas on their router group's node; see `replicas`.

    Raises:
      ConfigError: the sizes don't go together.
    """
    nodes, experts = mesh.shape["scale_out"], model.n_routed_experts
    return Deployment(experts, experts + redundant, nodes * devices_of_node(mesh), nodes,
                      model.n_group if by_group else 1)


def devices_of_node(mesh: Mesh) -> int:
    """That share experts."""
    return math.prod(mesh.shape[axis] for axis in FAST_AXES)


def check_placement(placement: Placement, model: ModelConfig, mesh: Mesh) -> None:
    """Raises `ConfigError` unless the placement is one of this model's experts on this mesh."""
    deployment, nodes = placement.deployment, mesh.shape["scale_out"]
    for name, whence, wanted in [
            ("experts", "model.n_routed_experts", model.n_routed_experts), ("nodes", "mesh.scale_out", nodes),
            ("devices", "the mesh's scale_out*scale_up*context", nodes * devices_of_node(mesh))]:
        given = getattr(deployment, name)
        if given != wanted:
            raise ConfigError(f"placement.deployment.{name} ({given}) must be {whence} ({wanted}): make the deployment "
                              "with deployment_on(model, mesh, ...)")
    if deployment.groups not in (1, model.n_group):
        raise ConfigError(f"placement.deployment.groups ({deployment.groups}) must be model.n_group ({model.n_group}), "
                          "or 1 to place replicas on any node")
    layers = expert_layers(model)
    if placement.expert_LS.shape != (layers, deployment.slots):
        raise ConfigError(f"placement.expert_LS has shape {placement.expert_LS.shape}: give [MoE layers and prediction "
                          f"modules ({layers}), slots ({deployment.slots})]")


def regrouped(weight_E: jax.Array, expert_S: jax.Array) -> jax.Array:
    """[E, ...] -> [S, ...], spread over the devices that share experts: slot s gets weight_E[expert_S[s]].

    There and back through a layout in which every device has its share of each expert, where to choose experts sends
    nothing. So each device sends its part of a layer twice, whatever moves: two all-to-alls that load all links alike,
    in no more room than three times that part. To send what moves and no more would save less than it seems, for the
    device that sends most sets the time, and of its few slots one or two often move.
    """
    experts, *shape = weight_E.shape
    flat_EX = weight_E.reshape(experts, -1)
    width = flat_EX.shape[1]
    if is_one_device():
        return flat_EX[expert_S].reshape(-1, *shape)
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in EXPERT_AXES)
    constrain = jax.lax.with_sharding_constraint
    flat_EX = constrain(jnp.pad(flat_EX, ((0, 0), (0, -width % devices))), PartitionSpec(None, EXPERT_AXES))
    flat_SX = constrain(flat_EX[expert_S], PartitionSpec(None, EXPERT_AXES))
    return constrain(flat_SX, PartitionSpec(EXPERT_AXES))[:, :width].reshape(-1, *shape)


def in_slots(params: nnx.State, placement: Placement, main: int) -> nnx.State:
    """`params` with experts' weights by slot; stacks of layers one layer at a time.

    Args:
      main: MoE layers of the main model; those that follow in the placement are the prediction modules'.
    """
    flat: list[tuple[tuple[Any, ...], nnx.Variable]] = []
    path: Any
    for path, variable in nnx.to_flat_state(params):
        if variable.get_metadata("axes")[0] == "expert":
            if path[0] == "mtp":
                take = functools.partial(regrouped, expert_S=placement.expert_LS[main + path[1]])
            else:
                expert_LS = jnp.asarray(placement.expert_LS[:main])
                take = functools.partial(_regrouped_stack, expert_LS=expert_LS)
            variable = variable.replace(jax.tree.map(take, variable.get_value()))
        flat.append((path, variable))
    return nnx.from_flat_state(flat)


def _regrouped_stack(weight_LE: jax.Array, expert_LS: jax.Array) -> jax.Array:
    return jax.lax.map(lambda layer: regrouped(*layer), (weight_LE, expert_LS))


def with_tables(model: DeepSeekV3, placement: Placement) -> DeepSeekV3:
    """`model`, whose layers are stacked, with its mixtures of experts replicated; it is changed."""
    replicas_LE, slots_LER = map(jnp.asarray, _tables(placement))
    main = model.config.num_moe_layers
    places: list[tuple[Any, Any]] = [(model.moe_layers, slice(main))]
    places += [(module.block, main + depth) for depth, module in enumerate(model.mtp)]
    for block, layers in places:
        block.mlp = ReplicatedExperts(block.mlp, replicas_LE[layers], slots_LER[layers],
                                      slots=placement.deployment.slots, anywhere=placement.deployment.is_global)
    return model


def _tables(placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    return placement.replicas_LE, placement.replica_slots_LER


class LayerMover:
    """Moves the experts of one layer at a time, by programs compiled ahead.

    Args:
      weights: of `ModelOnMesh.prepare` for a placement, or their shapes. Where layers are stacked, `move` overwrites
        them.

    Attributes:
      compiled: the programs, by whether they are for a layer in a stack.
      expert_bytes: of the weights of one expert of one layer.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, weights: nnx.State):
        self._mesh, self._main = mesh, model.num_moe_layers
        self._whole = NamedSharding(mesh, PartitionSpec())
        flat = dict(nnx.to_flat_state(weights))
        self._stacked = ("moe_layers", "mlp", "replicas_E") in flat
        self.compiled: dict[bool, Any] = {}
        for layer in range(expert_layers(model)):
            path, index = self._place_of(layer)
            stacked = index is not None
            if stacked not in self.compiled:
                values = self._values(flat, path)
                self.compiled[stacked] = self._compile(values, stacked)
                held = np.prod(jax.tree.leaves(values)[0].shape[:1 + stacked])
                self.expert_bytes = sum(int(x.size // held) * x.dtype.itemsize for x in jax.tree.leaves(values))

    def move(self, weights: nnx.State, layer: int, old: Placement, new: Placement) -> nnx.State:
        """The weights with one layer's experts and tables as the new placement has them; others' are not looked at."""
        path, index = self._place_of(layer)
        flat = dict(nnx.to_flat_state(weights))
        source_S = old.replica_slots_LER[layer, new.expert_LS[layer], 0]
        arguments = [self._everywhere(x) for x in (source_S, np.int32(index or 0))]
        values = self.compiled[index is not None](self._values(flat, path), *arguments)
        for name, value in zip(WEIGHTS, values, strict=True):
            at = (*path, "moe", "experts", name)
            flat[at] = flat[at].replace(value)
        for name, table in zip(("replicas_E", "replica_slots_ER"), _tables(new), strict=True):
            held = flat[*path, name].get_value()
            changed = table[layer] if index is None else np.asarray(held).copy()
            if index is not None:
                changed[index] = table[layer]
            flat[*path, name] = flat[*path, name].replace(_like(held, changed))
        return nnx.from_flat_state(flat)

    def _compile(self, values: tuple[Any, ...], stacked: bool) -> Any:
        def move(values: tuple[Any, ...], source_S: jax.Array, index: jax.Array) -> tuple[Any, ...]:
            def one(x: jax.Array) -> jax.Array:
                if not stacked:
                    return regrouped(x, source_S)
                # Constrained, or the compiler would send the whole stack to take one layer of it after that.
                layer = jax.lax.with_sharding_constraint(jax.lax.dynamic_index_in_dim(x, index, keepdims=False),
                                                         PartitionSpec(EXPERT_AXES))
                return jax.lax.dynamic_update_index_in_dim(x, regrouped(layer, source_S), index, 0)
            return jax.tree.map(one, values)
        slots = jax.tree.leaves(values)[0].shape[int(stacked)]
        source, index = (jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._whole) for shape in ((slots,), ()))
        with jax.set_mesh(self._mesh):
            # A stack is overwritten: there is no room for another.
            run: Any = jax.jit(move, out_shardings=jax.tree.map(lambda x: x.sharding, values),
                               donate_argnums=(0,) * stacked)
            return run.lower(values, source, index).compile()

    def _place_of(self, layer: int) -> tuple[tuple[Any, ...], int | None]:
        """The path of its mixture of experts, and its place in the stack there, if that is one."""
        if layer >= self._main:
            return ("mtp", layer - self._main, "block", "mlp"), None
        return (("moe_layers", "mlp"), layer) if self._stacked else (("moe_layers", layer, "mlp"), None)

    def _values(self, flat: dict[tuple, nnx.Variable], path: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(flat[*path, "moe", "experts", name].get_value() for name in WEIGHTS)

    def _everywhere(self, x: np.ndarray | np.int32) -> jax.Array:
        return jax.make_array_from_callback(np.shape(x), self._whole, lambda index: np.asarray(x)[index])


def _like(held: jax.Array, new: np.ndarray) -> jax.Array:
    return jax.make_array_from_callback(held.shape, held.sharding, lambda index: new[index])
