"""Graphs against formulas, against networkx's own counts, and against what makes each topology what it is."""

from __future__ import annotations

import builtins
import itertools

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.codesign.networks import dragonfly, fat_tree, inventory, slim_fly
from dsv3_jax.codesign.networks.finite_field import Field, prime_power
from dsv3_jax.codesign.networks.graph import Network
from dsv3_jax.codesign.networks.inventory import TABLE_3, Inventory, counted
from dsv3_jax.config import ConfigError

SMALL = {
    "FT2": (fat_tree.two_layer(8), inventory.two_layer(8)),
    "MPFT": (fat_tree.multi_plane(6, 18, planes=3), inventory.multi_plane(6, 3)),
    "MRFT": (fat_tree.multi_rail(8, 8, rails=4), inventory.two_layer(8)),
    "FT3": (fat_tree.three_layer(6), inventory.three_layer(6)),
    "SF": (slim_fly.slim_fly(5), inventory.slim_fly(5)),
    "DF": (dragonfly.dragonfly(2, 4, 2, 9), inventory.dragonfly(2, 4, 2, 9)),
}


def switch_graph(network: Network) -> networkx.MultiGraph:
    graph = network.graph()
    return graph.subgraph([vertex for vertex in graph if vertex[0] == "switch"])


@pytest.mark.parametrize("name", SMALL)
def test_graph_has_what_the_formula_says(name):
    network, expected = SMALL[name]
    graph, switches = network.graph(), switch_graph(network)
    assert counted(network) == expected
    assert Inventory(sum(kind == "endpoint" for kind, _ in graph), switches.number_of_nodes(),
                     switches.number_of_edges()) == expected
    assert graph.number_of_edges() == expected.links + expected.endpoints
    assert max(degree for _, degree in switches.degree()) <= network.ports


@pytest.mark.parametrize(("name", "network"), [
    ("FT2", fat_tree.two_layer(64)), ("MPFT", fat_tree.multi_plane(64, 2048)), ("FT2", fat_tree.multi_rail(64, 256)),
    ("FT3", fat_tree.three_layer(64)), ("DF", dragonfly.dragonfly(16, 32, 16, 511))])
def test_table_3_is_the_graphs(name, network):
    assert counted(network) == TABLE_3[name]


def test_table_3_as_printed():
    """Paper 1, table 3."""
    assert list(TABLE_3.values()) == [
        Inventory(2_048, 96, 2_048), Inventory(16_384, 768, 16_384), Inventory(65_536, 5_120, 131_072),
        Inventory(32_928, 1_568, 32_928), Inventory(261_632, 16_352, 384_272)]


def test_deployed_size_needs_the_switches_of_one_tree():
    """2,048 GPUs: 96 switches as eight planes as well as in one tree."""
    assert counted(fat_tree.multi_plane(64, 256)) == counted(fat_tree.multi_rail(64, 256)) == TABLE_3["FT2"]


@pytest.mark.parametrize("name", SMALL)
def test_distances(name):
    network, _ = SMALL[name]
    switches = switch_graph(network)
    parts = [networkx.diameter(networkx.Graph(switches.subgraph(part)))
             for part in networkx.connected_components(switches)]
    assert parts == {"FT2": [2], "MPFT": [2] * 3, "MRFT": [2], "FT3": [4], "SF": [2], "DF": [3]}[name]


@pytest.mark.parametrize("name", ["FT2", "MPFT", "MRFT", "FT3"])
def test_fat_trees_have_full_bisection(name):
    """Every leaf has a cable up for each endpoint, and any two leaves can send each other all they have."""
    network, _ = SMALL[name]
    graph = networkx.Graph()
    for a, b in network.cables_C2.tolist():
        graph.add_edge(a, b, capacity=graph.get_edge_data(a, b, {"capacity": 0})["capacity"] + 1)
    below = np.bincount(network.switch_E)
    plane = {leaf: frozenset(networkx.node_connected_component(graph, leaf)) for leaf in np.flatnonzero(below).tolist()}
    for a, b in itertools.combinations(sorted(plane)[:6], 2):
        if plane[a] == plane[b]:
            assert networkx.maximum_flow_value(graph, a, b) == below[a] == below[b]


def test_rails_meet_on_leaves():
    """Two pods of 4 nodes with 4 rails: NIC i of a pod's nodes is on one leaf, with no other NIC."""
    network = fat_tree.multi_rail(8, 8, rails=4)
    assert network.switch_E.reshape(2, 4, 4).tolist() == [[[4 * pod + rail for rail in range(4)]] * 4 for pod in (0, 1)]


@pytest.mark.parametrize("endpoints", [1, 3, 4, 5, 11, 17, 24, 29, 32])
def test_partial_trees_fit_their_ports(endpoints):
    """`Network` refuses more cables than ports; spines are no more than the cables up need."""
    network = fat_tree.two_layer(8, endpoints)
    leaves = -(-endpoints // 4)
    assert network.switches == leaves + (-(-leaves // 2) if leaves > 1 else 0)
    assert network.links == (4 * leaves if leaves > 1 else 0)
    assert networkx.is_connected(switch_graph(network))


@pytest.mark.parametrize("q", [4, 5, 7, 8, 9, 13, 16])
def test_slim_fly_is_regular_and_of_diameter_two(q):
    """For prime powers of each kind, 4w - 1, 4w and 4w + 1."""
    network = slim_fly.slim_fly(q, endpoints_per_switch=1)
    graph = networkx.Graph(switch_graph(network))
    assert graph.number_of_edges() == network.links == inventory.slim_fly(q).links  # no two cables for one pair
    assert {degree for _, degree in graph.degree()} == {slim_fly.network_ports(q)}
    assert networkx.diameter(graph) == 2


def test_the_papers_slim_fly_cannot_be_built():
    """28 = 4*7, but no power of a prime; its neighbours can be, and stand on both sides."""
    with pytest.raises(ConfigError, match=r"q \(28\) must be a power of a prime"):
        slim_fly.slim_fly(28)
    assert slim_fly.valid_q(25, 32) == [25, 27, 29, 31, 32]
    sizes = [counted(slim_fly.slim_fly(q)) for q in (27, 29)]
    assert sizes[0].switches < TABLE_3["SF"].switches < sizes[1].switches
    for size in sizes:
        per_endpoint = size.links / size.endpoints
        assert per_endpoint == pytest.approx(TABLE_3["SF"].links / TABLE_3["SF"].endpoints, rel=0.03)


@pytest.mark.parametrize("q", [2, 3, 4, 8, 9, 11, 25, 27])
def test_fields(q):
    """A generator's powers are all elements but 0; products distribute over sums; every element has a negative."""
    field = Field(q)
    assert sorted(field.power_N) == list(range(1, q))
    a, b, c = (grid.ravel() for grid in np.indices((q, q, q)))
    left, right = field.multiply(a, field.add(b, c)), field.add(field.multiply(a, b), field.multiply(a, c))
    np.testing.assert_array_equal(left, right)
    a, b = a.reshape(q, q, q)[:, :, 0], b.reshape(q, q, q)[:, :, 0]
    assert (np.sort(field.add(a, b), axis=1) == np.arange(q)).all()
    assert (np.sort(field.multiply(a, b)[1:], axis=1) == np.arange(q)).all()


@pytest.mark.parametrize(("number", "power"), [(1, None), (2, (2, 1)), (6, None), (27, (3, 3)), (28, None),
                                               (29, (29, 1)), (1024, (2, 10)), (12, None)])
def test_prime_powers(number, power):
    assert prime_power(number) == power


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.data())
def test_dragonflies_join_all_groups_and_share_ports_alike(endpoints, routers, global_ports, data):
    groups = data.draw(st.integers(1, min(routers * global_ports + 1, 14)))
    network = dragonfly.dragonfly(endpoints, routers, global_ports, groups)
    assert counted(network) == inventory.dragonfly(endpoints, routers, global_ports, groups)
    group_C2 = network.cables_C2 // routers
    far = group_C2[group_C2[:, 0] != group_C2[:, 1]]
    ends = np.bincount(far.ravel(), minlength=groups)
    assert len(set(ends.tolist())) == 1
    assert {tuple(sorted(pair)) for pair in far.tolist()} == set(itertools.combinations(range(groups), 2))
    # A router keeps within its own ports, which the sum over the group would hide.
    routers_far = network.cables_C2[group_C2[:, 0] != group_C2[:, 1]]
    assert np.bincount(routers_far.ravel(), minlength=1).max() <= global_ports
    inside = network.cables_C2[group_C2[:, 0] == group_C2[:, 1]]
    assert len(np.unique(np.sort(inside, axis=1), axis=0)) == groups * routers * (routers - 1) // 2 == len(inside)


def test_losses():
    """A spine, a leaf with its endpoints, one cable, one endpoint's cable."""
    whole = fat_tree.two_layer(4)  # leaves 0-3, spines 4 and 5
    no_spine = whole.without(switches=[4])
    assert (no_spine.switches, no_spine.links, (no_spine.switch_E < 0).sum()) == (5, 4, 0)
    no_leaf = whole.without(switches=[1])
    assert (no_leaf.switches, no_leaf.links) == (5, 6)
    assert np.flatnonzero(no_leaf.switch_E < 0).tolist() == [2, 3]
    less = whole.without(cables=[0], endpoints=[7])
    assert (less.switches, less.links) == (6, 7)
    assert np.flatnonzero(less.switch_E < 0).tolist() == [7]
    assert less.graph().degree(("endpoint", 7)) == 0
    assert counted(whole) == inventory.two_layer(4)  # the whole one stays as it was


@pytest.mark.parametrize(("make", "words"), [
    (lambda: fat_tree.two_layer(63), "ports .63. must be even"),
    (lambda: fat_tree.two_layer(0), "ports .0. must be a whole number of at least 2"),
    (lambda: fat_tree.two_layer(8, 33), "endpoints .33. must be at most 32"),
    (lambda: fat_tree.two_layer(8, 0), "endpoints .0."),
    (lambda: fat_tree.multi_plane(8, 33), "nodes .33. must be at most 32"),
    (lambda: fat_tree.multi_plane(8, 4, planes=0), "planes .0."),
    (lambda: fat_tree.multi_plane(7, 4), "ports .7. must be even"),
    (lambda: fat_tree.multi_rail(8, 5), "nodes .5. must be at most 4"),
    (lambda: fat_tree.multi_rail(4, 1), "rails .8. must be at most 4"),
    (lambda: fat_tree.three_layer(5), "ports .5. must be even"),
    (lambda: slim_fly.slim_fly(6), r"q .6. must be 4w-1, 4w or 4w\+1"),
    (lambda: slim_fly.slim_fly(15), "q .15. must be a power of a prime"),
    (lambda: slim_fly.slim_fly(5, 0), "endpoints_per_switch .0."),
    (lambda: slim_fly.slim_fly(5, ports=9), "ports .9. are too few"),
    (lambda: slim_fly.slim_fly(2), "q .2."),
    (lambda: dragonfly.dragonfly(1, 2, 2, 6), "groups .6. must be at most 5"),
    (lambda: dragonfly.dragonfly(1, 2, 0, 2), "global_ports .0."),
    (lambda: dragonfly.dragonfly(4, 4, 4, 5, ports=10), "ports .10. are too few"),
    (lambda: dragonfly.dragonfly(0, 4, 4, 5), "endpoints .0."),
    (lambda: inventory.two_layer(9), "ports .9. must be even"),
    (lambda: fat_tree.two_layer(4).without(switches=[6]), "switches: .* has no 6"),
    (lambda: fat_tree.two_layer(4).without(cables=[-1]), "cables: .* has no -1"),
    (lambda: Network("one", 4, np.zeros(2, int), np.array([[0, 3]]), np.zeros(2, int)), "switch 3 of 2"),
])
def test_what_cannot_be_is_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_networkx_is_asked_for_by_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name == "networkx":
            raise ImportError(name)
        return real(name, *rest, **named)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "dsv3-jax\[codesign\]"'):
        fat_tree.two_layer(4).graph()
