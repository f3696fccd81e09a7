"""The TPU kernels of dispatch and combine, interpreted on 8 simulated devices, looking for races; memory that was never
written is NaN there."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import ici
from pallas_kernels.all_to_all_combine import tpu as combine_tpu
from pallas_kernels.all_to_all_dispatch import tpu as dispatch_tpu
from pallas_kernels.quantise import quantise
from tests.pallas_kernels.all_to_all_cases import (
    AXIS,
    cases,
    combined,
    dispatched,
    mesh,
    on_ranks,
    payload,
    program,
    traffic,
)

INTERPRETED = pltpu.InterpretParams(detect_races=True)
ROWS, COPIES, PLACES, WIDTH = 6, 3, 7, 256
CASES = cases(8, ROWS, COPIES, PLACES)
# Each takes seconds to interpret; what is uneven is masked too.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in ("even", "masked") else name for name in CASES]
RNG = np.random.default_rng(1)


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_dispatch(name, small_blocks):
    t, rows = CASES[name], payload(8, ROWS, WIDTH)

    def dispatch(route, rows):
        return dispatch_tpu.dispatch((rows,), route, AXIS, False, interpret=INTERPRETED)[0]
    got = on_ranks(mesh(4, 2), dispatch, t, jnp.asarray(rows, jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(got, np.float32), dispatched(rows, t))


@pytest.mark.parametrize("name", [pytest.param("masked", marks=pytest.mark.slow), "uneven, and none from rank 0"])
def test_dispatch_in_float8(name, small_blocks):
    t, x = CASES[name], jnp.asarray(RNG.normal(size=(8, ROWS, WIDTH)), jnp.bfloat16)
    x = x.at[1, 2, 3].set(jnp.nan).at[2, 1].set(0)
    pair = quantise(x, (1, 128), power_of_two=True)

    def cast(route, x):
        return dispatch_tpu.dispatch((x,), route, AXIS, True, interpret=INTERPRETED)

    def forward(route, *pair):
        return dispatch_tpu.dispatch(pair, route, AXIS, False, interpret=INTERPRETED)

    def in_halves(route, x):
        """As a start and a wait do, whose semaphores between kernels the interpreter does not know."""
        arrived = ici.exchange(*dispatch_tpu.pack((x,), route, AXIS, True, interpret=INTERPRETED), AXIS,
                               interpret=INTERPRETED)
        return dispatch_tpu.unpack(tuple(arrived), route, dispatch_tpu.blocks_for((x,), route, AXIS))
    for got in (on_ranks(mesh(8, 1), cast, t, x), on_ranks(mesh(8, 1), forward, t, *pair),
                on_ranks(mesh(8, 1), in_halves, t, x)):
        for got_part, part in zip(got, pair, strict=True):
            np.testing.assert_array_equal(np.asarray(got_part, np.float32), dispatched(np.asarray(part, np.float32), t))


@pytest.mark.parametrize("repeats", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_groups_beside_each_other_and_calls_after_each_other(repeats, small_blocks):
    """Two groups of four on one mesh. Rank 0 sends nothing and gets nothing, so nothing but what ranks tell each other
    keeps it from running ahead into the next call. All repeats are the same."""
    owners = np.stack([np.tile([1, 3], (ROWS, 1))] * 4)
    owners[0] = -1
    t, rows = traffic(owners, PLACES), payload(4, ROWS, WIDTH)

    def there_and_back(route, rows):
        slots, = dispatch_tpu.dispatch((rows,), route, AXIS, False, interpret=INTERPRETED)
        return combine_tpu.combine(slots, route, None, AXIS, jnp.float32, interpret=INTERPRETED)
    want = combined(dispatched(rows, t), t)
    assert not want[0].any()
    run = program(mesh(2, 2, 2), there_and_back, t)
    for _ in range(repeats):
        np.testing.assert_array_equal(run(rows), want)
