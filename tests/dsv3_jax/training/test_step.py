"""Losses, gradients, optimizer and balancing of one step."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dsv3_jax.config import BatchConfig, MeshConfig, OptimizerConfig
from dsv3_jax.mesh import batch_sharding, make_mesh
from dsv3_jax.nn.router import sequence_balance_loss
from dsv3_jax.presets import MODELS, RUNS
from dsv3_jax.training.checkpoint import named_leaves
from dsv3_jax.training.loss import cross_entropy, negative_log_likelihood, training_losses
from dsv3_jax.training.optimizer import make_optimizer
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.state import init_state, state_shardings
from dsv3_jax.training.step import balanced_bias, compile_train_step
from tests import oracle
from tests.weights import model_from_oracle

TINY = MODELS["tiny"]
TWO_DEPTHS = dataclasses.replace(TINY, num_nextn_predict_layers=2)
SHORT = dataclasses.replace(TINY, num_hidden_layers=2, num_nextn_predict_layers=0)
# Without the dense layer, which SHORT has on meshes: the prediction module's block is a second one to compile.
PREDICTING = dataclasses.replace(SHORT, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=1)
SMALL_RUN = dataclasses.replace(RUNS["tiny"], model=SHORT, batch=BatchConfig(sequences=8, sequence_length=16),
                                recompute="none")


def _tokens(config, batch=2, length=12):
    columns = length + 1 + config.num_nextn_predict_layers
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, columns))


@functools.cache
def _two_depths():
    """Weights, tokens, and what gives gradients: (weights of the two losses) -> losses, gradients."""
    weights, tokens = oracle.random_weights(TWO_DEPTHS, seed=5), _tokens(TWO_DEPTHS, batch=8)
    graphdef, params, rest = nnx.split(model_from_oracle(TWO_DEPTHS, weights), nnx.Param, ...)

    def total(params, parts):
        losses, _ = training_losses(nnx.merge(graphdef, params, rest), tokens)
        return parts[0] * losses.main + parts[1] * losses.mtp, losses
    program = jax.jit(jax.grad(total, has_aux=True))
    return weights, tokens, lambda *parts: program(params, np.float32(parts))[::-1]


def test_losses_equal_the_oracle():
    weights, tokens, gradients = _two_depths()
    main, depths = oracle.losses(TWO_DEPTHS, weights, tokens)
    losses, _ = gradients(1, 0.3)
    assert float(losses.main) == pytest.approx(main, rel=1e-5)
    assert float(losses.mtp) == pytest.approx(np.mean(depths), rel=1e-5)


def test_balance_loss_equals_the_oracle():
    scores = np.random.default_rng(0).uniform(0.01, 1, (3, 10, 16))
    assert float(sequence_balance_loss(TINY, scores.astype(np.float32))) == pytest.approx(
        oracle.sequence_balance_loss(TINY, scores), rel=1e-5)


def test_gradient_equals_the_oracles_slope():
    """Central differences of the float64 oracle along a random direction of the smooth weights.

    The router's weights are left out of the direction: a step there can change a choice, which has no slope.
    """
    weights, tokens, gradients = _two_depths()
    rng = np.random.default_rng(1)
    moved = {name: rng.normal(size=w.shape) * w.std() if name.endswith(("o_proj.weight", "down_proj",
             "shared_experts.gate_proj.weight", "lm_head.weight", "eh_proj.weight")) else np.zeros_like(w)
             for name, w in weights.items()}

    def slope(step):
        ends = [oracle.losses(TWO_DEPTHS, {n: w + sign * step * moved[n] for n, w in weights.items()}, tokens)
                for sign in (1, -1)]
        (up, up_mtp), (down, down_mtp) = ends
        return ((up - down) + 0.3 * (np.mean(up_mtp) - np.mean(down_mtp))) / (2 * step)
    direction = nnx.state(model_from_oracle(TWO_DEPTHS, moved), nnx.Param)
    _, grads = gradients(1, 0.3)
    along = sum(float(np.vdot(g, d)) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    assert along == pytest.approx(slope(1e-6), rel=1e-4)


def test_prediction_loss_reaches_every_weight_it_should():
    """Fails if the multi-token-prediction loss, or its gradient anywhere, is silently zero."""
    losses, grads = _two_depths()[2](0, 1)  # tokens enough for every expert to get one
    assert float(losses.mtp) > 1
    norms = {"/".join(map(str, path)): np.linalg.norm(v.get_value()) for path, v in nnx.to_flat_state(grads)}
    assert any(name.startswith("mtp/1/") for name in norms)
    silent = [name for name, norm in norms.items() if norm == 0]
    assert silent == ["norm/weight"]  # the main model's final norm is not on the way (mtp_hidden is pre_norm)


def test_cross_entropy_gradient_is_autodiffs():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 5, (3, 4, 11)), jnp.float32)
    targets = jnp.asarray(np.random.default_rng(1).integers(0, 11, (3, 4)))
    weights = jnp.arange(12.0).reshape(3, 4)
    plain = jax.grad(lambda x: jnp.sum(weights * -jnp.take_along_axis(
        jax.nn.log_softmax(x), targets[..., None], -1)[..., 0]))(logits)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(weights * cross_entropy(x, targets)))(logits), plain,
                               rtol=1e-5, atol=1e-5)


def test_chunked_head_changes_nothing(monkeypatch):
    model = model_from_oracle(TINY, oracle.random_weights(TINY, seed=7))
    hidden = np.random.default_rng(0).normal(size=(2, 12, 64)).astype(np.float32)
    targets = np.random.default_rng(1).integers(0, 320, (2, 12))

    def run(hidden):
        return jnp.sum(negative_log_likelihood(model.lm_head, hidden, targets) ** 2)
    whole = jax.jit(jax.value_and_grad(run))(hidden)
    monkeypatch.setattr("dsv3_jax.training.loss.LOGITS_AT_ONCE", 3 * 320)
    assert "while" in str(jax.make_jaxpr(run)(hidden)) or "scan" in str(jax.make_jaxpr(run)(hidden))
    parts = jax.jit(lambda x: jax.value_and_grad(run)(x))(hidden)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-6)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_optimizer_is_adamw_with_clipping(moments):
    """Against NumPy. bf16 moments carry 8 bits: 1% on a direction of size one."""
    config = OptimizerConfig(weight_decay=0.1, gradient_clip=0.5, moment_dtype=moments)
    rng = np.random.default_rng(0)
    w, gain = rng.normal(size=(3, 4)), rng.normal(size=(4,))
    params = nnx.State({"w": nnx.Param(jnp.asarray(w, jnp.float32), axes=("embed", "mlp")),
                        "gain": nnx.Param(jnp.asarray(gain, jnp.float32), axes=("embed",))})
    optimizer = make_optimizer(config)
    state = optimizer.init(params)
    first = {k: np.zeros_like(v) for k, v in (("w", w), ("gain", gain))}
    second = {k: np.zeros_like(v) for k, v in first.items()}
    for t in range(1, 6):
        grads = {k: rng.normal(size=v.shape) for k, v in first.items()}
        scale = min(1, 0.5 / np.sqrt(sum((g ** 2).sum() for g in grads.values())))
        updates, state = optimizer.update(jax.tree.map(
            lambda p, k: jnp.asarray(k, jnp.float32), params,
            nnx.State({k: params[k].replace(g) for k, g in grads.items()})), state, params)
        for k, g in grads.items():
            first[k] = 0.9 * first[k] + 0.1 * g * scale
            second[k] = 0.95 * second[k] + 0.05 * (g * scale) ** 2
            want = first[k] / (1 - 0.9 ** t) / (np.sqrt(second[k] / (1 - 0.95 ** t)) + 1e-8)
            want = want + 0.1 * w if k == "w" else want  # gains do not decay
            tolerance = 1e-5 if moments == "float32" else 2e-2
            np.testing.assert_allclose(updates[k][...], want, rtol=tolerance, atol=tolerance)
    kept = {str(x.dtype) for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert kept == {moments}


def test_bias_moves_against_the_load_error():
    _, _, state = nnx.split(model_from_oracle(TINY, oracle.random_weights(TINY, seed=0)), nnx.Param, ...)
    state = nnx.filter_state(state, lambda path, _: path[-1] == "e_score_correction_bias")
    load = np.random.default_rng(0).integers(0, 9, (3, 16)).astype(np.float32)
    moved = balanced_bias(state, jnp.asarray(load), jnp.float32(0.01), moe_layers=2)
    step = 0.01 * np.sign(load.mean(axis=1, keepdims=True) - load)
    for path, rows in ((("moe_layers",), step[:2]), (("mtp", 0), step[2])):
        old, new = ([v[...] for p, v in nnx.to_flat_state(s) if p[:len(path)] == path] for s in (state, moved))
        np.testing.assert_allclose(new[0] - old[0], rows, atol=1e-7)


@functools.cache
def _first_state(model):
    """As NumPy: to make it on another mesh takes another program, which test_loop.py compares."""
    config = dataclasses.replace(SMALL_RUN, model=model)
    return jax.tree.map(np.asarray, init_state(config, make_mesh(MeshConfig(data=1), jax.devices()[:1])))


@functools.cache
def _three_steps(**changes):
    """Losses of three steps and the state after them, as NumPy."""
    changes = {k: (MeshConfig(**dict(v)) if k == "mesh" else BatchConfig(**dict(v)) if k == "batch" else v)
               for k, v in changes.items()}
    config = dataclasses.replace(SMALL_RUN, **changes)
    mesh = config.mesh
    devices = jax.devices()[:mesh.data * mesh.expert_parallel if mesh.data else 8 if mesh.expert_parallel > 1 else 1]
    mesh = make_mesh(mesh, devices)
    step, batch = compile_train_step(config, mesh), config.batch
    state = jax.device_put(_first_state(config.model), state_shardings(config, mesh))
    columns = batch.sequence_length + 1 + config.model.num_nextn_predict_layers
    tokens = np.random.default_rng(0).integers(0, 320, (8, columns)).astype(np.int32)
    losses = []
    for _ in range(3):
        state, metrics = step(state, jax.device_put(
            tokens.reshape(batch.micro_batches, batch.micro_batch, -1), batch_sharding(mesh, leading=1)),
            jnp.int32(batch.micro_batches), StepSettings(*map(jnp.float32, (3e-3, 1e-3, 0.3))))
        losses.append([float(metrics.losses.main), float(metrics.losses.mtp), float(metrics.grad_norm)])
    return np.array(losses), {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


@pytest.mark.parametrize("changes", [
    {"mesh": (("scale_out", 2), ("scale_up", 4), ("capacity_factor", 1.0))},
    {"mesh": (("data", 2), ("scale_up", 2), ("context", 2), ("zero", "full")), "model": PREDICTING},
    # Sequences are shared in the layout above too.
    pytest.param({"mesh": (("context", 8),)}, marks=pytest.mark.slow),
    {"batch": (("sequences", 8), ("sequence_length", 16), ("micro_batches", 4))},
    {"mesh": (("data", 1), ("scale_out", 2), ("scale_up", 2), ("zero", "full"), ("dual", True)), "model": PREDICTING,
     "recompute": "full"},
    pytest.param({"mesh": (("scale_out", 2), ("data", 2), ("context", 2), ("dual", True)), "model": PREDICTING},
                 marks=pytest.mark.slow),
], ids=["expert parallel in rounds", "fully sharded, shared sequences", "one sequence over all devices",
        "four micro-batches", "two halves at once", "two halves at once, shared sequences"])
def test_layout_changes_no_step(changes):
    """Losses within float32 rounding; weights after three steps within Adam's amplification of it."""
    plain, plain_state = _three_steps(**{k: v for k, v in changes.items() if k == "model"})
    other, other_state = _three_steps(**changes)
    np.testing.assert_allclose(other, plain, rtol=2e-5)
    for name, value in plain_state.items():
        if name.startswith("params"):
            np.testing.assert_allclose(other_state[name], value, atol=2e-4, err_msg=name)


def test_bf16_stays_near_float32():
    """Same weights and data: three steps' losses within bf16's 3 digits."""
    plain, _ = _three_steps()
    rounded, state = _three_steps(precision="bf16")
    np.testing.assert_allclose(rounded[:, :2], plain[:, :2], rtol=5e-3)
    assert not np.array_equal(rounded, plain)
    assert {str(v.dtype) for k, v in state.items() if k.startswith("params")} == {"float32"}


@pytest.mark.slow
def test_recomputation_saves_memory():
    """The compiler's own count of temporary bytes, on a stack deep enough to matter."""
    model = dataclasses.replace(TINY, num_hidden_layers=9)
    run = dataclasses.replace(SMALL_RUN, model=model, batch=BatchConfig(sequences=16, sequence_length=64))
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    none, paper, full = (compile_train_step(dataclasses.replace(run, recompute=kind), mesh).memory_analysis()
                         .temp_size_in_bytes for kind in ("none", "paper", "full"))
    assert full < 0.8 * paper < 0.8 * none


def test_average_follows_the_weights():
    _, state = _three_steps()
    name = "lm_head/weight"
    key = [k for k in state if k.startswith("ema") and name in k]
    assert key, list(state)[:3]
    difference = np.abs(state[key[0]] - state[key[0].replace("ema", "params", 1)]).max()
    assert 0 < difference < 3 * 3e-3 * 1.5


def test_optimizer_state_and_weights_are_sharded(eight_devices):
    """ZeRO: each of 8 devices holds about an eighth of the float32 weights and of both moments."""
    config = dataclasses.replace(SMALL_RUN, mesh=MeshConfig(scale_out=2, scale_up=4))
    state = init_state(config, make_mesh(config.mesh))
    for part in (state.params, state.optimizer, state.ema):
        leaves = [x for x in jax.tree.leaves(part) if x.ndim]
        total = sum(x.nbytes for x in leaves)
        here = sum(x.addressable_shards[0].data.nbytes for x in leaves)
        assert here < 1.1 * total / 8
    assert optax.tree_utils.tree_get(state.optimizer, "mu") is not None
