"""The model against the float64 oracle written from the equations."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import Execution, MeshConfig, RopeScaling
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.router import choose_experts
from dsv3_jax.presets import MODELS
from tests import oracle
from tests.weights import model_from_oracle

TINY = MODELS["tiny"]
SHORT = dataclasses.replace(TINY, num_hidden_layers=2)
"""A dense layer, one with experts and a prediction module: a layer of every kind."""
V2_STYLE = {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 4.0}
VARIANTS = {
    "v3": {},
    "yarn": {"rope_scaling": RopeScaling(factor=8.0, original_max_position_embeddings=16)},
    "no query compression": {"q_lora_rank": None},
    "two prediction depths": {"num_nextn_predict_layers": 2},
    "post-norm prediction": {"mtp_hidden": "post_norm"},
    "no prediction, all experts": {"num_nextn_predict_layers": 0, "first_k_dense_replace": 0},
    "three shared experts, one group": {"n_shared_experts": 3, "n_group": 1, "topk_group": 1},
    "no shared expert, eight groups": {"n_shared_experts": 0, "n_group": 8, "topk_group": 3},
    "gqa": {"attention": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12},
    "mqa, yarn, window": {"attention": "mqa", "head_dim": 16, "attention_window": 4,
                          "rope_scaling": RopeScaling(factor=8.0, original_max_position_embeddings=16)},
    "window": {"attention_window": 5},
    "v2 greedy": {**V2_STYLE, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "n_shared_experts": 2},
    "v2 groups": {**V2_STYLE, "topk_method": "group_limited_greedy", "masked_group_score": "0"},
}


def _tokens(config, batch=2, length=12, seed=0):
    return np.random.default_rng(seed).integers(
        0, config.vocab_size, (batch, length + config.num_nextn_predict_layers))


def _logits(model, tokens):
    output = model(tokens)
    return [model.logits(hidden) for hidden in (output.hidden_BTD, *output.mtp_hidden)]


# What these change is changed together with something else in the others, or in the models of test_hugging_face.py.
SLOW = "yarn", "no query compression", "three shared experts, one group", "gqa", "window", "v2 greedy"


@pytest.mark.parametrize("changes", [pytest.param(changes, id=name, marks=pytest.mark.slow if name in SLOW else [])
                                     for name, changes in VARIANTS.items()])
def test_logits_equal_the_oracle(changes):
    """Float32 rounding through 4 layers stays under 1e-5 of the largest logit."""
    config = dataclasses.replace(TINY, **changes)
    weights, tokens = oracle.random_weights(config, seed=1), _tokens(config)
    expected, expected_mtp = oracle.forward(config, weights, tokens)
    actual = jax.jit(_logits)(model_from_oracle(config, weights), tokens)
    assert len(actual) == 1 + config.num_nextn_predict_layers
    for got, want in zip(actual, [expected, *expected_mtp], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


# On the other meshes the layer alone, with its gradients, is compared in test_moe.py.
@pytest.mark.parametrize("sizes", [(2, 4, 1), pytest.param((4, 2, 1), marks=pytest.mark.slow),
                                   pytest.param((1, 8, 1), marks=pytest.mark.slow), (2, 1, 2)], ids=str)
def test_expert_parallel_logits_equal_the_oracle(sizes, eight_devices):
    """scale_out, scale_up and context; the rest is data."""
    weights, tokens = oracle.random_weights(SHORT, seed=2), _tokens(SHORT, batch=8)
    expected, expected_mtp = oracle.forward(SHORT, weights, tokens)
    model = model_from_oracle(SHORT, weights)
    with jax.set_mesh(make_mesh(MeshConfig(1, None, *sizes))):
        actual = jax.jit(_logits)(model, tokens)
    for got, want in zip(actual, [expected, *expected_mtp], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_recomputation_changes_no_gradient():
    """Of a stack of layers and of a prediction module."""
    config = dataclasses.replace(SHORT, num_hidden_layers=1, first_k_dense_replace=0)
    tokens = _tokens(config)
    graphdef, params, rest = nnx.split(model_from_oracle(config, oracle.random_weights(config, seed=3)), nnx.Param, ...)

    def loss(params, recompute):
        model = nnx.merge(graphdef, params, rest)
        output = model(tokens, execution=Execution(recompute))
        return sum(jax.nn.logsumexp(model.logits(h)).mean() for h in (output.hidden_BTD, *output.mtp_hidden))
    plain, *others = jax.jit(lambda p: [jax.grad(loss)(p, kind) for kind in ("none", "paper", "full")])(params)
    for again in others:
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max() + 1e-9)


ROUTERS = [(8, 4, 256, 8), (8, 8, 256, 8), (1, 1, 64, 6), (1, 1, 72, 6), (1, 1, 144, 6), (8, 3, 160, 6),
           (1, 1, 384, 8), (4, 2, 16, 4)]


@pytest.mark.parametrize(("groups", "kept", "experts", "top_k"), ROUTERS)
@pytest.mark.parametrize("mask", ["-inf", "0"])
@pytest.mark.parametrize("bias_scale", [0.05, 3.0])
def test_router_chooses_the_oracles_experts(groups, kept, experts, top_k, mask, bias_scale):
    """Scores are exact in float32 and float64 alike, so every choice must be equal, ties included."""
    config = dataclasses.replace(TINY, n_routed_experts=experts, num_experts_per_tok=top_k, n_group=groups,
                                 topk_group=kept, masked_group_score=mask)
    rng = np.random.default_rng(experts + groups)
    scores = rng.integers(0, 2 ** 10, (64, experts)) / 2 ** 10  # coarse: many exact ties
    bias = np.round(rng.normal(0, bias_scale, experts) * 2 ** 8) / 2 ** 8
    routing = choose_experts(config, scores.astype(np.float32), bias.astype(np.float32))
    order = np.argsort(routing.experts_K, axis=-1)
    indices, weights = oracle.route(config, scores, bias)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(routing.experts_K), order, -1), indices)
    np.testing.assert_allclose(np.take_along_axis(np.asarray(routing.weights_K), order, -1), weights, rtol=1e-6)


def test_equal_scores_choose_the_lowest_indices():
    config = dataclasses.replace(TINY, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2)
    routing = choose_experts(config, np.full((3, 16), 0.5, np.float32), np.zeros(16, np.float32))
    np.testing.assert_array_equal(routing.experts_K, [[0, 1, 2, 3]] * 3)
