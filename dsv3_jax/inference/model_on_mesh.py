"""A model laid out for decoding on one mesh: its structure, and its weights as decoding uses them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import Combine, ConfigError, Execution, ModelConfig, Precision, Transport
from dsv3_jax.expert_parallel.replicas import Deployment, Placement
from dsv3_jax.inference.cache import CacheFormat
from dsv3_jax.inference.expert_slots import check_placement, expert_layers, in_slots, with_tables
from dsv3_jax.inference.forward import unstacked
from dsv3_jax.mesh import AXES, COMPUTE, STORAGE, batch_sharding, gather_for_compute, keep_for_compute, shardings
from dsv3_jax.nn.model import model_structure, split_model
from dsv3_jax.precision.recipe import COMPUTE_DTYPE, COMPUTE_FORMAT, compute_weights, inference_weights

WORST_CASE_UP_TO = 16
"""Devices whose buffers have room for any routing at once in a decoding step."""
ROOM_BEYOND = 2.0
"""Times an even load, in the buffers of more devices. What exceeds it takes another round."""


class ModelOnMesh:
    """What programs that decode are made from.

    Args:
      model: the architecture.
      mesh: `dsv3_jax.mesh.make_mesh`'s. Its context axis counts as part of scale_up, but for `reads_only`: a decoding
        step has no sequence to share.
      precision: of weights and activations.
      cache: format of the cache (`LatentCache.empty`); None: that of `precision`.
      speculative: whether to draft with the multi-token-prediction modules.
      spread: leave weights spread over devices and gather each layer's when it runs (`MeshConfig.zero` "full").
      placement: where experts and their replicas are at first, such as `Placement.in_order(expert_layers(model),
        deployment_on(model, mesh, redundant))`; None: each is once, in order, and nobody counts its tokens.
      transport, combine, dual: `MeshConfig`'s.
      reads_only: prompts are read and nothing is decoded: devices of the mesh's context axis share them.

    Attributes:
      structure: static half of the model whose state `prepare` returns, for `nnx.merge`.
      execution: how decoding steps are computed.
      reading: how prompts are.

    Raises:
      ConfigError: `speculative` for a model without prediction modules, or a placement of another model or mesh.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, *, precision: Precision = "bf16",
                 cache: CacheFormat | None = None, speculative: bool = False, spread: bool = False,
                 placement: Placement | None = None, transport: Transport = "padded", combine: Combine = "plain",
                 dual: bool = False, reads_only: bool = False):
        if speculative and not model.num_nextn_predict_layers:
            raise ConfigError("speculative decoding needs model.num_nextn_predict_layers of 1 or more; this model has "
                              "none: decode without it")
        self._moved = mesh.shape["context"] > 1 and not reads_only
        self.model, self.mesh = model, _without_context(mesh) if self._moved else mesh
        self.speculative, self.cache = speculative, cache or COMPUTE_FORMAT[precision]
        self._precision, self._spread = precision, spread
        if placement is not None:
            check_placement(placement, model, self.mesh)
        self.placement = placement
        # A few tokens a device need little room even in the worst case, and to know the rounds costs a collective. With
        # many devices that room would be sent empty: at EP144, 20 GB a step for 64 rows a device.
        worst = float(self.mesh.size)
        self.reading = Execution(transport=transport, combine=combine, dual=dual)
        self.execution = dataclasses.replace(
            self.reading, capacity_factor=worst if worst <= WORST_CASE_UP_TO else ROOM_BEYOND)
        # On CPU a loop over a stack of layers would copy them; see `forward.unstacked`.
        self._layers_apart = not spread and self.mesh.devices.flat[0].platform == "cpu"
        self.structure = _structure(model, precision, self._layers_apart, placement and placement.deployment)
        self._prepare = jax.jit(self._prepared)

    def prepare(self, params: nnx.State, router_bias: nnx.State) -> nnx.State:
        """Weights as decoding uses them, once for all that is decoded: in compute precision, in float8 where products
        read that, gathered, experts in the placement's slots, and on CPU layer by layer (see `forward.unstacked`).
        `params` is not changed."""
        if self._moved:
            params, router_bias = (jax.device_put(x, shardings(x, self.mesh)) for x in (params, router_bias))
        with jax.set_mesh(self.mesh):
            return self._prepare(params, router_bias)

    def shapes(self) -> nnx.State:
        """Shapes and layouts of what `prepare` returns."""
        def prepared() -> nnx.State:
            _, params, router_bias = split_model(self.model, precision=self._precision)
            return self._prepared(params, router_bias)
        with jax.set_mesh(self.mesh):
            weights = jax.eval_shape(prepared)
        table = STORAGE if self._spread else COMPUTE
        return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), weights,
                            shardings(weights, self.mesh, table))

    @property
    def activations(self) -> jnp.dtype:
        """Type of hidden states."""
        return jnp.dtype(COMPUTE_DTYPE[self._precision])

    @property
    def window(self) -> int:
        """Most tokens of a row, prompt and answer together."""
        return self.model.max_position_embeddings

    def place(self, x: np.ndarray) -> jax.Array:
        """`x` [B, ...], which every process has whole, with its rows spread over the devices."""
        return jax.make_array_from_callback(x.shape, batch_sharding(self.mesh), lambda index: x[index])

    def _prepared(self, params: nnx.State, router_bias: nnx.State) -> nnx.State:
        weights = compute_weights(params, self._precision)
        if self.placement is not None:
            weights = in_slots(weights, self.placement, self.model.num_moe_layers)
        weights = inference_weights(weights if self._spread else gather_for_compute(weights), self._precision)
        weights = weights if self._spread else keep_for_compute(weights)
        model = nnx.merge(model_structure(self.model, self._precision), weights, router_bias)
        if self.placement is not None:
            model = with_tables(model, self.placement)
        return nnx.state(unstacked(model) if self._layers_apart else model)


@functools.cache
def _structure(config: ModelConfig, precision: Precision, layers_apart: bool,
               deployment: Deployment | None) -> nnx.GraphDef:
    """Found once: as a static argument of each step it would be hashed each time, for a millisecond."""
    structure = []

    def trace() -> None:
        model = nnx.merge(*split_model(config, precision=precision))
        if deployment is not None:
            model = with_tables(model, Placement.in_order(expert_layers(config), deployment))
        structure.append(nnx.graphdef(unstacked(model) if layers_apart else model))
    if not layers_apart and deployment is None:
        return model_structure(config, precision)
    jax.eval_shape(trace)
    return structure[0]


def _without_context(mesh: Mesh) -> Mesh:
    """The same devices in the same order, context counted as part of scale_up."""
    shape: dict[str, Any] = dict(mesh.shape)
    shape["scale_up"] *= shape["context"]
    shape["context"] = 1
    return Mesh(mesh.devices.reshape([shape[axis] for axis in AXES]), AXES, axis_types=mesh.axis_types)
