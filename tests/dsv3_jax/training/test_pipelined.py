"""A step in a pipeline is the step of one device: losses to the bit, weights within the order of sums."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.core import jaxprs_in_params

from dsv3_jax.config import BatchConfig, ConfigError, MeshConfig, PipelineConfig
from dsv3_jax.mesh import batch_sharding, make_mesh
from dsv3_jax.presets import MODELS, RUNS
from dsv3_jax.training import pipelined
from dsv3_jax.training.checkpoint import named_leaves
from dsv3_jax.training.pipelined import cut_of
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.state import init_state, state_shardings
from dsv3_jax.training.step import compile_train_step

TINY = MODELS["tiny"]
# A dense layer, a MoE layer, a prediction module: two stages that differ, each with several parts.
TWO_STAGES = dataclasses.replace(TINY, num_hidden_layers=2)
FOUR_LAYERS = dataclasses.replace(TINY, num_hidden_layers=4)
MICRO_BATCHES = 8
RUN = dataclasses.replace(
    RUNS["tiny"], model=TWO_STAGES, recompute="none",
    batch=BatchConfig(sequences=4 * MICRO_BATCHES, sequence_length=16, micro_batches=MICRO_BATCHES))


@functools.cache
def first_state(model):
    """As NumPy."""
    config = dataclasses.replace(RUN, model=model)
    return jax.tree.map(np.asarray, init_state(config, make_mesh(MeshConfig(data=1), jax.devices()[:1])))


@functools.cache
def steps(config, used=MICRO_BATCHES):
    """Metrics of two steps, and the state after them by name, as NumPy."""
    mesh = config.mesh
    mesh = make_mesh(config.mesh, jax.devices()[:mesh.pipe * mesh.data * mesh.expert_parallel])
    step = compile_train_step(config, mesh)
    state = jax.device_put(first_state(config.model), state_shardings(config, mesh))
    columns = config.batch.sequence_length + 1 + config.model.num_nextn_predict_layers
    tokens = np.random.default_rng(0).integers(0, 320, (MICRO_BATCHES, config.batch.micro_batch, columns))
    tokens = jax.device_put(tokens.astype(np.int32), batch_sharding(mesh, leading=1))
    told = []
    for _ in range(2):
        state, metrics = step(state, tokens, jnp.int32(used), StepSettings(*map(jnp.float32, (3e-3, 1e-2, 0.3))))
        told.append(jax.tree.map(np.asarray, metrics))
    return told, {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


def of_one_device(config):
    return dataclasses.replace(config, mesh=MeshConfig(data=1), pipeline=PipelineConfig())


def in_pipeline(schedule, ranks, model=TWO_STAGES, **mesh):
    return dataclasses.replace(RUN, model=model, mesh=MeshConfig(pipe=ranks, data=1, **mesh),
                               pipeline=PipelineConfig(schedule))


def assert_same(got, want, *, losses: float, weights: float):
    """Of (metrics, state): losses of the first step within that share of them, of the second, whose weights differ,
    within some last places; weights after both within that of a unit; choices of experts and what follows from them are
    the same."""
    for number, (one, other) in enumerate(zip(got[0], want[0], strict=True)):
        for field in ("main", "mtp", "balance"):
            np.testing.assert_allclose(getattr(one.losses, field), getattr(other.losses, field),
                                       rtol=losses if number == 0 else 1e-6)
        np.testing.assert_array_equal(one.load_LE, other.load_LE)
        # Sums of squares of many thousand gradients.
        np.testing.assert_allclose(one.grad_norm, other.grad_norm, rtol=1e-5)
    for name, value in want[1].items():
        if name.startswith("router_bias"):
            np.testing.assert_array_equal(got[1][name], value, err_msg=name)
        elif name.startswith("params"):
            np.testing.assert_allclose(got[1][name], value, atol=weights, rtol=0, err_msg=name)


@pytest.mark.parametrize(("schedule", "ranks", "model"), [
    ("dualpipe", 2, TWO_STAGES),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("gpipe", 2, TWO_STAGES), ("1f1b", 2, TWO_STAGES), ("zb1p", 4, FOUR_LAYERS), ("dualpipe", 4, FOUR_LAYERS),
        ("interleaved", 2, FOUR_LAYERS), ("dualpipev", 2, FOUR_LAYERS)])],
    ids=lambda value: None if isinstance(value, int | str) else f"{value.num_hidden_layers} layers")
def test_a_step_is_that_of_one_device(schedule, ranks, model):
    """With MoE, multi-token prediction, biases and both optimizer moments. Gradients differ by the order of sums, which
    Adam's first steps amplify where a gradient is near zero."""
    config = in_pipeline(schedule, ranks, model)
    assert_same(steps(config), steps(of_one_device(config)), losses=0, weights=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "mesh"), [
    ("experts", {}), ("paper", {}), ("full", {"capacity_factor": 1.0}),
    ("paper", {"capacity_factor": 1.0, "dual": True})],
    ids=["experts", "paper", "full, in rounds", "paper, in rounds, two halves"])
def test_experts_are_spread_in_each_stage(recompute, mesh):
    """Over two nodes of two devices; forwards run beside backwards."""
    config = dataclasses.replace(in_pipeline("dualpipe", 2, scale_out=2, scale_up=2, **mesh), recompute=recompute)
    if "dual" in mesh:  # two sequences a device
        config = dataclasses.replace(config, batch=dataclasses.replace(RUN.batch, sequences=8 * MICRO_BATCHES))
    plain = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, pipe=1, dual=False), recompute="none")
    got, want = steps(config), steps(plain)
    assert_same(got, want, losses=1e-6, weights=1e-4)
    assert (int(got[0][0].dispatch_rounds) > 1) == ("capacity_factor" in mesh)
    if "dual" not in mesh:  # halves have buffers, and so rounds, of their own
        assert all(float(a) == float(b) for a, b in zip(got[0][0].traffic, want[0][0].traffic, strict=True))


class _Counted(Exception):
    """Ends a trace: what was counted is in the arguments."""


def products_of_last_stage(config, monkeypatch):
    """Matrix products of its forward, and of forward and backward."""
    def products(jaxpr):
        return sum(1 if equation.primitive.name == "dot_general" else
                   sum(products(inner) for inner in jaxprs_in_params(equation.params)) for equation in jaxpr.eqns)

    def count(program, stages, own, shared, micro_batches, hidden, **_):
        def loss(own, shared):
            return stages[-1](own, shared, jnp.zeros(hidden.shape, hidden.dtype), micro_batch)[0][1]
        own, micro_batch = jax.tree.map(lambda x: x[0], (own, micro_batches))
        raise _Counted(*(products(jax.make_jaxpr(function)(own, shared).jaxpr)
                         for function in (loss, jax.grad(loss, argnums=(0, 1)))))
    monkeypatch.setattr(pipelined, "run_program", count)
    with pytest.raises(_Counted) as counted:
        compile_train_step(config, make_mesh(config.mesh, jax.devices()[:2]))
    return counted.value.args


@pytest.mark.parametrize("dual", [False, True], ids=["whole", "halves"])
def test_the_last_stage_computes_again_once(dual, monkeypatch):
    """Its layers, its prediction module and its losses: of each product of the forward at most one more."""
    config = in_pipeline("dualpipe", 2, dual=dual)
    (forward, none), (_, experts), (_, full) = (
        products_of_last_stage(dataclasses.replace(config, recompute=kind), monkeypatch)
        for kind in ("none", "experts", "full"))
    assert none < experts < full <= none + forward


@pytest.mark.slow
def test_float8_in_stages():
    """bf16 between products: sums in another order fall to another neighbour here and there, 2^-9 of a value apart, of
    which the mean over 512 tokens leaves 2e-5 of the loss, and 1.3e-4 after a step of Adam."""
    config = dataclasses.replace(in_pipeline("dualpipe", 2, scale_out=2, scale_up=2), precision="fp8",
                                 recompute="experts")
    plain = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, pipe=1))
    for got, want in zip(steps(config)[0], steps(plain)[0], strict=True):
        np.testing.assert_allclose(got.losses.main, want.losses.main, rtol=1e-3)
        np.testing.assert_allclose(got.grad_norm, want.grad_norm, rtol=1e-2)


@pytest.mark.slow
def test_growing_batches_have_schedules_of_their_own():
    """Three micro-batches of eight go by 1F1B, DualPipe takes even numbers from four; the same program, which XLA fuses
    otherwise."""
    config = in_pipeline("dualpipe", 2)
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, ramp_from=12, ramp_until=0.5))
    assert [schedule.name for schedule in cut_of(config).schedules] == [
        "dualpipe", "1f1b", "dualpipe", "1f1b", "dualpipe", "1f1b"]
    for used in (3, 6, 8):
        assert_same(steps(config, used), steps(of_one_device(config), used), losses=1e-6, weights=1e-4)


@pytest.mark.parametrize(("changes", "says"), [
    ({"mesh": MeshConfig(pipe=3)}, ["mesh.pipe (3 ranks)", "batch.micro_batches (8)", "even", "take 4"]),
    ({"mesh": MeshConfig(pipe=8)}, ["batch.micro_batches (8)", "at least twice the ranks (8)", "take 16"]),
    ({"mesh": MeshConfig(pipe=4)}, ["mesh.pipe (4 stages) must be at most 3"]),
    ({"mesh": MeshConfig(pipe=4), "model": FOUR_LAYERS,
      "batch": dataclasses.replace(RUN.batch, ramp_from=8, ramp_until=0.5)},
     ["batch.ramp_from (8)", "2 micro-batches", "take 16 sequences"]),
    ({"mesh": MeshConfig(pipe=2), "pipeline": PipelineConfig("dualpipe", chunks=2)}, ["interleaved alone"]),
], ids=["odd ranks", "few micro-batches", "few layers", "small first batch", "chunks"])
def test_what_cannot_run_says_what_to_change(changes, says):
    with pytest.raises(ConfigError) as error:
        cut_of(dataclasses.replace(RUN, **changes))
    assert all(part in str(error.value) for part in says), error.value

