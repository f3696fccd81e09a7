"""The TPU kernels of dispatch and combine, interpreted on 8 simulated devices, looking for races; memory that was never
written is NaN there."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.all_to_all_combine import tpu as combine_tpu
from pallas_kernels.all_to_all_dispatch import tpu as dispatch_tpu
from pallas_kernels.quantise import quantise
from tests.pallas_kernels.all_to_all_cases import AXIS, cases, combined, dispatched, mesh, on_ranks, payload

INTERPRETED = pltpu.InterpretParams(detect_races=True)
ROWS, COPIES, PLACES, WIDTH = 6, 3, 7, 256
CASES = cases(8, ROWS, COPIES, PLACES)
RNG = np.random.default_rng(1)


@pytest.mark.parametrize("name", CASES)
def test_combine(name):
    t = CASES[name]
    slots = RNG.normal(size=(8, 8 * PLACES, WIDTH)) * 2.0 ** RNG.integers(-12, 12, size=(8, 8 * PLACES, 1))

    def combine(route, slots):
        return combine_tpu.combine(slots, route, None, AXIS, jnp.bfloat16, interpret=INTERPRETED)
    got = on_ranks(mesh(4, 2), combine, t, jnp.asarray(slots, jnp.bfloat16))
    np.testing.assert_array_equal(got, combined(np.asarray(slots, jnp.bfloat16), t).astype(jnp.bfloat16))


@pytest.fixture
def small_blocks(monkeypatch):
    """A destination has up to four blocks, and slots are used again."""
    monkeypatch.setattr(dispatch_tpu, "ROWS", 2)
    monkeypatch.setattr(dispatch_tpu, "SLOTS", 2)


@pytest.mark.parametrize("name", CASES)
def test_dispatch(name, small_blocks):
    t, rows = CASES[name], payload(8, ROWS, WIDTH)

    def dispatch(route, rows):
        return dispatch_tpu.dispatch((rows,), route, AXIS, False, interpret=INTERPRETED)[0]
    got = on_ranks(mesh(4, 2), dispatch, t, jnp.asarray(rows, jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(got, np.float32), dispatched(rows, t))


@pytest.mark.parametrize("name", ["masked", "uneven, and none from rank 0"])
def test_dispatch_in_float8(name, small_blocks):
    t, x = CASES[name], jnp.asarray(RNG.normal(size=(8, ROWS, WIDTH)), jnp.bfloat16)
    x = x.at[1, 2, 3].set(jnp.nan).at[2, 1].set(0)
    pair = quantise(x, (1, 128), power_of_two=True)

    def cast(route, x):
        return dispatch_tpu.dispatch((x,), route, AXIS, True, interpret=INTERPRETED)

    def forward(route, *pair):
        return dispatch_tpu.dispatch(pair, route, AXIS, False, interpret=INTERPRETED)
    for got in (on_ranks(mesh(8, 1), cast, t, x), on_ranks(mesh(8, 1), forward, t, *pair)):
        for got_part, part in zip(got, pair, strict=True):
            np.testing.assert_array_equal(np.asarray(got_part, np.float32), dispatched(np.asarray(part, np.float32), t))
