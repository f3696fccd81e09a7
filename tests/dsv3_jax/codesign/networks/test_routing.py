"""Ways on small networks against networkx's, rates against closed forms and against linear programs on random graphs,
and what happens to flows in losses."""

from __future__ import annotations

import collections
import dataclasses
import itertools

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.codesign.hardware import hardware
from dsv3_jax.codesign.networks import dragonfly, fat_tree, patterns, slim_fly
from dsv3_jax.codesign.networks.cluster import Cluster, Rates
from dsv3_jax.codesign.networks.graph import Network
from dsv3_jax.codesign.networks.max_min import max_min_rates
from dsv3_jax.codesign.networks.optimal import optimal_routes
from dsv3_jax.codesign.networks.routing import Flows, routes
from dsv3_jax.codesign.networks.shortest_paths import ShortestPaths
from dsv3_jax.codesign.networks.simulate import complete
from dsv3_jax.config import ConfigError
from tests.dsv3_jax.codesign.networks.linear_programs import by_linear_programs

RATES = Rates(nic=1.0, nvlink=4.0, cable=1.0)
NETWORKS = [fat_tree.two_layer(4), fat_tree.two_layer(8, 10), fat_tree.three_layer(4), slim_fly.slim_fly(4, 1),
            dragonfly.dragonfly(1, 3, 1, 4), dragonfly.dragonfly(1, 2, 2, 3)]


def flows_of(*sent: tuple[int, int, float]) -> Flows:
    source, target, size = zip(*sent, strict=True)
    return Flows(np.array(source), np.array(target), np.array(size, float))


def cable_ways(network: Network, start: int, end: int) -> list[tuple[int, ...]]:
    """Shortest ways as networkx finds them, a way for every choice among parallel cables; directed cables."""
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(network.level_S)))
    between = collections.defaultdict(list)
    for cable, (a, b) in enumerate(network.cables_C2.tolist()):
        graph.add_edge(a, b)
        between[a, b].append(cable)
        between[b, a].append(cable + network.links)
    found = []
    for way in networkx.all_shortest_paths(graph, start, end):
        found += list(itertools.product(*(between[hop] for hop in itertools.pairwise(way))))
    return found


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_ways_are_those_of_networkx(network):
    """All of them, each with an equal part of what is sprayed; single ways are among them."""
    paths = ShortestPaths(network)
    leaves = np.unique(network.switch_E)
    for start, end in itertools.islice(itertools.permutations(leaves.tolist(), 2), 40):
        ways = cable_ways(network, start, end)
        pair = np.array([start]), np.array([end])
        assert sorted(map(tuple, paths.list_ways(start, end, 1000).tolist())) == sorted(ways)
        expected = collections.Counter(itertools.chain(*ways))
        sprayed = paths.all_ways(*pair)
        got = dict(zip(sprayed.cable_N.tolist(), sprayed.share_N.tolist(), strict=True))
        assert got == pytest.approx({cable: count / len(ways) for cable, count in expected.items()})
        for table in (False, True):
            for choice in range(8):
                one = paths.one_way(*pair, np.array([choice], np.uint64), table)
                assert tuple(one.cable_N.tolist()) in ways


@pytest.mark.parametrize("network", [*NETWORKS[:4], fat_tree.multi_rail(8, 8, 4), fat_tree.multi_plane(4, 8, 4)],
                         ids=lambda network: network.name)
@pytest.mark.parametrize("policy", ["ecmp", "adaptive", "static"])
def test_flows_are_whole_and_go_where_they_should(network, policy):
    """At every switch as much comes in as goes out; each flow leaves by its source's NIC and comes by its target's."""
    cluster = Cluster(network, RATES, 1)
    flows = patterns.all_pairs(cluster.nodes, 1, 1.0)
    matrix = routes(cluster, flows, policy, forward="none") if "plane" not in network.name else None
    if matrix is None:  # one plane's pairs only
        same = flows.source_F % 4 == flows.target_F % 4
        flows = Flows(*(part[same] for part in flows))
        matrix = routes(cluster, flows, policy, forward="none")
    ends = np.arange(cluster.gpus)
    tail, head = network.cables_C2.T
    into_switch = np.concatenate([network.switch_E, np.full(3 * cluster.gpus, -1), head, tail])
    from_switch = np.concatenate([np.full(cluster.gpus, -1), network.switch_E, np.full(2 * cluster.gpus, -1), tail,
                                  head])
    dense = matrix.toarray()
    np.testing.assert_array_equal(dense[cluster.up(ends)], ends[:, None] == flows.source_F)
    np.testing.assert_array_equal(dense[cluster.down(ends)], ends[:, None] == flows.target_F)
    switch = np.arange(len(network.level_S))[:, None]
    np.testing.assert_allclose((switch == into_switch) @ dense, (switch == from_switch) @ dense, atol=1e-12)


@pytest.mark.parametrize("network", [fat_tree.two_layer(4), fat_tree.three_layer(4), fat_tree.two_layer(8, 16),
                                     fat_tree.multi_rail(8, 8, 4), fat_tree.two_layer(16, 64)],
                         ids=lambda network: network.name)
@pytest.mark.parametrize("policy", ["adaptive", "static"])
def test_full_bisection_reaches_the_injection_rate(network, policy):
    """An all-to-all of NICs on a fat tree of as much above as below: the NICs alone limit."""
    cluster = Cluster(network, RATES, 1)
    flows = patterns.all_pairs(cluster.nodes, 1, 1.0)
    rates = max_min_rates(routes(cluster, flows, policy, forward="none"), cluster.capacity_L())
    np.testing.assert_allclose(rates, 1 / (cluster.gpus - 1))


@pytest.mark.parametrize("shift", [1, 2, 3, 5, 8, 11])
def test_static_tables_keep_shifts_apart(shift):
    """D-mod-k: all endpoints send `shift` further and no cable carries two, where hashes collide."""
    network = fat_tree.three_layer(4)
    cluster = Cluster(network, RATES, 1)
    ends = np.arange(cluster.gpus)
    flows = Flows(ends, np.roll(ends, -shift), np.ones(cluster.gpus))
    matrix = routes(cluster, flows, "static", forward="none")
    assert matrix.sum(axis=1).max() == 1
    worst = [routes(cluster, flows, "ecmp", forward="none", seed=seed).sum(axis=1).max() for seed in range(5)]
    assert max(worst) > 1 or shift == 1


def test_a_hot_cable_is_shared():
    """One spine's cable is all that is left between two leaves: three flows have a third each."""
    network = fat_tree.two_layer(8, 8)  # leaves 0 and 1, four cables each to one spine
    keep = [np.flatnonzero(network.cables_C2[:, 0] == 0)[0], *np.flatnonzero(network.cables_C2[:, 0] == 1)]
    network = network.without(cables=sorted(set(range(network.links)) - set(keep)))
    cluster = Cluster(network, RATES, 1)
    flows = flows_of((0, 4, 1), (1, 5, 1), (2, 6, 1), (5, 6, 1))
    rates = max_min_rates(routes(cluster, flows, "adaptive", forward="none"), cluster.capacity_L())
    np.testing.assert_allclose(rates, [1 / 3, 1 / 3, 1 / 3, 2 / 3])


def test_hashes_follow_the_seed_and_use_all_cables():
    network = fat_tree.two_layer(16, 64)
    cluster = Cluster(network, RATES, 1)
    flows = patterns.all_pairs(cluster.nodes, 1, 1.0)
    one, same, other = (routes(cluster, flows, "ecmp", forward="none", seed=seed) for seed in (0, 0, 1))
    assert (one != same).nnz == 0
    assert (one != other).nnz > 0
    # Up-links of a leaf: 8 x 56 flows over 8 of them, so 56 each; sixteen leaves' worth within five standard
    # deviations of a binomial's 7.
    up = one.sum(axis=1).A1[4 * cluster.gpus:][:network.links]
    assert np.abs(up - 56).max() < 35
    assert up.std() > 3


def test_queue_pairs_are_hashed_alone():
    cluster = Cluster(fat_tree.two_layer(16, 64), RATES, 1)
    flow = flows_of((0, 63, 1))
    matrix = routes(cluster, flow, "ecmp", forward="none", queue_pairs=8)
    assert matrix.nnz > 4
    assert matrix.sum() == pytest.approx(4)  # up, two cables, down
    assert matrix.max() == 1


def test_forwarding_over_nvlink():
    """GPU 1 of node 0 to GPU 2 of node 1, four to a node: by the target's rail, the sender's, or straight."""
    cluster = Cluster(fat_tree.multi_rail(8, 2, 4), RATES, 4)
    flow = flows_of((1, 6, 1))

    def links(forward: str) -> set[int]:
        return set(routes(cluster, flow, "static", forward=forward).indices.tolist())
    assert links("sender") == {cluster.out(1), cluster.into(2), cluster.up(2), cluster.down(6)}
    assert links("receiver") == {cluster.up(1), cluster.down(5), cluster.out(5), cluster.into(6)}
    straight = links("none")
    assert {cluster.up(1), cluster.down(6)} < straight
    assert len(straight) == 4  # over a spine, since unequal rails have unequal leaves
    assert set(routes(cluster, flows_of((1, 3, 1)), "static").indices.tolist()) == {cluster.out(1), cluster.into(3)}


def test_planes_do_not_meet():
    cluster = Cluster(fat_tree.multi_plane(8, 2, 4), RATES, 4)
    with pytest.raises(ConfigError, match=r"forward none: no way from the NIC of GPU 1 to that of GPU 6.*NVLink"):
        routes(cluster, flows_of((1, 6, 1)), "adaptive", forward="none")


@pytest.mark.parametrize("lost", [0, 3])
def test_a_lost_plane_is_shared_by_the_others(lost):
    """An all-to-all of nodes with four planes takes 4/3 as long on three, if NVLink has room."""
    network = fat_tree.multi_plane(8, 4, 4)
    flows = patterns.all_to_all(4, 4, 1.0)
    seconds = []
    for net in (network, network.without(endpoints=range(lost, 16, 4))):
        cluster = Cluster(net, dataclasses.replace(RATES, nvlink=100.0), 4)
        seconds.append(complete(routes(cluster, flows, "adaptive"), cluster.capacity_L(), flows.bytes_F).seconds)
    assert seconds[0] == pytest.approx(3 * 4)
    assert seconds[1] == pytest.approx(3 * 4 * 4 / 3)


def test_a_node_without_any_plane_is_named():
    network = fat_tree.multi_plane(8, 3, 2).without(endpoints=[2, 3])
    with pytest.raises(ConfigError, match="no way from node 0 to node 1"):
        routes(Cluster(network, RATES, 2), flows_of((0, 3, 1)), "adaptive")


def test_a_lost_spine_costs_its_share():
    """Two leaves of 8, two spines: without one, half the bandwidth between leaves; all of it inside."""
    network = fat_tree.two_layer(16, 32)
    assert network.switches == 4 + 2
    for lost, expected in ((None, 1.0), (5, 0.5)):
        cluster = Cluster(network if lost is None else network.without(switches=[lost]), RATES, 1)
        flows = flows_of(*((e, e + 16, 1) for e in range(16)))
        rates = max_min_rates(routes(cluster, flows, "adaptive"), cluster.capacity_L())
        np.testing.assert_allclose(rates, expected)


@st.composite
def random_networks(draw) -> Network:
    """2 to 5 switches, each joined to an earlier one, up to 5 cables more, some side by side; 1 or 2 endpoints each."""
    switches = draw(st.integers(2, 5))
    cables = [(draw(st.integers(0, s - 1)), s) for s in range(1, switches)]
    switch = st.integers(0, switches - 1)
    pairs = st.tuples(switch, switch).filter(lambda pair: pair[0] != pair[1])
    cables += draw(st.lists(pairs, max_size=5))
    held = draw(st.lists(st.integers(1, 2), min_size=switches, max_size=switches))
    return Network("random", 16, np.repeat(np.arange(switches), held), np.array(cables), np.zeros(switches, int))


def ended_by_linear_programs(matrix_LF: np.ndarray, capacity_L: np.ndarray, bytes_F: np.ndarray) -> np.ndarray:
    """float64 [F], seconds: rates by programs, anew whenever a flow has ended."""
    rest_F, seconds_F, now = bytes_F.copy(), np.zeros(len(bytes_F)), 0.0
    while (active := rest_F > 1e-9 * bytes_F).any():
        rate_F = np.zeros(len(bytes_F))
        rate_F[active] = by_linear_programs(matrix_LF[:, active], capacity_L)
        step = (rest_F[active] / rate_F[active]).min()
        rest_F, now = rest_F - rate_F * step, now + step
        seconds_F[active] = now
    return seconds_F


@settings(max_examples=20, deadline=None)
@given(random_networks(), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from([1.0, 2.0, 5.0])),
                                   min_size=1, max_size=4), st.floats(0.3, 3.0))
def test_random_graphs_against_a_second_computation(network, sent, cable):
    """Ways by networkx, rates by linear programs, ends by stepping from one to the next: nothing of ours but the
    network's own description."""
    sent = [(a % network.endpoints, b % network.endpoints, size) for a, b, size in sent]
    flows = flows_of(*([flow for flow in sent if flow[0] != flow[1]] or [(0, network.endpoints - 1, 1.0)]))
    ends, cables = network.endpoints, network.links
    second = np.zeros((2 * ends + 2 * cables, len(flows.bytes_F)))  # NICs out, NICs in, cables there and back
    for flow, (source, target, _) in enumerate(zip(*flows, strict=True)):
        second[source, flow] = second[ends + target, flow] = 1
        start, end = network.switch_E[source], network.switch_E[target]
        ways = cable_ways(network, start, end) if start != end else [()]
        for way in ways:
            second[[2 * ends + one for one in way], flow] += 1 / len(ways)
    capacity = np.repeat([1.0, cable], [2 * ends, 2 * cables])
    cluster = Cluster(network, Rates(1.0, 1.0, cable), 1)
    matrix = routes(cluster, flows, "adaptive", forward="none")
    # The programs' own tolerance, and that of a rest that counts as none.
    np.testing.assert_allclose(max_min_rates(matrix, cluster.capacity_L()), by_linear_programs(second, capacity),
                               rtol=1e-5)
    np.testing.assert_allclose(complete(matrix, cluster.capacity_L(), flows.bytes_F).seconds_F,
                               ended_by_linear_programs(second, capacity, flows.bytes_F), rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(NETWORKS),
       st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.sampled_from([1.0, 2.0, 5.0])), min_size=1,
                max_size=6), st.integers(0, 3))
def test_no_policy_beats_the_linear_program(network, sent, seed):
    """Nor does the program beat the busiest NIC."""
    sent = [(a % network.endpoints, b % network.endpoints, size) for a, b, size in sent]
    sent = [flow for flow in sent if flow[0] != flow[1]] or [(0, network.endpoints - 1, 1.0)]
    cluster, flows = Cluster(network, RATES, 1), flows_of(*sent)
    paths = ShortestPaths(network)
    best = optimal_routes(cluster, flows, "none", paths)
    bound = complete(best, cluster.capacity_L(), flows.bytes_F).bound
    nic = np.bincount(flows.source_F, weights=flows.bytes_F), np.bincount(flows.target_F, weights=flows.bytes_F)
    assert bound >= max(nic[0].max(), nic[1].max()) * (1 - 1e-6)
    for policy in ("ecmp", "adaptive", "static"):
        matrix = routes(cluster, flows, policy, forward="none", seed=seed, paths=paths)
        assert complete(matrix, cluster.capacity_L(), flows.bytes_F).bound >= bound * (1 - 1e-6)


def test_the_program_beats_spraying_where_ways_are_unequal():
    """Two spines, one with three of four cables to the target's leaf gone: equal parts overload the one left."""
    network = fat_tree.two_layer(8, 12)  # leaves 0-2, spines 3 and 4
    cables = network.cables_C2.tolist()
    weak = [index for index, cable in enumerate(cables) if cable == [2, 4]][1:]
    cluster = Cluster(network.without(cables=weak), RATES, 1)
    flows = flows_of((0, 8, 1), (1, 9, 1), (2, 10, 1))
    sprayed = complete(routes(cluster, flows, "adaptive"), cluster.capacity_L(), flows.bytes_F).bound
    best = complete(optimal_routes(cluster, flows), cluster.capacity_L(), flows.bytes_F).bound
    assert best == pytest.approx(1.0)
    assert best <= sprayed


def test_capacities_are_the_hardwares():
    h800 = hardware("h800")
    assert Rates.of(h800) == Rates(40e9, 160e9, 50e9)
    assert Rates.of(h800, "nominal") == Rates(50e9, 200e9, 50e9)
    cluster = Cluster(fat_tree.two_layer(4, 4), Rates.of(h800), 2)
    capacity = cluster.capacity_L()
    assert len(capacity) == cluster.links
    assert capacity[cluster.up(3)] == capacity[cluster.down(0)] == 40e9
    assert capacity[cluster.out(0)] == capacity[cluster.into(3)] == 160e9
    assert set(capacity[cluster.cable(np.arange(2 * cluster.network.links))]) == {50e9}


CLUSTER = Cluster(fat_tree.two_layer(4), RATES, 2)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Rates(-1.0, 1.0, 1.0), "nic .-1.0. must be a finite number above 0"),
    (lambda: Rates(1.0, 0.0, 1.0), "nvlink"),
    (lambda: Rates(1.0, 1.0, float("inf")), "cable"),
    (lambda: Cluster(fat_tree.two_layer(4), RATES, 3), "endpoints .8. must be whole nodes of node_size .3."),
    (lambda: Cluster(fat_tree.two_layer(4), RATES, 0), "node_size .0."),
    (lambda: routes(CLUSTER, flows_of((0, 8, 1)), "ecmp"), "target_F: GPUs are 0 to 7"),
    (lambda: routes(CLUSTER, flows_of((-1, 2, 1)), "ecmp"), "source_F"),
    (lambda: routes(CLUSTER, flows_of((2, 2, 1)), "ecmp"), "flow 0 goes to where it starts"),
    (lambda: routes(CLUSTER, flows_of((0, 2, -1)), "ecmp"), "bytes_F"),
    (lambda: routes(CLUSTER, flows_of((0, 2, 1)), "spray"), "policy .spray."),
    (lambda: routes(CLUSTER, flows_of((0, 2, 1)), "ecmp", queue_pairs=0), "queue_pairs"),
    (lambda: ShortestPaths(dragonfly.dragonfly(1, 32, 16, 511)), "switches .16352. must be at most 8192"),
    (lambda: ShortestPaths(fat_tree.two_layer(16)).list_ways(0, 1, 7), "ways .8. must be at most 7"),
])
def test_nonsense_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
