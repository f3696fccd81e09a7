"""Training with products in float8: near bf16, on any mesh, and with less kept for the backward."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import BatchConfig, Execution, MeshConfig, ModelConfig
from dsv3_jax.mesh import batch_sharding, make_mesh
from dsv3_jax.nn.model import model_structure, split_model
from dsv3_jax.precision.recipe import compute_weights
from dsv3_jax.presets import RUNS
from dsv3_jax.training.schedule import StepSettings
from dsv3_jax.training.state import init_state
from dsv3_jax.training.step import compile_train_step

TINY = dataclasses.replace(RUNS["tiny"].model, num_hidden_layers=2)
"""A dense and an expert layer, and a prediction module."""
EXPERTS = dataclasses.replace(TINY, num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
"""A layer that has products of every kind."""
RUN = dataclasses.replace(RUNS["tiny"], model=TINY, batch=BatchConfig(sequences=8, sequence_length=128),
                          recompute="paper")


@functools.cache
def _three_steps(precision: str, mesh: MeshConfig = MeshConfig(data=1), model: ModelConfig = TINY) -> np.ndarray:
    """[3, 3]: loss, loss of prediction and norm of the gradient."""
    config = dataclasses.replace(RUN, precision=precision, mesh=mesh, model=model,
                                 recompute="none" if model == EXPERTS else RUN.recompute)  # a smaller program
    devices = make_mesh(mesh, jax.devices()[:1 if mesh.data == 1 else 8])
    step, state = compile_train_step(config, devices), init_state(config, devices)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (1, 8, 130)).astype(np.int32)
    tokens = tokens[..., :129 + model.num_nextn_predict_layers]
    told = []
    for _ in range(3):
        state, metrics = step(state, jax.device_put(tokens, batch_sharding(devices, leading=1)), jnp.int32(1),
                              StepSettings(*map(jnp.float32, (3e-3, 1e-3, 0.3))))
        told.append([float(metrics.losses.main), float(metrics.losses.mtp), float(metrics.grad_norm)])
    return np.array(told)


@pytest.mark.parametrize("model", [EXPERTS, pytest.param(TINY, marks=pytest.mark.slow)],
                         ids=["experts", "a layer of every kind"])
def test_near_bf16(model):
    """Losses to 3 digits: E4M3 has 3 fraction bits, and its errors average out over 1024 tokens. The norm of the
    gradient, mostly of one layer's, to 2."""
    bf16, fp8 = (_three_steps(precision, model=model) for precision in ("bf16", "fp8"))
    np.testing.assert_allclose(fp8[:, :2], bf16[:, :2], rtol=1e-3)
    np.testing.assert_allclose(fp8[:, 2], bf16[:, 2], rtol=3e-2)
    assert not np.array_equal(fp8, bf16)


@pytest.mark.slow
def test_a_mesh_changes_no_more_than_rounding():
    """Experts' rows come in another order, so that other rows share the scales of gradients."""
    mesh = MeshConfig(data=2, scale_out=1, scale_up=2, context=2, zero="full")
    one, eight = _three_steps("fp8"), _three_steps("fp8", mesh)
    np.testing.assert_allclose(eight[:, :2], one[:, :2], rtol=1e-3)
    np.testing.assert_allclose(eight[:, 2], one[:, 2], rtol=3e-2)


def _kept(precision: str) -> dict[str, int]:
    """Bytes that the backward keeps, by type."""
    structure = model_structure(RUN.model, precision)

    def residuals(params: nnx.State, router_bias: nnx.State) -> jax.tree_util.Partial:
        def loss(params: nnx.State) -> jax.Array:
            model = nnx.merge(structure, compute_weights(params, precision), router_bias)
            output = model(jnp.zeros((8, 129), jnp.int32), execution=Execution(recompute="paper"))
            return sum(jnp.sum(h.astype(jnp.float32)) for h in (output.hidden_BTD, *output.mtp_hidden))
        return jax.vjp(loss, params)[1]
    leaves = jax.tree.leaves(jax.eval_shape(residuals, *jax.eval_shape(lambda: split_model(RUN.model)[1:])))
    return {str(dtype): sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.dtype == dtype)
            for dtype in {leaf.dtype for leaf in leaves}}


def test_what_is_kept_is_float8():
    """By hand, of 1024 tokens: attention's output in 12 bits, 32 wide; SwiGLU's input, 256 wide in the dense layer, 64
    in shared and routed experts; and what routed experts are sent, 64 wide, as often as a token has experts."""
    rows = 1024 * TINY.num_experts_per_tok + 127 * TINY.n_routed_experts  # and room to fill up each expert's last tile
    rows = -(-rows // 128) * 128
    kept = _kept("fp8")
    assert kept["uint8"] == 3 * 1024 * 32 * 3 // 2
    assert kept["float8_e4m3fn"] == 1024 * (256 + 2 * 64) + 2 * rows * (64 + 64)
    assert "float8_e4m3fn" not in _kept("bf16")
