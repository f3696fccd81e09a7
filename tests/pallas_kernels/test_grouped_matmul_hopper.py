"""The Hopper kernels: interpreted here; on such a GPU for real, with `pytest --noconftest -o addopts=` on this file.

The interpreter simulates every warpgroup, copy and barrier on CPU and looks for races. It runs a `wgmma` at once, so
only a GPU shows that no slot is freed while the tensor cores still read it. The interpreter's memory starts as NaN, and
rows past the last group are NaN everywhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.grouped_matmul import grouped_matmul

CASES = {
    # tiles of every group, tiles in all, alignment, width, inner
    "uneven, an empty group, a tail": ([2, 0, 1, 1], 6, 128, 128, 256),
    "all rows in one group": ([0, 0, 3], 3, 128, 128, 128),
    "no rows": ([0, 0], 1, 128, 128, 128),
    "more steps than slots": ([1, 1], 3, 128, 640, 384),
    "tiles of 64 rows": ([3, 0, 2], 6, 64, 256, 128),
    "groups of two tiles": ([2, 1], 4, 256, 128, 128),
    "more columns than a patch": ([1], 1, 128, 128, 9 * 128),
}


@pytest.fixture
def runnable(monkeypatch):
    """Three multiprocessors, so that each walks over several tiles and some over none."""
    monkeypatch.setattr(hopper, "MULTIPROCESSORS", 3)
    if getattr(jax.devices()[0], "compute_capability", "").startswith("9."):
        yield
        return
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


# Each case takes seconds to interpret; these three have what the others have one at a time.
FAST = "uneven, an empty group, a tail", "more steps than slots", "tiles of 64 rows"


@pytest.mark.parametrize(("tiles", "total", "alignment", "width", "inner"), [
    pytest.param(*case, id=name, marks=[] if name in FAST else pytest.mark.slow) for name, case in CASES.items()])
def test_product_and_gradients(runnable, tiles, total, alignment, width, inner):
    """Tolerance: half a unit in bfloat16's last place is 2^-8 of the value; the float32 sums add 1e-4 at most."""
    sizes, rows = alignment * np.asarray(tiles), alignment * total
    rng = np.random.default_rng(0)
    x, w, dy = (np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float64)
                for shape in ((rows, width), (len(tiles), width, inner), (rows, inner)))
    x[sizes.sum():] = dy[sizes.sum():] = np.nan
    y, dx, dw = np.zeros((rows, inner)), np.zeros((rows, width)), np.zeros_like(w)
    for e, end in enumerate(np.cumsum(sizes)):
        part = slice(end - sizes[e], end)
        y[part], dx[part], dw[e] = x[part] @ w[e], dy[part] @ w[e].T, x[part].T @ dy[part]

    def run(x, w):
        return grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), alignment=alignment, backend="hopper")
    out, pull = jax.vjp(run, *(jnp.asarray(a, jnp.bfloat16) for a in (x, w)))
    for got, want in zip((out, *pull(jnp.asarray(dy, jnp.bfloat16))), (y, dx, dw), strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2 ** -8, atol=1e-4)


@pytest.mark.parametrize(("rows", "width", "inner", "alignment", "dtype"), [
    (256, 128, 128, 128, jnp.float32), (256, 128, 128, 32, jnp.bfloat16), (256, 192, 128, 128, jnp.bfloat16),
    (256, 128, 64, 128, jnp.bfloat16), (192, 128, 128, 128, jnp.bfloat16)])
def test_refuses_what_it_does_not_serve(rows, width, inner, alignment, dtype):
    with pytest.raises(ValueError, match="no Hopper kernel"):
        grouped_matmul(jnp.ones((rows, width), dtype), jnp.ones((2, width, inner), dtype),
                       jnp.zeros(2, jnp.int32), alignment=alignment, backend="hopper")
