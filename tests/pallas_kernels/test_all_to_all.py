"""What dispatch and combine mean, by the backend of this platform, and that each is the other's gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.all_to_all_combine import all_to_all_combine
from pallas_kernels.all_to_all_dispatch import all_to_all_dispatch
from pallas_kernels.quantise import quantise
from tests.pallas_kernels.all_to_all_cases import AXIS, cases, combined, dispatched, mesh, on_ranks, payload, program

ROWS, COPIES, PLACES, WIDTH = 6, 3, 8, 160
CASES = cases(8, ROWS, COPIES, PLACES)
RNG = np.random.default_rng(1)
WEIGHTS = RNG.random((8, ROWS, COPIES), np.float32)


def plain(route, rows):
    return all_to_all_dispatch(rows, route, AXIS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(8, 1), (4, 2)])
def test_every_row_arrives_where_it_should_and_nowhere_else(name, shape):
    t, rows = CASES[name], payload(8, ROWS, WIDTH)
    got = on_ranks(mesh(*shape), plain, t, jnp.asarray(rows, jnp.bfloat16))
    np.testing.assert_array_equal(got.astype(np.float32), dispatched(rows, t))


@pytest.mark.parametrize("name", CASES)
def test_float8_on_the_wire_is_float8_before_it(name):
    t, x = CASES[name], jnp.asarray(RNG.normal(size=(8, ROWS, WIDTH)), jnp.bfloat16)
    pair = quantise(x, (1, 128), power_of_two=True)
    cast = on_ranks(mesh(8, 1), lambda route, x: all_to_all_dispatch(x, route, AXIS, wire="float8"), t, x)
    sent = on_ranks(mesh(8, 1), lambda route, *pair: all_to_all_dispatch(pair, route, AXIS), t, *pair)
    for cast_part, sent_part, part in zip(cast, sent, pair, strict=True):
        want = dispatched(np.asarray(part, np.float32), t)
        np.testing.assert_array_equal(np.asarray(cast_part, np.float32), want)
        np.testing.assert_array_equal(np.asarray(sent_part, np.float32), want)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_copies_come_home_and_are_added_in_order(name, dtype):
    """Magnitudes differ so much that another order gives another sum. Empty slots have NaN."""
    t = CASES[name]
    slots = RNG.normal(size=(8, 8 * PLACES, WIDTH)) * 2.0 ** RNG.integers(-12, 12, size=(8, 8 * PLACES, 1))
    used = dispatched(np.ones((8, ROWS, 1), np.float32), t) > 0
    slots = np.where(used, slots, np.nan).astype(jnp.bfloat16)
    got = on_ranks(mesh(4, 2), lambda route, s: all_to_all_combine(s, route, AXIS, dtype), t, slots)
    np.testing.assert_array_equal(got, combined(slots, t).astype(dtype))
    got = on_ranks(mesh(4, 2), lambda route, s, w: all_to_all_combine(s, route, AXIS, dtype, weights_RK=w), t, slots,
                   WEIGHTS)
    want = combined(slots, t, WEIGHTS).astype(dtype).astype(np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, rtol=2 ** -22 if dtype == jnp.float32 else 2 ** -7,
                               atol=2 ** -10)


@pytest.mark.parametrize("name", ["masked", "uneven, and none from rank 0"])
def test_each_is_the_others_gradient(name):
    t = CASES[name]
    slots, grads = (RNG.normal(size=(8, n, WIDTH)).astype(np.float32) for n in (8 * PLACES, ROWS))

    def of_dispatch(route, grads_SD):
        return jax.vjp(lambda x: plain(route, x), jnp.zeros((ROWS, WIDTH)))[1](grads_SD)[0]

    def of_combine(route, slots_SD, weights, grads_RD):
        unweighted = jax.vjp(lambda s: all_to_all_combine(s, route, AXIS), slots_SD)[1](grads_RD)[0]
        weighted = jax.vjp(lambda s, w: all_to_all_combine(s, route, AXIS, weights_RK=w), slots_SD, weights)[1]
        return unweighted, *weighted(grads_RD)
    np.testing.assert_array_equal(on_ranks(mesh(8, 1), of_dispatch, t, slots), combined(slots, t))
    unweighted, d_slots, d_weights = on_ranks(mesh(8, 1), of_combine, t, slots, WEIGHTS, grads)
    np.testing.assert_array_equal(unweighted, dispatched(grads, t))
    want_weights = np.zeros_like(WEIGHTS)
    for home, row, k in np.ndindex(WEIGHTS.shape):
        slot = t.slot_NRK[home, row, k]
        if slot >= 0:
            owner, place = divmod(slot, PLACES)
            at = owner, home * PLACES + place
            want_weights[home, row, k] = slots[at] @ grads[home, row]
            np.testing.assert_array_equal(d_slots[at], grads[home, row] * WEIGHTS[home, row, k])
    np.testing.assert_allclose(d_weights, want_weights, rtol=1e-5, atol=1e-5)


def test_twenty_repeats_are_the_same():
    t, rows = CASES["masked"], payload(8, ROWS, WIDTH)

    def there_and_back(route, rows):
        return all_to_all_combine(plain(route, rows * 0.1), route, AXIS)
    run = program(mesh(8, 1), there_and_back, t)
    first = run(rows)
    for _ in range(20):
        np.testing.assert_array_equal(run(rows), first)


@pytest.mark.parametrize(("call", "match"), [
    (lambda route, x: all_to_all_dispatch(x[:5], route, AXIS), "does not fit"),
    (lambda route, x: all_to_all_dispatch(x.astype(jnp.int8), route, AXIS, wire="float8"), "casts bfloat16 or float32"),
    (lambda route, x: all_to_all_dispatch((x, x), route, AXIS), "scales"),
    (lambda route, x: all_to_all_combine(x, route, AXIS), "do not fit the route"),
    (lambda route, x: jax.grad(lambda x: jnp.sum(all_to_all_dispatch(x, route, AXIS, wire="float8")[1]))(x),
     "has no gradient")])
def test_says_what_is_wrong(call, match):
    with pytest.raises((ValueError, TypeError), match=match):
        on_ranks(mesh(8, 1), call, CASES["even"], jnp.zeros((8, ROWS, WIDTH)))
