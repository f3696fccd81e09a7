"""The Hopper kernels of dispatch and combine on one rank, interpreted, looking for races.

The interpreter knows neither references to peers nor semaphores, so what makes them many ranks is only compiled
(test_all_to_all_compiled.py); here are the gather, the cast, the order of sending, the zeros and the sum.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import nvlink
from pallas_kernels.all_to_all_combine import gpu as combine_gpu
from pallas_kernels.all_to_all_dispatch import gpu as dispatch_gpu
from pallas_kernels.quantise import reference as casts
from tests.pallas_kernels.all_to_all_cases import AXIS, combined, dispatched, mesh, on_ranks, payload, traffic

RNG = np.random.default_rng(0)
ROWS, COPIES, PLACES, WIDTH = 9, 2, 24, 1024
TRAFFIC = traffic(np.where(RNG.random((1, ROWS, COPIES)) < 0.3, -1, 0), PLACES)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Two blocks, so that each takes several turns and the ring turns round."""
    monkeypatch.setattr(nvlink, "BLOCKS", 2)
    monkeypatch.setattr(nvlink, "RING_BYTES", 3 * 2 * WIDTH)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


def test_dispatch():
    rows = payload(1, ROWS, WIDTH)

    def dispatch(route, *parts):
        return dispatch_gpu.dispatch(parts, route, AXIS, False)
    got, = on_ranks(mesh(1, 1), dispatch, TRAFFIC, jnp.asarray(rows, jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(got, np.float32), dispatched(rows, TRAFFIC))
    for got, part in zip(on_ranks(mesh(1, 1), dispatch, TRAFFIC, *pair(rows)), pair(rows), strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), dispatched(np.asarray(part, np.float32), TRAFFIC))


def pair(x) -> tuple:
    return casts.quantise(jnp.asarray(x, jnp.bfloat16), (1, 128), True)


def test_dispatch_in_float8():
    x = RNG.normal(size=(1, ROWS, WIDTH))
    x[0, 2, 3], x[0, 4] = np.nan, 0
    got = on_ranks(mesh(1, 1), lambda route, x: dispatch_gpu.dispatch((x,), route, AXIS, True), TRAFFIC,
                   jnp.asarray(x, jnp.bfloat16))
    for part, want in zip(got, pair(x), strict=True):
        np.testing.assert_array_equal(np.asarray(part, np.float32), dispatched(np.asarray(want, np.float32), TRAFFIC))


def test_combine():
    slots = RNG.normal(size=(1, PLACES, WIDTH)) * 2.0 ** RNG.integers(-12, 12, size=(1, PLACES, 1))
    slots, weights = slots.astype(jnp.bfloat16), RNG.random((1, ROWS, COPIES), np.float32)
    got = on_ranks(mesh(1, 1), lambda route, s: combine_gpu.combine(s, route, None, AXIS, jnp.bfloat16), TRAFFIC, slots)
    np.testing.assert_array_equal(got, combined(slots, TRAFFIC).astype(jnp.bfloat16))
    got = on_ranks(mesh(1, 1), lambda route, s, w: combine_gpu.combine(s, route, w, AXIS, jnp.float32), TRAFFIC, slots,
                   weights)
    np.testing.assert_allclose(got, combined(slots, TRAFFIC, weights), rtol=2 ** -22, atol=2 ** -12)
