"""The whole MoE layer on meshes, by every transport: values and gradients against a dense layer in float64, and what
it tells of its routing against a count by hand."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import Execution, MeshConfig, ModelConfig
from dsv3_jax.expert_parallel.rounds import round_quota
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import constrain_batch, make_mesh
from dsv3_jax.nn.block import recomputed
from dsv3_jax.nn.moe import MixtureOfExperts, RouterStats
from dsv3_jax.presets import MODELS
from tests import oracle
from tests.dsv3_jax.expert_parallel.by_hand import rounds_by_hand, traffic_by_hand
from tests.dsv3_jax.expert_parallel.ragged_exchange import ragged_all_to_all

LAYER = dataclasses.replace(MODELS["tiny"], hidden_size=16, moe_intermediate_size=8, n_shared_experts=2,
                            num_experts_per_tok=3, initializer_range=0.3)
EXPERTS, TOP_K = LAYER.n_routed_experts, LAYER.num_experts_per_tok
SEQUENCES, LENGTH = 8, 16
CAPACITY = 2.1
"""Room for the even routing below, though on two meshes a sender has more for a device than its share of it, and for
less than half of what the skewed one sends to the busiest device."""
BALANCE = 10.0
"""Weight of the balance loss, for its gradient not to vanish beside the others."""
TOLERANCE = 2e-6
"""Of an array's largest value: sums of up to 128 tokens' terms, each rounded by 6e-8 of the sum so far; what goes one
way and another in them leaves 8e-7."""


@functools.cache
def _layer(groups: int, kept: int) -> tuple[ModelConfig, nnx.GraphDef, nnx.State, nnx.State]:
    """Its configuration, structure, weights and bias; the weights are the same with any node limit."""
    config = dataclasses.replace(LAYER, n_group=groups, topk_group=kept)
    return config, *nnx.split(MixtureOfExperts(config, nnx.Rngs(0)), nnx.Param, ...)


@functools.cache
def _tokens() -> tuple[np.ndarray, np.ndarray]:
    """Hidden states and a cotangent, float32 [B, T, D]."""
    return tuple(np.random.default_rng(0).normal(size=(2, SEQUENCES, LENGTH, LAYER.hidden_size)).astype(np.float32))


def _bias(routing: str) -> np.ndarray:
    """float32 [E]; "skewed": all tokens choose the two experts of one device of eight, where they can."""
    bias_E = np.random.default_rng(1).normal(0, 0.1, EXPERTS).astype(np.float32)
    bias_E[6:8] += routing == "skewed"
    return bias_E


@functools.cache
def _program(mesh: tuple[int, int, int], limit: tuple[int, int], execution: Execution):
    """Compiled: (weights, hidden, bias_E) -> gradients of the first two, (output, statistics)."""
    _, structure, weights, bias = _layer(*limit)
    hidden, cotangent = _tokens()

    def run(weights, hidden, bias_E):
        layer = nnx.merge(structure, weights, jax.tree.map(lambda _: bias_E, bias))
        return layer(constrain_batch(hidden), execution)

    def loss(weights, hidden, bias_E):
        out, stats = recomputed(run, execution.recompute)(weights, hidden, bias_E)
        return jnp.sum(out * cotangent) + BALANCE * stats.balance_loss, (out, stats)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, *mesh), jax.devices()[:math.prod(mesh)])):
        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(weights, hidden, _bias("even")).compile()


def _dense(weights: dict, hidden_BTD: jax.Array, chosen_BTE: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Every expert on every token, and the router's choice as a mask: the output and the balance loss."""
    routed, shared = weights["experts"], weights["shared_experts"]
    scores_BTE = jax.nn.sigmoid(hidden_BTD @ weights["gate"]["weight"])
    gates_BTE = chosen_BTE * scores_BTE
    gates_BTE *= LAYER.routed_scaling_factor / gates_BTE.sum(axis=-1, keepdims=True)
    gate, up = jnp.split(jnp.einsum("btd,edf->btef", hidden_BTD, routed["gate_up_proj"]), 2, axis=-1)
    out_BTD = jnp.einsum("bte,btef,efd->btd", gates_BTE, jax.nn.silu(gate) * up, routed["down_proj"])
    gate, up = (hidden_BTD @ shared[f"{part}_proj"]["weight"] for part in ("gate", "up"))
    out_BTD += (jax.nn.silu(gate) * up) @ shared["down_proj"]["weight"]
    count_BE = jnp.sum(scores_BTE >= jnp.sort(scores_BTE)[..., -TOP_K, None], axis=1)
    share_BE = (scores_BTE / scores_BTE.sum(axis=-1, keepdims=True)).mean(axis=1)
    return out_BTD, jnp.mean(jnp.sum(EXPERTS / (TOP_K * LENGTH) * count_BE * share_BE, axis=-1))


@functools.cache
def _expected(limit: tuple[int, int], routing: str):
    """The router's choices [B, T, K], and what `_program` returns, without rounds and traffic: all in float64. Values
    are the oracle's (tests/oracle.py), of which this is the derivative."""
    config, _, state, _ = _layer(*limit)
    weights = jax.tree.map(np.float64, nnx.to_pure_dict(state))
    hidden, cotangent = (x.astype(np.float64) for x in _tokens())
    published = {"mlp.gate.weight": weights["gate"]["weight"],
                 "mlp.gate.e_score_correction_bias": _bias(routing).astype(np.float64),
                 "mlp.experts.down_proj": weights["experts"]["down_proj"],
                 **{f"mlp.shared_experts.{name}.weight": w["weight"] for name, w in weights["shared_experts"].items()}}
    published["mlp.experts.gate_proj"], published["mlp.experts.up_proj"] = np.split(
        weights["experts"]["gate_up_proj"], 2, axis=-1)
    scores_BTE = oracle.router_scores(config, published, "mlp", hidden)
    experts_BTK = np.stack([oracle.route(config, scores_TE, published["mlp.gate.e_score_correction_bias"])[0]
                            for scores_TE in scores_BTE])
    chosen_BTE = (experts_BTK[..., None] == np.arange(EXPERTS)).any(axis=-2)

    def loss(weights, hidden):
        out, balance = _dense(weights, hidden, chosen_BTE)
        return jnp.sum(out * cotangent) + BALANCE * balance, (out, balance)
    with jax.enable_x64(True):
        grads, (out, balance) = jax.tree.map(np.asarray, jax.jit(jax.grad(loss, (0, 1), has_aux=True))(weights, hidden))
    np.testing.assert_allclose(out, [oracle.moe(config, published, "mlp", x) for x in hidden], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(balance, oracle.sequence_balance_loss(config, scores_BTE), rtol=1e-12)
    return experts_BTK, (grads, (out, balance))


def _assert_close(got, want) -> None:
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=TOLERANCE * np.abs(w).max(), err_msg=jax.tree_util.keystr(path))


def _of_each_device(experts_BTK: np.ndarray, mesh: tuple[int, int, int]) -> np.ndarray:
    """[M, T, K]: the tokens of each device, whole sequences of all but the context axis."""
    rows, context = mesh[0] * mesh[1], mesh[2]
    parts = experts_BTK.reshape(rows, SEQUENCES // rows, context, LENGTH // context, TOP_K)
    return np.moveaxis(parts, 2, 1).reshape(rows * context, -1, TOP_K)


def _assert_told(stats: RouterStats, experts_BTK: np.ndarray, mesh: tuple[int, int, int], config: ModelConfig) -> None:
    """Load, rounds and traffic, counted from the router's choice."""
    experts_MTK = _of_each_device(experts_BTK, mesh)
    topology = Topology(EXPERTS, mesh[0], mesh[1] * mesh[2])
    quota = round_quota(topology, experts_MTK.shape[1], TOP_K, min(TOP_K, config.topk_group)
                        if config.n_group > 1 else TOP_K, CAPACITY)
    round_MTK, rounds = rounds_by_hand(experts_MTK, topology, quota)
    assert stats.rounds == rounds
    assert stats.traffic == traffic_by_hand(experts_MTK, round_MTK, topology)
    np.testing.assert_array_equal(stats.load_E, np.bincount(experts_BTK.ravel(), minlength=EXPERTS))


PADDED, ALL = ("padded",), ("padded", "ragged", "pallas")


@pytest.mark.parametrize(("mesh", "limit", "recompute", "transports"), [
    ((1, 1, 1), (4, 2), "none", PADDED),
    ((2, 4, 1), (1, 1), "full", PADDED),
    ((2, 2, 2), (2, 1), "paper", PADDED),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ((1, 8, 1), (1, 1), "none", ALL), ((2, 4, 1), (1, 1), "full", ALL), ((4, 2, 1), (4, 2), "none", ALL),
        ((8, 1, 1), (8, 2), "none", ("padded", "ragged"))])  # no fast network, so no kernels
], ids=str)
def test_layer_equals_the_dense_one(mesh, limit, recompute, transports, monkeypatch):
    """scale_out, scale_up and context; groups and how many of them a token may use; transports agree bit for bit."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    config, _, weights, _ = _layer(*limit)
    padded, *others = (_program(mesh, limit, Execution(recompute, CAPACITY, transport)) for transport in transports)
    several = math.prod(mesh) > 1
    # One loop of rounds forward and one backward: recomputation does not run the forward's again.
    assert _loops_that_communicate(padded.as_text()) == 2 * several
    for routing in ("even", "skewed"):
        arguments = weights, _tokens()[0], _bias(routing)
        got = padded(*arguments)
        (d_weights, d_hidden), (out, stats) = jax.tree.map(np.asarray, got)
        experts_BTK, want = _expected(limit, routing)
        _assert_close(((nnx.to_pure_dict(d_weights), d_hidden), (out, stats.balance_loss)), want)
        _assert_told(stats, experts_BTK, mesh, config)
        assert (stats.rounds > 2) == (several and routing == "skewed")
        assert (stats.rounds == 1) == (not several or routing == "even")
        for other in others:
            jax.tree.map(np.testing.assert_array_equal, other(*arguments), got)


def _loops_that_communicate(text: str) -> int:
    """While loops of a compiled program whose body has an all-to-all."""
    bodies = re.findall(r" while\(.*body=%?([\w.\-]+)", text)
    computations = dict(re.findall(r"^%?([\w.\-]+) .*?\{$(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    return sum("all-to-all" in computations[body] for body in bodies)
