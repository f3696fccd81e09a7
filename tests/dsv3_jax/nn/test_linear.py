"""Gradients of weights in bf16: sums over tokens are in float32, and rounded once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import MeshConfig
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.linear import Embedding, Linear

ROUNDING = 2 ** -8
"""Half a unit in bf16's last place, as part of the value, at most."""


def gradient(module: nnx.Module, x: jax.Array, grads: jax.Array) -> np.ndarray:
    """Of the weight, which is bf16."""
    graphdef, state = nnx.split(module)
    weights = jax.tree.map(lambda w: w.astype(jnp.bfloat16), state)
    pull = jax.jit(lambda w, x, g: jax.vjp(lambda w: nnx.merge(graphdef, w)(x), w)[1](g)[0])
    (found,) = jax.tree.leaves(pull(weights, x, grads))
    assert found.dtype == jnp.bfloat16
    return np.asarray(found, np.float64)


@pytest.mark.parametrize("devices", [1, 8])
def test_gradient_of_a_frequent_token(devices):
    """Sums in bf16 would miss nine tenths of it on one device."""
    tokens = np.zeros((16, 512), np.int32)
    tokens[:, ::4] = np.random.default_rng(0).integers(1, 7, (16, 128))
    grads = jnp.asarray(np.random.default_rng(1).normal(1, 0.1, (16, 512, 4)), jnp.bfloat16)
    expected = np.zeros((8, 4))
    np.add.at(expected, tokens, np.asarray(grads, np.float64))
    table = Embedding(8, 4, 1.0, nnx.Rngs(0))
    with jax.set_mesh(make_mesh(MeshConfig(scale_out=2, scale_up=devices // 2) if devices > 1 else MeshConfig(data=1),
                                jax.devices()[:devices])):
        found = gradient(table, jnp.asarray(tokens), grads)
    # On several devices each part is rounded, and the sum.
    np.testing.assert_allclose(found, expected, rtol=ROUNDING * (1 if devices == 1 else 2))
    assert not found[7].any()


def test_gradient_of_a_product():
    rng = np.random.default_rng(0)
    x, grads = (jnp.asarray(rng.normal(0.5, 1, (4, 128, width)), jnp.bfloat16) for width in (64, 48))
    expected = np.einsum("btm,btn->mn", np.asarray(x, np.float64), np.asarray(grads, np.float64))
    found = gradient(Linear(64, 48, ("embed", "mlp"), 0.02, nnx.Rngs(0)), x, grads)
    # Next to zero the float32 sums of 512 products show.
    np.testing.assert_allclose(found, expected, rtol=ROUNDING, atol=1e-3)
