"""Experts in slots are the same experts: weights, answers, counts, and the way to another placement."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.expert_parallel.replicas import Deployment, Placement, place
from dsv3_jax.inference.cache import LatentCache
from dsv3_jax.inference.expert_slots import LayerMover, deployment_on, expert_layers
from dsv3_jax.inference.forward import decode, prefill, prefill_ahead
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.model import split_model
from dsv3_jax.presets import MODELS

MODEL = dataclasses.replace(MODELS["tiny"], num_hidden_layers=3, first_k_dense_replace=1)
LAYERS = expert_layers(MODEL)
ROWS, TOKENS = 8, 12


@functools.cache
def weights():
    _, params, bias = split_model(MODEL, 0)
    return params, bias


@functools.cache
def mesh_of(scale_out, scale_up):
    return make_mesh(MeshConfig(data=1, scale_out=scale_out, scale_up=scale_up), jax.devices()[:scale_out * scale_up])


def drawn(mesh, redundant, by_group=False, seed=0):
    """For loads drawn at random, so that layers differ."""
    load_LE = np.random.default_rng(seed).lognormal(size=(LAYERS, MODEL.n_routed_experts))
    return place(load_LE, deployment_on(MODEL, mesh, redundant, by_group))


def lengths():
    return np.array([12, 5, 0, 9, 1, 12, 3, 7], np.int32)


def prompts():
    return np.random.default_rng(1).integers(0, MODEL.vocab_size, (ROWS, TOKENS)).astype(np.int32)


def answers(mesh, placement, tokens=None, counts=None, **options):
    """Hidden states after a prompt and after a step, and the counters."""
    tokens, counts = prompts() if tokens is None else tokens, lengths() if counts is None else counts
    on_mesh = ModelOnMesh(MODEL, mesh, precision="float32", placement=placement, **options)
    prepared = on_mesh.prepare(*weights())

    @jax.jit
    def run(prepared, tokens, counts, sent):
        model = nnx.merge(on_mesh.structure, prepared)
        cache = dataclasses.replace(LatentCache.empty(MODEL, ROWS, TOKENS + 1, "float32"), sent_HLS=sent)
        out = prefill(model, tokens, counts, cache, on_mesh.execution)
        cache = prefill_ahead(model, out.mtp_input_BQD, tokens, out.cache, on_mesh.execution)
        step = decode(model, tokens[:, :1], cache, (counts > 0).astype(jnp.int32), on_mesh.execution)
        return out.hidden_BQD, step.hidden_BQD, step.cache.sent_HLS
    sent = None if placement is None else np.zeros((mesh.size, *placement.expert_LS.shape), np.int32)
    with jax.set_mesh(mesh):
        read, step, sent = run(prepared, on_mesh.place(tokens), on_mesh.place(counts), sent)
    real = np.arange(TOKENS) < counts[:, None]
    return np.asarray(read)[real], np.asarray(step)[counts > 0], sent


@pytest.mark.parametrize("options", [{}, {"spread": True}], ids=str)
def test_without_redundant_slots_it_is_the_plain_model(options, eight_devices):
    """Bit for bit: expert e is in slot e, and goes the way it would without slots."""
    mesh = mesh_of(2, 2)
    identity = Placement.in_order(LAYERS, deployment_on(MODEL, mesh))
    plain, slots = answers(mesh, None, **options), answers(mesh, identity, **options)
    for a, b in zip(plain[:2], slots[:2], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("shape", "redundant", "by_group"), [((1, 2), 4, False), ((2, 2), 8, True),
                                                             ((2, 4), 16, False)], ids=str)
def test_replicas_answer_as_their_experts(shape, redundant, by_group, eight_devices):
    """But for the order of float32 sums on the way home: a few roundings of 2^-24 in each of three layers."""
    mesh = mesh_of(*shape)
    plain, slots = answers(mesh_of(1, 1), None), answers(mesh, drawn(mesh, redundant, by_group))
    for a, b in zip(plain[:2], slots[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_an_answer_does_not_depend_on_its_row(eight_devices):
    """Bit for bit, though other rows have other replicas: tokens choose theirs by position and id alone."""
    mesh = mesh_of(2, 2)
    placement = drawn(mesh, 8)
    here = answers(mesh, placement)
    order = np.random.default_rng(2).permutation(ROWS)
    there = answers(mesh, placement, prompts()[order], lengths()[order])
    starts = np.cumsum(lengths()) - lengths()
    rows = [here[0][start:start + count] for start, count in zip(starts, lengths(), strict=True)]
    np.testing.assert_array_equal(np.concatenate([rows[row] for row in order]), there[0])


def test_counters_hold_the_real_tokens_of_every_layer(eight_devices):
    """Padding and rows without tokens count nowhere; the main model has the step too."""
    mesh = mesh_of(2, 2)
    placement = drawn(mesh, 8)
    *_, sent_HLS = answers(mesh, placement)
    per_layer_L = np.asarray(sent_HLS).sum(axis=(0, 2))
    read, stepped, top_k = lengths().sum(), np.sum(lengths() > 0), MODEL.num_experts_per_tok
    np.testing.assert_array_equal(per_layer_L, top_k * np.array([read + stepped] * 2 + [read]))
    home_H = np.asarray(sent_HLS).sum(axis=(1, 2))
    tokens_H = lengths().reshape(4, -1).sum(axis=1)
    stepped_H = (lengths() > 0).reshape(4, -1).sum(axis=1)
    np.testing.assert_array_equal(home_H, top_k * (3 * tokens_H + 2 * stepped_H))
    # The same experts as without replicas, in whatever slots.
    *_, plain_HLS = answers(mesh, Placement.in_order(LAYERS, deployment_on(MODEL, mesh)))
    for sent_S, expert_S, plain_E in zip(np.asarray(sent_HLS).sum(axis=0), placement.expert_LS,
                                         np.asarray(plain_HLS).sum(axis=0), strict=True):
        np.testing.assert_array_equal(np.bincount(expert_S, sent_S, MODEL.n_routed_experts), plain_E)


@pytest.mark.parametrize("options", [{"precision": "float32"}, {"precision": "fp8"},
                                     {"precision": "bf16", "spread": True}], ids=str)
def test_moved_layer_by_layer_weights_are_those_of_the_new_placement(options, eight_devices):
    """Every array, and laid out alike, so that programs which take the one take the other."""
    mesh = mesh_of(2, 2)
    old, new = drawn(mesh, 8, seed=3), drawn(mesh, 8, seed=4)
    before, after = (ModelOnMesh(MODEL, mesh, placement=placement, **options) for placement in (old, new))
    moved, want = before.prepare(*weights()), after.prepare(*weights())
    mover = LayerMover(MODEL, mesh, moved)
    for layer in range(LAYERS):
        moved = mover.move(moved, layer, old, new)
    flat, want_flat = (dict(nnx.to_flat_state(state)) for state in (moved, want))
    assert flat.keys() == want_flat.keys()
    for path in flat:
        for a, b in zip(jax.tree.leaves(flat[path]), jax.tree.leaves(want_flat[path]), strict=True):
            np.testing.assert_array_equal(np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)))
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), path
    assert any(old.expert_LS[layer].tolist() != new.expert_LS[layer].tolist() for layer in range(LAYERS))


def test_bytes_of_an_expert():
    mesh = mesh_of(2, 2)
    placement = drawn(mesh, 8)
    mover = LayerMover(MODEL, mesh, ModelOnMesh(MODEL, mesh, precision="float32", placement=placement)
                       .prepare(*weights()))
    assert mover.expert_bytes == 3 * 4 * MODEL.hidden_size * MODEL.moe_intermediate_size


@pytest.mark.parametrize(("change", "says"), [
    ({"experts": 24, "slots": 24}, r"deployment.experts \(24\) must be model.n_routed_experts \(16\)"),
    ({"devices": 2}, r"deployment.devices \(2\) must be the mesh's scale_out\*scale_up\*context \(4\)"),
    ({"nodes": 1}, r"deployment.nodes \(1\) must be mesh.scale_out \(2\)"),
    ({"groups": 2}, r"deployment.groups \(2\) must be model.n_group \(4\)"),
    ({"layers": 1}, rf"shape \(1, 16\): give \[MoE layers and prediction modules \({LAYERS}\), slots \(16\)\]"),
], ids=str)
def test_another_models_placement_is_refused(change, says, eight_devices):
    sizes = {"experts": 16, "slots": 16, "devices": 4, "nodes": 2} | change
    placement = Placement.in_order(sizes.pop("layers", LAYERS), Deployment(**sizes))
    with pytest.raises(ConfigError, match=says):
        ModelOnMesh(MODEL, mesh_of(2, 2), placement=placement)


def test_slots_that_devices_cannot_share_are_refused(eight_devices):
    with pytest.raises(ConfigError, match=r"slots \(19\) must be divisible by devices \(4\): take 20 slots"):
        deployment_on(MODEL, mesh_of(2, 2), redundant=3)
