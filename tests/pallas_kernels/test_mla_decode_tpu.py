"""The TPU kernel, interpreted; memory that was not written is NaN, and races are looked for."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_decode import tpu
from tests.pallas_kernels.mla_decode_cases import Case, attend, check, draw

CASES = {
    # Rows of no, one and several blocks; blocks of one page and of several; one core's rows all empty.
    "ragged, empty, whole pages, one more": Case((0, 70, 0, 65, 64, 0), heads=3, queries=2, page=32),
    "an odd number of rows": Case((33, 0, 1), heads=1, queries=4, page=16, kind="float32", latent=256),
    "a core without work": Case((0, 0, 129, 5), page=64),
    "nothing to do": Case((0, 0), page=64),
    "a page is more than a block": Case((130, 3), page=128),
    "128 heads": Case((20,), heads=128, page=16),
    "float8": Case((70, 33), heads=4, kind="float8", page=32, latent=256, queries=2),
    "int8": Case((5, 64), heads=4, kind="int8", page=32),
    "first queries before, inside and after": Case((40, 40, 7), queries=3, page=16, first=(-1, 12, 9)),
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Blocks so small that rows have several."""
    monkeypatch.setattr(tpu, "BLOCK", 64)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_is_that_of_float64(case):
    drawn = draw(case)
    check(case, drawn, attend(case, drawn, "tpu"), drawn.exact)


def test_the_order_of_copies():
    """Of two cores with three rows each, in blocks of 64: 70 entries are two."""
    seen_BQ = jnp.asarray([[0], [70], [3], [5], [0], [0]])
    order = tpu._order(jnp.zeros((6, 3)), seen_BQ, page=32, block=64, cores=2)
    assert np.asarray(order[2:]).tolist() == [[0, 3, 1, 1, 0, 0], [0, 0, 2, 0, 1, 1], [1, 2, -1, -1, -1, -1]]
