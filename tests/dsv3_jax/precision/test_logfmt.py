"""Numbers in LogFMT as a pytree. What they are, the tests of `pallas_kernels.logfmt` say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.precision.logfmt import LogFMT


@pytest.mark.parametrize(("bits", "dtype", "bytes_per_tile"), [(8, jnp.bfloat16, 132), (10, jnp.bfloat16, 164),
                                                               (10, jnp.float32, 168)])
def test_keeps_numbers_in_so_many_bytes(bits, dtype, bytes_per_tile):
    """Half a step of the logarithm, whose range is of 32 octaves at most, is the largest error."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 300)), dtype)
    held = jax.jit(LogFMT.of, static_argnums=1)(x, bits)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(held)) == 5 * 3 * bytes_per_tile
    rows = jax.tree.map(lambda leaf: leaf[jnp.array([3, 1])], held)
    back = rows.dequantise()
    assert (back.shape, back.dtype) == ((2, 300), dtype)
    step = 2.0 ** (32 / (2 ** (bits - 1) - 2)) - 1
    np.testing.assert_allclose(rows.dequantise(jnp.float32), x[jnp.array([3, 1])].astype(jnp.float32), rtol=step / 2)


def test_no_gradient_passes():
    x = jnp.linspace(-1, 1, 128)
    gradient = jax.grad(lambda x: jnp.sum(x * LogFMT.of(x, 8).dequantise()))(x)
    np.testing.assert_array_equal(gradient, LogFMT.of(x, 8).dequantise())
