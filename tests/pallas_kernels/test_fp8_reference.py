"""The float8 products in plain JAX against NumPy float64, and what they accept."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_wgrad import fp8_wgrad
from pallas_kernels.grouped_fp8_matmul import grouped_fp8_matmul, grouped_fp8_wgrad
from tests.pallas_kernels.fp8_cases import LIMITS, dequantised, difference, grouped_case, quantise


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("rows", "columns", "terms", "magnitude"), [
    (1, 576, 512, 1.), (128, 128, 256, 1e-28), (128, 576, 256, 1e-3), (77, 200, 300, 1e3)])
def test_product(rows, columns, terms, magnitude, dtype):
    """Quantisation alone makes 7e-4 of the difference to the product of what was quantised."""
    rng = np.random.default_rng(0)
    x, w = magnitude * rng.normal(size=(rows, terms)), rng.normal(size=(columns, terms))
    qx, qw = quantise(x), quantise(w, 128)
    got = fp8_matmul(*map(jnp.asarray, (*qx, *qw)), dtype=dtype)
    assert got.dtype == dtype
    assert difference(got, dequantised(qx) @ dequantised(qw, 128).T) < LIMITS[dtype]
    assert difference(got, x @ w.T) < 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("rows", "columns", "terms", "magnitude"), [
    (576, 128, 512, 1e-28), (128, 64, 300, 1e3)])
def test_weight_gradient(rows, columns, terms, magnitude, dtype):
    rng = np.random.default_rng(1)
    x, y = magnitude * rng.normal(size=(rows, terms)), rng.normal(size=(columns, terms))
    qx, qy = quantise(x), quantise(y)
    before = 32 * magnitude * rng.normal(size=(rows, columns)).astype(np.float32)
    for added in (None, before):
        got = fp8_wgrad(*map(jnp.asarray, (*qx, *qy)), None if added is None else jnp.asarray(added), dtype=dtype)
        assert got.dtype == dtype
        plus = 0. if added is None else added
        assert difference(got, dequantised(qx) @ dequantised(qy).T + plus) < LIMITS[dtype]
        assert difference(got, x @ y.T + plus) < 1e-3


@pytest.mark.parametrize("sizes", [[256, 0, 128], [0, 0, 384], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_groups(sizes, dtype):
    x, w, tokens, product, gradient = grouped_case(sizes, 512, columns=200)
    groups = jnp.asarray(sizes, jnp.int32)
    got = grouped_fp8_matmul(*map(jnp.asarray, (*x, *w)), groups, dtype=dtype)
    assert got.dtype == dtype
    assert difference(got, product) < LIMITS[dtype]
    got = grouped_fp8_wgrad(*map(jnp.asarray, (*tokens[0], *tokens[1])), groups, dtype=dtype)
    assert got.dtype == dtype
    assert difference(got, gradient) < LIMITS[dtype]


def test_says_what_it_does_not_take():
    fp8, scale = jnp.zeros((128, 128), jnp.float8_e4m3fn), jnp.ones((1, 1))
    with pytest.raises(ValueError, match="float8_e4m3fn operands"):
        fp8_matmul(fp8.astype(jnp.bfloat16), jnp.ones((128, 1)), fp8, scale)
    with pytest.raises(ValueError, match=r"no hopper kernel.*K divisible by 128"):
        fp8_matmul(fp8[:, :64], jnp.ones((128, 1)), fp8[:, :64], scale, backend="hopper")
    with pytest.raises(ValueError, match="A and B divisible by 64"):
        fp8_wgrad(fp8[:100], jnp.ones((100, 1)), fp8, jnp.ones((128, 1)), backend="hopper")
    with pytest.raises(ValueError, match=r"no tpu kernel.*alignment divisible by 128"):
        grouped_fp8_matmul(fp8, jnp.ones((128, 1)), fp8[None], scale[None], jnp.zeros(1, int), alignment=64,
                           backend="tpu")
    with pytest.raises(ValueError, match=r"rows \(100\) must be divisible by the groups' alignment \(128\)"):
        grouped_fp8_matmul(fp8[:100], jnp.ones((100, 1)), fp8[None], scale[None], jnp.zeros(1, int))


def test_says_once_why_the_slow_way(caplog):
    x, w = jnp.zeros((3, 200), jnp.float8_e4m3fn), jnp.zeros((5, 200), jnp.float8_e4m3fn)
    with caplog.at_level("DEBUG", logger="pallas_kernels.targets"):
        for _ in range(2):
            fp8_matmul(x, jnp.ones((3, 2)), w, jnp.ones((1, 2)))
    assert [record.getMessage().split(": the ")[1][:6] for record in caplog.records] == ["hopper", "tpu ke"]
