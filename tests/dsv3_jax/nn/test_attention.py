"""Attention whose sequences are spread over devices, against the same module on one device."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import MeshConfig
from dsv3_jax.mesh import constrain_batch, make_mesh
from dsv3_jax.nn import attention
from dsv3_jax.nn.attention import MultiHeadLatentAttention
from dsv3_jax.presets import MODELS

TINY = MODELS["tiny"]
BATCH, LENGTH = 4, 32


@functools.cache
def _arguments():
    """The module's structure and weights, hidden states and a cotangent."""
    graphdef, weights = nnx.split(MultiHeadLatentAttention(TINY, nnx.Rngs(0)))
    # Weights of size one over sqrt(fan-in): the scores must tell positions apart.
    weights = jax.tree.map(lambda w: w if w.ndim == 1 else w / (w.std() * w.shape[0] ** 0.5), weights)
    rng = np.random.default_rng(0)
    hidden, cotangent = (rng.normal(size=(BATCH, LENGTH, TINY.hidden_size)).astype(np.float32) for _ in range(2))
    return graphdef, weights, hidden, cotangent


def _loss(weights, hidden):
    graphdef, _, _, cotangent = _arguments()
    out = nnx.merge(graphdef, weights)(constrain_batch(hidden), jnp.arange(LENGTH))
    return jnp.sum(constrain_batch(out) * cotangent), out


GRADIENTS = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize("chunk", [512, 4], ids=["whole", "two chunks a device"])
def test_shared_sequences_change_nothing(chunk, monkeypatch, eight_devices):
    """Float32 sums of the same terms in another order. Nothing but the latent is gathered along the sequence."""
    _, weights, hidden, _ = _arguments()
    (_, expected), expected_grads = jax.jit(GRADIENTS(_loss))(weights, hidden)
    monkeypatch.setattr(attention, "QUERY_CHUNK", chunk)
    with jax.set_mesh(make_mesh(MeshConfig(scale_up=2, context=4))):
        program = jax.jit(GRADIENTS(_loss)).lower(weights, hidden).compile()
        (_, out), grads = program(weights, hidden)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    rows = BATCH // 2
    gathered = set(re.findall(rf"= f32\[({rows},{LENGTH},[\d,]+)\]\S* all-gather", program.as_text()))
    assert gathered == {f"{rows},{LENGTH},{width}" for width in (TINY.kv_lora_rank, TINY.qk_rope_head_dim)}


def test_alone_with_its_sequences_a_device_runs_the_plain_program(eight_devices):
    _, weights, hidden, _ = _arguments()
    for mesh, shared in ((MeshConfig(scale_up=8), False), (MeshConfig(scale_up=4, context=2), True)):
        with jax.set_mesh(make_mesh(mesh)):
            assert ("shard_map" in str(jax.make_jaxpr(_loss)(weights, hidden))) == shared
