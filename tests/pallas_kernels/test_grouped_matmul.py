"""Every backend of the grouped product against a NumPy loop over groups."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul, megablox

GROUPS = {"uneven": [8, 0, 24, 16], "all in one": [0, 0, 64, 0], "full": [16, 16, 16, 16], "none": [0, 0, 0, 0]}


@pytest.mark.parametrize("backend", ["reference", "tiled", "ragged_dot"])
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_gradients(backend, sizes, dtype):
    """Tolerance: one rounding to the result's type on sums of 24 to 64 terms of order one."""
    rng = np.random.default_rng(0)
    rows, weights, cotangent = (jnp.asarray(rng.normal(size=shape), dtype)
                                for shape in ((64, 24), (4, 24, 40), (64, 40)))
    group_sizes = jnp.asarray(sizes, jnp.int32)

    def run(rows, weights):
        return grouped_matmul(rows, weights, group_sizes, alignment=8, backend=backend)
    out, pull = jax.vjp(run, rows, weights)
    d_rows, d_weights = pull(cotangent)
    x, w, g = (np.asarray(a, np.float64) for a in (rows, weights, cotangent))
    expected, dx, dw = np.zeros((64, 40)), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(sizes):
        part = slice(start, start + size)
        expected[part], dx[part], dw[e] = x[part] @ w[e], g[part] @ w[e].T, x[part].T @ g[part]
        start += size
    relative = 1e-5 if dtype == jnp.float32 else 2 ** -8
    for got, want in ((out, expected), (d_rows, dx), (d_weights, dw)):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=relative, atol=20 * relative)


@pytest.mark.parametrize("sizes", [[128, 0, 64, 20], [0, 0, 256, 0], [0, 0, 0, 0]], ids=str)
def test_megablox_interpreted(sizes):
    """Unused rows hold NaN: the kernels must not touch them, and what they leave there must be zero."""
    rng = np.random.default_rng(0)
    used = np.arange(256)[:, None] < sum(sizes)
    x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in ((256, 128), (4, 128, 256), (256, 256)))
    rows, weights, cotangent = (jnp.asarray(a) for a in (np.where(used, x, np.nan), w, np.where(used, g, np.nan)))
    group_sizes = jnp.asarray(sizes, jnp.int32)
    out = megablox.product(rows, weights, group_sizes, interpret=True)
    d_rows = megablox.product(cotangent, weights, group_sizes, transpose_rhs=True, interpret=True)
    d_weights = megablox.weight_gradient(rows, cotangent, group_sizes, interpret=True)
    expected, dx, dw = np.zeros((256, 256)), np.zeros((256, 128)), np.zeros((4, 128, 256))
    for e, end in enumerate(np.cumsum(sizes)):
        part = slice(end - sizes[e], end)
        expected[part], dx[part], dw[e] = x[part] @ w[e], g[part] @ w[e].T, x[part].T @ g[part]
    for got, want in ((out, expected), (d_rows, dx), (d_weights, dw)):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_unaligned_groups_take_a_backend_that_serves_them():
    rows, weights = jnp.ones((10, 4)), jnp.arange(3, dtype=jnp.float32)[:, None, None] * jnp.ones((3, 4, 2))
    out = grouped_matmul(rows, weights, jnp.asarray([3, 0, 5]))
    np.testing.assert_array_equal(out[:, 0], [0] * 3 + [8] * 5 + [0] * 2)
