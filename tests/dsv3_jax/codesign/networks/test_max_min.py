"""Rates against closed forms, and against linear programs that know nothing of progressive filling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from dsv3_jax.codesign.networks.max_min import limiting_links, max_min_rates
from dsv3_jax.codesign.networks.simulate import complete
from dsv3_jax.config import ConfigError
from tests.dsv3_jax.codesign.networks.linear_programs import by_linear_programs


@st.composite
def shared_links(draw) -> tuple[np.ndarray, np.ndarray]:
    """Parts of 1 to 5 flows on 1 to 5 links, some halves and thirds, and the links' rates."""
    links, flows = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    parts = st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, 1 / 3, 2.0])
    matrix = np.array(draw(st.lists(st.lists(parts, min_size=flows, max_size=flows), min_size=links, max_size=links)))
    for flow in range(flows):
        if not matrix[:, flow].any():
            matrix[draw(st.integers(0, links - 1)), flow] = 1.0
    return matrix, np.array(draw(st.lists(st.sampled_from([1.0, 2.0, 3.0, 10.0]), min_size=links, max_size=links)))


@settings(max_examples=40, deadline=None)
@given(shared_links())
def test_rates_are_those_of_linear_programs(case):
    matrix, capacity = case
    rates = max_min_rates(sparse.csc_matrix(matrix), capacity)
    np.testing.assert_allclose(rates, by_linear_programs(matrix, capacity), rtol=1e-5)  # the programs' own tolerance


@settings(max_examples=100, deadline=None)
@given(shared_links())
def test_links_left_out_change_no_rate(case):
    matrix, capacity = sparse.csc_matrix(case[0]), case[1]
    needed = limiting_links(matrix, capacity)
    np.testing.assert_allclose(max_min_rates(matrix[needed], capacity[needed]), max_min_rates(matrix, capacity))


def test_cables_of_sprayed_packets_are_left_out():
    """Two NICs, there and here, over two cables in halves: only the NICs limit. A cable of half the rate does again."""
    matrix = sparse.csc_matrix([[1, 0], [0, 1], [1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]])
    assert limiting_links(matrix, np.array([2.0, 2, 2, 2, 2, 2])).tolist() == [True] * 4 + [False, False]
    assert limiting_links(matrix, np.array([2.0, 2, 2, 2, 2, 1])).tolist() == [True] * 4 + [False, True]


@pytest.mark.parametrize(("matrix", "capacity", "rates"), [
    ([[1, 1, 1, 1]], [8.0], [2, 2, 2, 2]),  # a hot link, shared alike
    ([[1, 1, 0], [0, 1, 1]], [2.0, 10.0], [1, 1, 9]),  # what the first link holds back is left on the second
    ([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], [2.0, 4.0, 10.0], [1, 1, 3, 7]),  # a chain of three
    ([[0.5, 1], [0.5, 0]], [3.0, 3.0], [2, 2]),  # half a flow counts half
    ([[1, 0], [0, 1]], [1.0, 5.0], [1, 5]),
])
def test_rates_by_hand(matrix, capacity, rates):
    np.testing.assert_allclose(max_min_rates(sparse.csc_matrix(np.array(matrix, float)), np.array(capacity)), rates)


def test_what_ended_flows_leave_is_shared_anew():
    """Flows of 1 and 3 on a link of 2: both at 1, then the second at 2; without new rates it stays at 1."""
    matrix, capacity, size = sparse.csc_matrix(np.ones((1, 2))), np.array([2.0]), np.array([1.0, 3.0])
    told = complete(matrix, capacity, size)
    np.testing.assert_allclose(told.seconds_F, [1, 2])
    assert (told.bound, told.rounds, told.seconds) == (2, 2, 2)
    np.testing.assert_allclose(complete(matrix, capacity, size, resolution=None).seconds_F, [1, 3])


def test_a_resolution_ends_neighbours_together():
    """Ten flows on one link, of sizes 1.0 to 1.9; in one round they end at their first rates, 10% late at most."""
    size = 1 + np.arange(10) / 10
    matrix, capacity = sparse.csc_matrix(np.ones((1, 10))), np.array([1.0])
    exact, coarse = (complete(matrix, capacity, size, resolution) for resolution in (0.0, 0.1))
    assert exact.rounds == 10
    assert exact.seconds == pytest.approx(exact.bound) == pytest.approx(size.sum())
    assert coarse.rounds < 10
    assert exact.seconds < coarse.seconds < exact.seconds * 1.1 ** coarse.rounds


@settings(max_examples=40, deadline=None)
@given(shared_links(), st.lists(st.sampled_from([1.0, 2.0, 5.0]), min_size=5, max_size=5))
def test_nothing_ends_before_its_links_could_carry_it(case, sizes):
    matrix, capacity = sparse.csc_matrix(case[0]), case[1]
    size = np.array(sizes[:matrix.shape[1]])
    told = complete(matrix, capacity, size)
    assert told.seconds >= told.bound * (1 - 1e-9)
    assert told.seconds <= complete(matrix, capacity, size, resolution=None).seconds * (1 + 1e-9) + told.seconds * 1e-6
    assert told.rounds <= len(size)


@pytest.mark.parametrize(("run", "words"), [
    (lambda: max_min_rates(sparse.csc_matrix(np.ones((1, 1))), np.array([-1.0])), "capacity_L"),
    (lambda: max_min_rates(sparse.csc_matrix([[1.0, 0.0]]), np.array([1.0])), "flow 1 is on no link"),
    (lambda: complete(sparse.csc_matrix([[1.0]]), np.array([1.0]), np.ones(1), -0.1), "resolution"),
])
def test_nonsense_is_refused(run, words):
    with pytest.raises(ConfigError, match=words):
        run()
