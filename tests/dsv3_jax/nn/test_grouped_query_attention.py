"""Attention whose heads share keys and values, and windows, in chunks and spread over devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import MeshConfig
from dsv3_jax.mesh import constrain_batch, make_mesh
from dsv3_jax.nn import attention, grouped_query_attention
from dsv3_jax.nn.block import make_attention
from dsv3_jax.nn.grouped_query_attention import grouped_attention
from dsv3_jax.presets import MODELS

TINY = dataclasses.replace(MODELS["tiny"], initializer_range=0.2)
GQA = dataclasses.replace(TINY, attention="gqa", num_attention_heads=4, num_key_value_heads=2, head_dim=8)
LENGTH = 16


@pytest.mark.parametrize("window", [None, 1, 3, 9, 40])
def test_chunks_with_what_they_reach_equal_the_whole_with_a_mask(window):
    """Against NumPy in float64, from the first query and from a later one; chunks slice only what a window reaches."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, LENGTH, heads, 8)) for heads in (4, 2, 2))
    scores = np.einsum("bqha,bkha->bhqk", query, np.repeat(key, 2, axis=2)) * 0.5
    ago = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    scores[..., (ago < 0) | (ago >= (window or LENGTH))] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    want = np.einsum("bhqk,bkha->bqha", weights / weights.sum(axis=-1, keepdims=True), np.repeat(value, 2, axis=2))
    query, key, value = (x.astype(np.float32) for x in (query, key, value))
    for start, chunk in ((0, 512), (0, 4), (8, 4), (5, 3)):
        got = grouped_attention(query[:, start:], key, value, 0.5, start, chunk, window)
        np.testing.assert_allclose(got, want[:, start:], rtol=0, atol=2e-6)


@pytest.mark.parametrize("config", [GQA, dataclasses.replace(GQA, attention_window=6),
                                    dataclasses.replace(TINY, attention_window=6)], ids=["gqa", "gqa window", "window"])
def test_shared_sequences_change_nothing(config, monkeypatch, eight_devices):
    """Outputs and gradients where devices share a sequence, in chunks: float32 sums in another order."""
    graphdef, weights = nnx.split(make_attention(config, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    hidden, cotangent = (rng.normal(size=(4, LENGTH, config.hidden_size)).astype(np.float32) for _ in range(2))

    def loss(weights, hidden):
        out = nnx.merge(graphdef, weights)(constrain_batch(hidden), jnp.arange(LENGTH))
        return jnp.sum(constrain_batch(out) * cotangent), out
    gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, want), want_grads = jax.jit(gradients)(weights, hidden)
    for module in (attention, grouped_query_attention):
        monkeypatch.setattr(module, "QUERY_CHUNK", 2)
    with jax.set_mesh(make_mesh(MeshConfig(scale_up=2, context=4))):
        (_, out), grads = jax.jit(lambda w, h: gradients(w, h))(weights, hidden)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
