"""The TPU float8 kernels, interpreted; memory that was not written is NaN, and races are looked for."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_matmul import tpu as product_kernel
from pallas_kernels.fp8_wgrad import fp8_wgrad
from pallas_kernels.fp8_wgrad import tpu as gradient_kernel
from pallas_kernels.grouped_fp8_matmul import grouped_fp8_matmul, grouped_fp8_wgrad
from tests.pallas_kernels.fp8_cases import LIMITS, dequantised, difference, grouped_case, quantise


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Tiles as small as there are, so that several make a result."""
    monkeypatch.setattr(product_kernel, "COLUMNS", 128)
    monkeypatch.setattr(product_kernel, "ROWS", 128)
    for name, size in (("ROWS", 128), ("COLUMNS", 128), ("TOKENS", 256)):
        monkeypatch.setattr(gradient_kernel, name, size)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


@pytest.mark.parametrize("float8", [False, True], ids=["bfloat16", "float8"])
@pytest.mark.parametrize(("rows", "columns", "terms", "dtype"), [
    (1, 192, 256, jnp.float32), (200, 128, 128, jnp.bfloat16)])
def test_product(monkeypatch, rows, columns, terms, dtype, float8):
    monkeypatch.setattr(product_kernel, "_multiplies_float8", lambda: float8)
    rng = np.random.default_rng(0)
    x, w = quantise(rng.normal(size=(rows, terms))), quantise(rng.normal(size=(columns, terms)), 128)
    got = fp8_matmul(*map(jnp.asarray, (*x, *w)), dtype=dtype, backend="tpu")
    assert got.dtype == dtype
    assert difference(got, dequantised(x) @ dequantised(w, 128).T) < LIMITS[dtype]


@pytest.mark.parametrize(("rows", "columns", "terms", "dtype", "accumulate"), [
    (192, 128, 512, jnp.float32, True), (64, 200, 200, jnp.bfloat16, False)])
def test_weight_gradient(rows, columns, terms, dtype, accumulate):
    rng = np.random.default_rng(1)
    x, y = quantise(rng.normal(size=(rows, terms))), quantise(rng.normal(size=(columns, terms)))
    before = 32 * rng.normal(size=(rows, columns)).astype(np.float32) if accumulate else None
    got = fp8_wgrad(*map(jnp.asarray, (*x, *y)), jnp.asarray(before) if accumulate else None, dtype=dtype,
                    backend="tpu")
    assert got.dtype == dtype
    assert difference(got, dequantised(x) @ dequantised(y).T + (before if accumulate else 0)) < LIMITS[dtype]


@pytest.mark.parametrize(("sizes", "total"), [([256, 0, 128], 512), ([0, 0], 128), ([0, 256], 256)], ids=str)
def test_groups(sizes, total):
    x, w, tokens, product, gradient = grouped_case(sizes, total, columns=192)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    got = grouped_fp8_matmul(*map(jnp.asarray, (*x, *w)), group_sizes, backend="tpu")
    assert difference(got, product) < LIMITS[jnp.bfloat16]
    got = grouped_fp8_wgrad(*map(jnp.asarray, (*tokens[0], *tokens[1])), group_sizes, backend="tpu")
    assert difference(got, gradient) < LIMITS[jnp.float32]
