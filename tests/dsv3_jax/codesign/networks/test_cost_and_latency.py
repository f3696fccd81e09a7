"""Unit prices and latencies: what is fitted comes back, what is predicted is near, and nonsense is refused."""

from __future__ import annotations

import networkx
import numpy as np
import pytest

from dsv3_jax.codesign.networks import cost, dragonfly, fat_tree, latency, slim_fly
from dsv3_jax.codesign.networks.inventory import TABLE_3, Inventory
from dsv3_jax.config import ConfigError


def test_fitted_prices_give_back_what_they_were_fitted_to():
    prices = cost.fitted_prices()
    assert prices.of(TABLE_3["FT2"]) == pytest.approx(4390 * 2048)
    assert prices.of(TABLE_3["FT3"]) == pytest.approx(491e6)
    assert (prices.switch, prices.link) == (pytest.approx(82_428, abs=1), pytest.approx(526, abs=1))


@pytest.mark.parametrize(("name", "within"), [("SF", 0.005), ("DF", 0.02)])
def test_other_costs_are_predicted(name, within):
    """Percents off what is printed; what rounding of the two fitted figures leaves open is less than that for DF."""
    predicted = cost.fitted_prices().of(TABLE_3[name]) / 1e6
    assert predicted == pytest.approx(cost.PRINTED[name].millions, rel=within)
    low, high = cost.range_within_rounding(TABLE_3[name])
    assert low < predicted * 1e6 < high < 1.003 * low
    assert (low < (cost.PRINTED[name].millions + 0.5) * 1e6) == (name == "SF")


@pytest.mark.parametrize(("make", "words"), [
    (lambda: cost.Prices(-1, 2), "switch .-1. must be a finite number above 0"),
    (lambda: cost.Prices(1, -2), "link .-2."),
    (lambda: cost.Prices(float("nan"), 2), "switch"),
    (lambda: cost.fit((Inventory(1, 1, 2), 1), (Inventory(2, 2, 4), 2)), "cannot be told apart"),
    (lambda: cost.fit((Inventory(1, 1, 2), 1), (Inventory(2, 2, 3), 3)), "link"),
    (lambda: latency.LinkLayer(0, 1e-6), "ends"),
    (lambda: latency.LinkLayer(1e-6, -1e-9), "switch"),
    (lambda: latency.fit(3e-6, 2e-6), "cross_leaf"),
    (lambda: latency.INFINIBAND.message(-1), "switches"),
    (lambda: latency.forwarded(latency.ROCE, 1, hops=-1), "hops"),
])
def test_nonsense_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_latency_of_table_5():
    for layer, same, cross in ((latency.INFINIBAND, 2.8e-6, 3.7e-6), (latency.ROCE, 3.6e-6, 5.6e-6)):
        assert layer.message(1) == pytest.approx(same)
        assert layer.message(3) == pytest.approx(cross)
    assert latency.INFINIBAND.message(5) == pytest.approx(4.6e-6)
    assert latency.forwarded(latency.INFINIBAND, 3) == pytest.approx((3.7 + 3.33) * 1e-6)


@pytest.mark.parametrize("network", [
    fat_tree.two_layer(6), fat_tree.two_layer(6, 8), fat_tree.multi_plane(4, 5, planes=2), fat_tree.three_layer(4),
    slim_fly.slim_fly(4), dragonfly.dragonfly(1, 4, 1, 5), fat_tree.two_layer(4).without(switches=[0], endpoints=[7])],
    ids=lambda network: network.name)
def test_distances_are_those_of_the_graph(network):
    """Against networkx, pair by pair; nothing is sampled where there are few switches."""
    paths = dict(networkx.all_pairs_shortest_path_length(networkx.Graph(network.graph())))
    there = [e for e in range(network.endpoints) if network.switch_E[e] >= 0]
    counts = np.zeros(10)
    for a in there:
        for b in there:
            if a != b and ("endpoint", b) in paths["endpoint", a]:
                counts[paths["endpoint", a]["endpoint", b] - 1] += 1
    shares = latency.switch_distances(network)
    np.testing.assert_allclose(shares, (counts / (len(there) * (network.endpoints - 1)))[:len(shares)])
    assert counts[len(shares):].sum() == 0


def test_samples_of_distances_are_near():
    network = fat_tree.three_layer(10)
    sampled, all_of_them = (latency.switch_distances(network, sample) for sample in (10, 50))
    np.testing.assert_allclose(sampled, all_of_them)
