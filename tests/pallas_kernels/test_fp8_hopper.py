"""The Hopper float8 kernels: interpreted here; on such a GPU for real, with `pytest --noconftest -o addopts=`.

The interpreter simulates every warpgroup, copy and barrier on CPU and looks for races. It runs a `wgmma` at once and
adds in float32, so only a GPU shows that no slot is freed while the tensor cores still read it, and what their
accumulator of about 14 bits loses. The interpreter's memory starts as NaN, and rows past the last group are NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, tuning
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_wgrad import fp8_wgrad
from pallas_kernels.grouped_fp8_matmul import grouped_fp8_matmul, grouped_fp8_wgrad
from tests.pallas_kernels import fp8_cases
from tests.pallas_kernels.fp8_cases import dequantised, difference, grouped_case, quantise

ON_HOPPER = getattr(jax.devices()[0], "compute_capability", "").startswith("9.")
LIMITS = {**fp8_cases.LIMITS, jnp.float32: 1e-6} if ON_HOPPER else fp8_cases.LIMITS
"""The tensor cores' 14 bits: 2^-13 of 128 terms' largest partial sum, squared and halved, with room for four."""


@pytest.fixture(autouse=True)
def runnable(monkeypatch):
    """Two multiprocessors, so that each walks over several tiles or over none."""
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 2)
    if ON_HOPPER:
        yield
        return
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def take(monkeypatch, tile: tuple[int, int], slots: int) -> None:
    monkeypatch.setattr(tuning, "CANDIDATES", {"product": (tile,), "gradient": (tile,)})
    monkeypatch.setattr(tuning, "slots", lambda *_: slots)


@pytest.mark.parametrize(("rows", "columns", "terms", "tile", "slots", "dtype"), [
    (1, 192, 384, (128, 192), 2, jnp.float32),  # more steps than slots; a tile of one and a half blocks
    (136, 320, 256, (128, 192), 4, jnp.bfloat16),  # partial tiles, one of which starts inside a block
    (72, 192, 128, (64, 128), 8, jnp.float32),  # one step
    (8, 64, 256, (64, 256), 2, jnp.bfloat16),  # a consumer beyond the last column
    (64, 64, 256, (64, 64), 2, jnp.bfloat16),
    (128, 64, 256, (128, 64), 2, jnp.float32)])
def test_product(monkeypatch, rows, columns, terms, tile, slots, dtype):
    take(monkeypatch, tile, slots)
    rng = np.random.default_rng(0)
    x, w = quantise(rng.normal(size=(rows, terms))), quantise(rng.normal(size=(columns, terms)), 128)
    got = fp8_matmul(*map(jnp.asarray, (*x, *w)), dtype=dtype, backend="hopper")
    assert got.dtype == dtype
    assert difference(got, dequantised(x) @ dequantised(w, 128).T) < LIMITS[dtype]


@pytest.mark.parametrize(("rows", "columns", "terms", "tile", "slots", "dtype", "accumulate"), [
    (64, 128, 384, (64, 128), 2, jnp.float32, True),  # more steps than slots
    (192, 128, 136, (128, 64), 4, jnp.float32, True),  # a partial tile, so the sum is added outside; ragged tokens
    (128, 64, 128, (128, 128), 2, jnp.bfloat16, False),
    (64, 256, 256, (64, 256), 2, jnp.bfloat16, True)])
def test_weight_gradient(monkeypatch, rows, columns, terms, tile, slots, dtype, accumulate):
    take(monkeypatch, tile, slots)
    rng = np.random.default_rng(1)
    x, y = quantise(rng.normal(size=(rows, terms))), quantise(rng.normal(size=(columns, terms)))
    before = 32 * rng.normal(size=(rows, columns)).astype(np.float32) if accumulate else None
    got = fp8_wgrad(*map(jnp.asarray, (*x, *y)), jnp.asarray(before) if accumulate else None, dtype=dtype,
                    backend="hopper")
    assert got.dtype == dtype
    assert difference(got, dequantised(x) @ dequantised(y).T + (before if accumulate else 0)) < LIMITS[dtype]


@pytest.mark.parametrize(("sizes", "total"), [([256, 0, 128], 512), ([0, 0], 128), ([0, 256], 256)], ids=str)
def test_groups(monkeypatch, sizes, total):
    take(monkeypatch, (128, 64), 2)
    x, w, tokens, product, gradient = grouped_case(sizes, total, columns=192)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    got = grouped_fp8_matmul(*map(jnp.asarray, (*x, *w)), group_sizes, backend="hopper")
    assert difference(got, product) < LIMITS[jnp.bfloat16]
    got = grouped_fp8_wgrad(*map(jnp.asarray, (*tokens[0], *tokens[1])), group_sizes, backend="hopper")
    assert difference(got, gradient) < LIMITS[jnp.float32]
