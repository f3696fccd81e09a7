"""Gradients of a step by a pipeline: the model cut into stages, micro-batches through them as a schedule says.

Each device runs its part of everything (`shard_map` over all axes), so gradients are summed over devices once a step
and not with every micro-batch. Master weights are stored spread over ranks and know nothing of stages; a step lays
layers out on the ranks that compute them, on two for DualPipe, and brings gradients back the same way.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.config import ConfigError, RunConfig
from dsv3_jax.expert_parallel.plan import Traffic
from dsv3_jax.mesh import AXES, BATCH_AXES, axes_of, check_batch, on_each_device, shardings
from dsv3_jax.nn.block import layer_of, recomputed
from dsv3_jax.nn.dual import halves, joined
from dsv3_jax.nn.model import DeepSeekV3, embed_with_depths, run_prediction_modules
from dsv3_jax.nn.moe import RouterStats
from dsv3_jax.pipeline.executor import Stage, run_program
from dsv3_jax.pipeline.placement import Cut, kind_of, lay_out
from dsv3_jax.pipeline.schedules import fitting_sizes, make, with_fewer_put_off
from dsv3_jax.pipeline.stages import StageLayers, cut_model
from dsv3_jax.pipeline.tables import Program, make_tables
from dsv3_jax.precision.recipe import COMPUTE_DTYPE, RECIPES
from dsv3_jax.training.loss import Losses, prediction_losses


class Told(NamedTuple):
    """What micro-batches report beside their gradients."""

    losses: Losses
    load_LE: jax.Array
    dispatch_rounds: jax.Array
    traffic: Traffic


@functools.cache
def cut_of(config: RunConfig) -> Cut:
    """The schedules of a run, that of the whole batch first, and what their stages have.

    While a batch grows it has fewer micro-batches. What the run's schedule does not take (DualPipe an odd number, or
    less than twice the ranks) goes by 1F1B, if the stages are as many as the ranks.

    Raises:
      ConfigError: no such schedule has these ranks and micro-batches, or there are fewer layers than stages.
    """
    batch, ranks, name = config.batch, config.mesh.pipe, config.pipeline.schedule
    chunks = config.pipeline.chunks
    try:
        whole = make(name, ranks, batch.micro_batches, chunks=chunks)
    except ConfigError as error:
        raise ConfigError(f"pipeline.schedule, mesh.pipe ({ranks} ranks) and batch.micro_batches "
                          f"({batch.micro_batches}) do not go together: {error}") from error
    growing = []
    for micro_batches in _growing(config):
        fits = fitting_sizes(name, ranks, micro_batches) == (ranks, micro_batches)
        if not fits and (whole.stages != ranks or micro_batches < ranks):
            least = fitting_sizes(name if whole.stages != ranks else "1f1b", ranks, 1)[1]
            raise ConfigError(f"batch.ramp_from ({batch.ramp_from}) makes batches of {micro_batches} micro-batches, "
                              f"too few for pipeline.schedule ({name}) on mesh.pipe ({ranks}) ranks: take "
                              f"{least * batch.micro_batch} sequences, or None")
        growing.append(make(name, ranks, micro_batches, chunks=chunks) if fits else make("1f1b", ranks, micro_batches))
    schedules = [whole, *growing]
    if config.pipeline.put_off is not None:
        schedules = [with_fewer_put_off(schedule, config.pipeline.put_off) for schedule in schedules]
    return Cut(tuple(schedules), tuple(cut_model(config.model, whole.stages)))


def check_step(config: RunConfig, mesh: Mesh) -> None:
    """Raises `ConfigError` for a batch that does not divide over the mesh, or a pipeline that no schedule runs."""
    check_batch(config.batch, mesh, config.mesh.dual)
    if config.mesh.pipe > 1:
        cut_of(config)


@functools.cache
def program_of(cut: Cut) -> Program:
    """Tables of its schedules."""
    kinds = cut.kinds
    return make_tables(cut.schedules, [kinds.index(kind_of(stage)) for stage in cut.layers])


def _growing(config: RunConfig) -> range:
    """Numbers of micro-batches below the whole batch's that a growing batch can have."""
    batch = config.batch
    return range((batch.ramp_from or batch.sequences) // batch.micro_batch, batch.micro_batches)


def pipelined_gradients(config: RunConfig, weights: nnx.State, router_bias: nnx.State, tokens: jax.Array,
                        micro_batches: jax.Array, mtp_weight: jax.Array) -> tuple[nnx.State, Told]:
    """Mean gradients over micro-batches, float32, spread as weights are stored, and what micro-batches told.

    Args:
      weights: in compute precision, spread as they are stored.
      tokens: int32 [M, b, T + 1 + depth].
      micro_batches: int32 scalar; the first so many are used.
    """
    cut, mesh = cut_of(config), jax.sharding.get_abstract_mesh()
    stored, stored_bias = (jax.tree.map(lambda sharding: sharding.spec, shardings(state, mesh))
                           for state in (weights, router_bias))
    devices = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def on_device(weights: nnx.State, router_bias: nnx.State, tokens: jax.Array, micro_batches: jax.Array,
                  mtp_weight: jax.Array) -> tuple[nnx.State, Told]:
        def laid_out(weights: nnx.State) -> tuple[Any, Any]:
            return lay_out(cut, weights, stored)
        (own, shared), (own_bias, shared_bias) = laid_out(weights), lay_out(cut, router_bias, stored_bias)
        *gradients, told = _Stages(config, cut).run((own, own_bias), (shared, shared_bias), tokens, micro_batches,
                                                    mtp_weight)
        in_float32 = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), weights)
        (parts,) = jax.linear_transpose(laid_out, in_float32)(tuple(gradients))
        return jax.tree.map(lambda x, spec: _summed(x, spec) / (devices * micro_batches), parts, stored), told
    whole = PartitionSpec()
    specs = stored, stored_bias, PartitionSpec(None, BATCH_AXES), whole, whole
    return on_each_device(on_device, specs, (stored, whole))(weights, router_bias, tokens, micro_batches, mtp_weight)


class _Stages:
    """The model's parts as stages, on one device."""

    def __init__(self, config: RunConfig, cut: Cut):
        self._config, self._cut = config, cut
        self._depth = config.model.num_nextn_predict_layers
        model = nnx.eval_shape(lambda: DeepSeekV3(config.model, nnx.Rngs(0), RECIPES[config.precision]))
        self._graph = {name: nnx.split(getattr(model, name))[0] for name in ("embed_tokens", "moe_layers", "norm",
                                                                             "lm_head")}
        if config.model.first_k_dense_replace:
            self._graph["dense_layers"] = nnx.split(model.dense_layers)[0]
        self._mtp_graph = [nnx.split(module)[0] for module in model.mtp]

    def run(self, own: Any, shared: Any, tokens: jax.Array, micro_batches: jax.Array, mtp_weight: jax.Array
            ) -> tuple[Any, Any, Told]:
        """(gradients of the rank's layers, [chunks, ...]; this rank's part of those of the rest; what all devices
        told together)."""
        config, cut = self._config, self._cut
        program = program_of(cut)
        shape = tokens.shape[1], tokens.shape[2] - 1 - self._depth, config.model.hidden_size
        totals = self._nothing_told()
        each = jnp.zeros(len(tokens))
        whole = micro_batches == len(tokens)
        result = run_program(
            program, [self._stage(kind) for kind in cut.kinds], own, shared,
            (tokens, jnp.broadcast_to(mtp_weight, len(tokens))),
            jax.ShapeDtypeStruct(shape, COMPUTE_DTYPE[config.precision]), fold=_fold,
            totals=totals._replace(losses=jax.tree.map(lambda x: each, totals.losses)),
            which=jnp.where(whole, 0, 1 + micro_batches - _growing(config).start) if len(cut.schedules) > 1 else 0)
        return result.own_gradients[0], result.shared_gradients[0], self._of_all(result.told, micro_batches)

    def _stage(self, layers: StageLayers) -> Stage:
        """A kind of stage as a function."""
        config, depth, graph = self._config, self._depth, self._graph

        def stage(own: Any, shared: Any, hidden: jax.Array, micro_batch: tuple) -> tuple:
            (weights, bias), (tokens, mtp_weight) = shared, micro_batch
            positions_T = jnp.arange(hidden.shape[1])
            told = self._nothing_told()
            stats: list[RouterStats] = []
            ahead: list[jax.Array] = []
            if layers.first or (layers.last and depth):
                table = nnx.merge(graph["embed_tokens"], weights["embed_tokens"])
                embedded, *ahead = embed_with_depths(table, tokens[:, :-1], depth)
                hidden = embedded if layers.first else hidden
            through: Any = halves(hidden) if config.mesh.dual else hidden
            for number in layers.dense:
                run = layer_of(graph["dense_layers"], positions_T, config.execution)
                through, _ = run(through, weights["dense_layers"][number])
            for slot in layers.moe:
                run = layer_of(graph["moe_layers"], positions_T, config.execution)
                through, of_layer = run(through, nnx.merge_state(own[0][slot], own[1][slot]))
                stats.append(of_layer)
            hidden = joined(through) if config.mesh.dual else through
            main = mtp = jnp.zeros(())
            if layers.last:
                end = recomputed(self._end, config.recompute)
                main, mtp, more = end(weights, bias, hidden, ahead, tokens, positions_T)
                stats += [jax.tree.map(lambda x: x[0], of_layer) for of_layer in more]
                hidden = jnp.zeros_like(hidden)
            for place, of_layer in enumerate(stats):
                at = place if place < len(layers.moe) else self._cut.slots + place - len(layers.moe)
                told = _with_layer(told, at, of_layer)
            losses = Losses(main, mtp, told.losses.balance)
            total = main + mtp_weight * mtp + config.model.aux_loss_alpha * losses.balance
            return (hidden, total), told._replace(losses=losses)
        return stage

    def _end(self, weights: Any, bias: Any, hidden: jax.Array, ahead: list[jax.Array], tokens: jax.Array,
             positions_T: jax.Array) -> tuple[jax.Array, jax.Array, list[RouterStats]]:
        """Losses, and statistics of the multi-token-prediction modules. Their layers do not compute anything again by
        themselves: the whole is, and would do it twice."""
        config, graph = self._config, self._graph
        execution = dataclasses.replace(config.execution, recompute="none")
        normed = nnx.merge(graph["norm"], weights["norm"])(hidden)
        previous = hidden if config.model.mtp_hidden == "pre_norm" else normed
        modules = [nnx.merge(graphdef, weights["mtp"][k], bias["mtp"][k]) for k, graphdef in enumerate(self._mtp_graph)]
        mtp_hidden, stats = run_prediction_modules(modules, previous, ahead, positions_T, execution)
        head = nnx.merge(graph["lm_head"], weights["lm_head"])
        return *prediction_losses(head, normed, mtp_hidden, tokens, self._depth), stats

    def _nothing_told(self) -> Told:
        zero = jnp.zeros(())
        load = jnp.zeros((self._cut.slots + self._depth, self._config.model.n_routed_experts))
        return Told(Losses(zero, zero, zero), load, jnp.zeros((), jnp.int32), Traffic(*[zero] * len(Traffic._fields)))

    def _of_all(self, told: Told, micro_batches: jax.Array) -> Told:
        """[chunks, ...] of each device -> means of losses over micro-batches, sums and maxima of the rest.

        Losses are added in the order of micro-batches, as without a pipeline.
        """
        cut, rank = self._cut, jax.lax.axis_index("pipe")
        rows = self._config.model.num_moe_layers + self._depth
        places = np.full((*cut.stages.shape, cut.slots + self._depth), rows, np.int32)
        for (at, number) in np.ndenumerate(cut.stages):
            stage = cut.layers[number]
            places[at][:len(stage.moe)] = stage.moe
            if stage.last:
                places[at][cut.slots:] = range(rows - self._depth, rows)
        load = jnp.zeros((rows, told.load_LE.shape[-1])).at[jnp.asarray(places)[rank]].add(told.load_LE, mode="drop")
        everywhere = ("pipe", *BATCH_AXES)
        losses_M = jax.tree.map(lambda x: jax.lax.pmean(jax.lax.psum(x.sum(axis=0), "pipe"), BATCH_AXES), told.losses)
        losses = jax.lax.scan(lambda total, new: (jax.tree.map(jnp.add, total, new), None),
                              jax.tree.map(lambda x: jnp.zeros(()), losses_M), losses_M)[0]
        losses = jax.tree.map(lambda x: x / micro_batches, losses)
        return Told(losses, jax.lax.psum(load, everywhere), jax.lax.pmax(jnp.max(told.dispatch_rounds), everywhere),
                    jax.tree.map(lambda x: jax.lax.psum(x.sum(), everywhere), told.traffic))


def _summed(gradient: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Over devices that store the same."""
    stored = {axis for entry in spec for axis in axes_of(entry)}
    return jax.lax.psum(gradient, tuple(axis for axis in AXES if axis not in stored))


def _with_layer(told: Told, at: int, stats: RouterStats) -> Told:
    """With the statistics of one more layer, whose place among those told is `at`."""
    return Told(told.losses._replace(balance=told.losses.balance + stats.balance_loss),
                told.load_LE.at[at].set(stats.load_E), jnp.maximum(told.dispatch_rounds, stats.rounds),
                jax.tree.map(lambda total, x: total + jnp.sum(x), told.traffic, stats.traffic))


def _fold(total: Told, told: Told, micro_batch: jax.Array) -> Told:
    """With what one micro-batch told; losses stay apart."""
    return Told(
        jax.tree.map(lambda each, new: each.at[micro_batch].add(new), total.losses, told.losses),
        total.load_LE + told.load_LE, jnp.maximum(total.dispatch_rounds, told.dispatch_rounds),
        jax.tree.map(jnp.add, total.traffic, told.traffic))
