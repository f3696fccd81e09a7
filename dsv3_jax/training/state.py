"""All that a training run carries from step to step, and where each piece lives on the mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import RunConfig
from dsv3_jax.mesh import shardings
from dsv3_jax.nn.model import split_model
from dsv3_jax.training.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """The state of training; a pytree."""

    step: jax.Array
    """int32: optimizer steps taken."""
    params: nnx.State
    """float32 master weights."""
    router_bias: nnx.State
    """The routers' balancing biases: state, not parameters."""
    optimizer: Any
    ema: nnx.State | None
    """Moving average of the weights, float32, or None."""
    rng: jax.Array
    """Key for whatever draws random numbers while training (samples of text)."""


def new_state(config: RunConfig) -> TrainState:
    """A fresh state, unplaced. The same seed gives the same weights on every mesh."""
    return _state_of(config, *split_model(config.model, jax.random.key(config.seed))[1:])


def _state_of(config: RunConfig, params: nnx.State, router_bias: nnx.State) -> TrainState:
    """The state before the first step, with these weights."""
    # A copy in the making: the average must not share buffers with the weights, which are donated.
    ema = jax.tree.map(lambda x: x + 0, params) if config.optimizer.ema_decay is not None else None
    return TrainState(jnp.zeros((), jnp.int32), params, router_bias, make_optimizer(config.optimizer).init(params),
                      ema, jax.random.key_data(jax.random.key(config.seed)))


def state_shardings(config: RunConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    """A tree like `new_state` with the sharding of every leaf: ZeRO for all that has named axes, else replicated."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def one(leaf: Any) -> Any:
        return shardings(leaf, mesh) if isinstance(leaf, nnx.Variable) else everywhere
    return jax.tree.map(one, jax.eval_shape(lambda: new_state(config)),
                        is_leaf=lambda x: isinstance(x, nnx.Variable))


def init_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """A fresh state on the mesh, each device making only its part."""
    return jax.jit(lambda: new_state(config), out_shardings=state_shardings(config, mesh))()


def init_state_from(config: RunConfig, mesh: Mesh, params: nnx.State, router_bias: nnx.State) -> TrainState:
    """A fresh state with these weights, float32 and already on the mesh; their buffers are donated."""
    start = jax.jit(lambda params, router_bias: _state_of(config, params, router_bias),
                    out_shardings=state_shardings(config, mesh), donate_argnums=(0, 1))
    return start(params, router_bias)


def abstract_state(config: RunConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without data: what to restore into, or to compile for."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                        jax.eval_shape(lambda: new_state(config)), state_shardings(config, mesh))
