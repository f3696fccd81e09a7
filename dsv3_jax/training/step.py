"""One training step: gradients, optimizer, router bias, moving average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import RunConfig
from dsv3_jax.expert_parallel.plan import Traffic
from dsv3_jax.mesh import batch_sharding, compiler_options, gather_for_compute
from dsv3_jax.nn.model import model_structure
from dsv3_jax.precision.recipe import compute_weights
from dsv3_jax.training.loss import Losses, training_losses
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.pipelined import Told, pipelined_gradients
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.state import TrainState, abstract_state, state_shardings


class StepMetrics(NamedTuple):
    """What a step reports."""

    losses: Losses
    grad_norm: jax.Array
    """float32: global norm before clipping."""
    load_LE: jax.Array
    """float32 [MoE layers + MTP depths, E]: tokens sent to each expert in the whole batch."""
    dispatch_rounds: jax.Array
    """int32: the most that any micro-batch, layer and expert-parallel group needed."""
    traffic: Traffic
    """float32: sums over micro-batches, layers and devices, of one dispatch each."""


def make_train_step(config: RunConfig) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """`step(state, tokens, micro_batches, settings) -> (state, metrics)`, to be compiled once.

    tokens is int32 [batch.micro_batches, micro_batch, T + 1 + depth]; the first `micro_batches` (int32 scalar) of them
    are used, so that a growing batch needs no second program. settings is a `StepSettings` of float32 scalars.
    """
    structure, optimizer = model_structure(config.model, config.precision), make_optimizer(config.optimizer)

    def loss(weights: nnx.State, router_bias: nnx.State, tokens: jax.Array,
             settings: StepSettings) -> tuple[jax.Array, Told]:
        losses, output = training_losses(nnx.merge(structure, weights, router_bias), tokens, config.execution)
        total = (losses.main + settings.mtp_weight * losses.mtp + config.model.aux_loss_alpha * losses.balance)
        return total, Told(losses, output.stats.load_E, jnp.max(output.stats.rounds),
                           jax.tree.map(jnp.sum, output.stats.traffic))

    def step(state: TrainState, tokens: jax.Array, micro_batches: jax.Array,
             settings: StepSettings) -> tuple[TrainState, StepMetrics]:
        if config.mesh.pipe > 1:
            grads, told = pipelined_gradients(config, compute_weights(state.params, config.precision),
                                              state.router_bias, tokens, micro_batches, settings.mtp_weight)
        else:
            weights = weights_for_compute(state.params, config)

            def micro(tokens: jax.Array) -> tuple[nnx.State, Told]:
                grads, told = jax.grad(loss, has_aux=True)(weights, state.router_bias, tokens, settings)
                return jax.tree.map(lambda g: g.astype(jnp.float32), grads), told
            grads, told = _mean_over_micro_batches(micro, tokens, micro_batches)
        with jax.named_scope("optimizer"):
            direction, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda w, u: w - settings.learning_rate * u, state.params, direction)
        new = TrainState(state.step + 1, params,
                         balanced_bias(state.router_bias, told.load_LE, settings.bias_speed,
                                       config.model.num_moe_layers),
                         optimizer_state, _moving_average(state.ema, params, config.optimizer.ema_decay), state.rng)
        return new, StepMetrics(told.losses, optax.tree.norm(grads), *told[1:])
    return step


def weights_for_compute(params: nnx.State, config: RunConfig) -> nnx.State:
    """The weights a step computes with: in compute precision, and gathered at once (zero1) or left to the modules,
    which gather what they find spread (full, and where a pipeline's weights serve the whole model)."""
    weights = compute_weights(params, config.precision)
    return weights if config.mesh.gathers_by_layer else gather_for_compute(weights)


def _mean_over_micro_batches(micro: Callable[[jax.Array], tuple[Any, Told]], tokens: jax.Array,
                             micro_batches: jax.Array) -> tuple[Any, Told]:
    """Mean gradients and losses, summed expert load and traffic, and most rounds over the first `micro_batches` rows of
    tokens [M, b, ...]."""
    if tokens.shape[0] == 1:
        return micro(tokens[0])

    def add(index: jax.Array, total: tuple[Any, Told]) -> tuple[Any, Told]:
        new = micro(jax.lax.dynamic_index_in_dim(tokens, index, keepdims=False))
        grads, told = jax.tree.map(jnp.add, total, new)
        return grads, told._replace(dispatch_rounds=jnp.maximum(total[1].dispatch_rounds, new[1].dispatch_rounds))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro, tokens[0]))
    with jax.named_scope("micro_batches"):
        grads, told = jax.lax.fori_loop(0, micro_batches, add, zero)
    grads, losses = jax.tree.map(lambda x: x / micro_batches, (grads, told.losses))
    return grads, told._replace(losses=losses)


def balanced_bias(router_bias: nnx.State, load_LE: jax.Array, speed: jax.Array, moe_layers: int) -> nnx.State:
    """Moves each bias against its expert's load error: overloaded down, underloaded up, by `speed` (section 2.1.2).

    load_LE has the rows of the stacked MoE layers first, then one for each prediction depth.
    """
    move_LE = speed * jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)

    def moved(path: tuple[Any, ...], bias: nnx.Variable) -> nnx.Variable:
        own = move_LE[:moe_layers] if path[0] == "moe_layers" else move_LE[moe_layers + path[1]]
        return bias.replace(bias.get_value() + own)
    return nnx.from_flat_state([(path, moved(path, bias)) for path, bias in nnx.to_flat_state(router_bias)])


def _moving_average(ema: nnx.State | None, params: nnx.State, decay: float | None) -> nnx.State | None:
    if decay is None:
        return None
    return jax.tree.map(lambda average, now: decay * average + (1 - decay) * now, ema, params)


def compile_train_step(config: RunConfig, mesh: Mesh) -> Any:
    """The compiled step for `mesh`; the state argument is donated."""
    batch, depth = config.batch, config.model.num_nextn_predict_layers
    tokens = jax.ShapeDtypeStruct((batch.micro_batches, batch.micro_batch, batch.sequence_length + 1 + depth),
                                  jnp.int32, sharding=batch_sharding(mesh, leading=1))
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    options = compiler_options(mesh) if config.mesh.overlaps else {}
    with jax.set_mesh(mesh):
        step = jax.jit(make_train_step(config), donate_argnums=0, out_shardings=(state_shardings(config, mesh), None))
        return step.lower(abstract_state(config, mesh), tokens, jax.ShapeDtypeStruct((), jnp.int32),
                          StepSettings(scalar, scalar, scalar)).compile(options)
