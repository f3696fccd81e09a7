"""Flows against hand counts, against the traffic module's, and against each other."""

from __future__ import annotations

import numpy as np
import pytest

from dsv3_jax.codesign.networks import fat_tree, nccl, patterns
from dsv3_jax.codesign.networks.cluster import Cluster, Rates
from dsv3_jax.codesign.networks.routing import Flows, joined, routes
from dsv3_jax.codesign.networks.simulate import complete
from dsv3_jax.codesign.traffic import rows_a_token
from dsv3_jax.config import ConfigError
from dsv3_jax.expert_parallel.topology import Topology


def as_dict(flows: Flows) -> dict[tuple[int, int], float]:
    return {(int(a), int(b)): float(size) for a, b, size in zip(*flows, strict=True)}


def test_all_to_all_of_two_nodes_of_two():
    """A byte for each pair: two bytes a rail between nodes; inside, a byte for the neighbour and one to forward."""
    assert as_dict(patterns.all_to_all(2, 2, 1.0)) == {
        (0, 2): 2, (2, 0): 2, (1, 3): 2, (3, 1): 2, (0, 1): 2, (1, 0): 2, (2, 3): 2, (3, 2): 2}


@pytest.mark.parametrize("nvlink", [100.0, 0.5])
def test_legs_take_as_long_as_flows_forwarded_one_by_one(nvlink):
    """An all-to-all of 4 nodes of 4, whether the network or NVLink is what is full; and as the closed form says."""
    cluster = Cluster(fat_tree.multi_plane(8, 4, 4), Rates(1.0, nvlink, 1.0), 4)
    times = []
    for flows in (patterns.all_to_all(4, 4, 1.0), patterns.all_pairs(4, 4, 1.0)):
        told = complete(routes(cluster, flows, "adaptive"), cluster.capacity_L(), flows.bytes_F)
        times.append(told.seconds)
    # A NIC sends four GPUs' bytes to three nodes; a GPU gives each of its three neighbours four nodes' bytes.
    np.testing.assert_allclose(times, max(3 * 4, 3 * 4 / nvlink))


def test_dispatch_of_one_token_by_hand():
    """Experts 0..15 on 2 nodes of 4 devices; the token on device 1, experts on devices 0, 1 and, there, 4 and 7."""
    topology, gpu_D = Topology(16, 2, 4), np.arange(8)
    experts = np.full((2, 6), 0)
    experts[0] = 0  # device 0's own token: stays
    experts[1] = [0, 1, 2, 8, 9, 15]
    told = as_dict(patterns.dispatch(experts, topology, 10.0, gpu_D))
    assert told == {(1, 5): 10, (1, 0): 10, (5, 4): 10, (5, 7): 10}
    assert as_dict(patterns.backwards(patterns.dispatch(experts, topology, 10.0, gpu_D), 2.0)) == {
        (b, a): 2 * size for (a, b), size in told.items()}
    one_by_one = as_dict(patterns.one_by_one(experts, topology, 10.0, gpu_D))
    assert one_by_one == {(1, 0): 20, (1, 4): 20, (1, 7): 10}


@pytest.mark.parametrize("topology", [Topology(32, 4, 4), Topology(16, 1, 8), Topology(64, 8, 2)])
def test_dispatch_moves_the_rows_that_traffic_counts(topology):
    experts = np.argsort(np.random.default_rng(0).random((topology.devices * 6, topology.experts)), axis=1)[:, :5]
    gpu_D = np.random.default_rng(1).permutation(topology.devices)
    flows, rows = patterns.dispatch(experts, topology, 1.0, gpu_D), rows_a_token(experts, topology)
    device = np.argsort(gpu_D)
    source, target = device[flows.source_F], device[flows.target_F]
    slow = source // topology.scale_up != target // topology.scale_up
    assert flows.bytes_F[slow].sum() / len(experts) == pytest.approx(rows.slow_rows)
    assert flows.bytes_F[~slow].sum() / len(experts) == pytest.approx(rows.fast_rows)
    # Between nodes rows stay on their rail.
    np.testing.assert_array_equal(source[slow] % topology.scale_up, target[slow] % topology.scale_up)
    each = patterns.one_by_one(experts, topology, 1.0, np.arange(topology.devices))
    slow = each.source_F // topology.scale_up != each.target_F // topology.scale_up
    assert each.bytes_F[slow].sum() / len(experts) == pytest.approx(rows.slow_copies)


def test_joined_flows_are_those_of_all():
    one, other = (Flows(np.array([a]), np.array([a + 1]), np.array([size])) for a, size in ((0, 1.0), (2, 2.0)))
    assert as_dict(joined(one, patterns.backwards(one), other)) == {(0, 1): 1, (1, 0): 1, (2, 3): 2}


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_rings_of_replicas_visit_every_member_and_use_every_nic_once(tp):
    """Three nodes of four: each ring is one loop through its group; NICs carry one ring out and one in."""
    rings = nccl.data_parallel_rings(np.array([2, 0, 1]), 4, tp)
    assert (rings.groups, rings.rings, rings.members) == (tp, 4 // tp, 12 // tp)
    for ring in range(rings.groups * rings.rings):
        following = {int(a): int(b) for a, b in zip(rings.flows.source_F[rings.ring_F == ring],
                                                    rings.flows.target_F[rings.ring_F == ring], strict=True)}
        seen, at = [], min(following)
        while at not in seen:
            seen.append(at)
            at = following[at]
        assert at == seen[0]
        group = ring // rings.rings
        assert sorted(seen) == [gpu for gpu in range(12) if gpu % 4 % tp == group]
    far = rings.flows.source_F // 4 != rings.flows.target_F // 4
    assert sorted(rings.flows.source_F[far]) == sorted(rings.flows.target_F[far]) == list(range(12))


@pytest.mark.parametrize("tp", [8, 4, 2, 1])
def test_rings_without_collisions_reach_their_nics(tp):
    """A buffer S of N members goes out of a node by 8/tp NICs, (N-1)/N of it: S/t = NICs N/(N-1), unless NVLink, which
    carries it from member to member but for the one step between nodes, is slower."""
    for nvlink in (100.0, 2.0):
        cluster = Cluster(fat_tree.two_layer(16, 32), Rates(1.0, nvlink, 1.0), 8)
        rings = nccl.data_parallel_rings(np.arange(4), 8, tp)
        local = 8 // tp
        inside = nvlink * local / (local - 1) if local > 1 else np.inf
        expected = min(local, inside) * rings.members / (rings.members - 1)
        np.testing.assert_allclose(nccl.ring_bandwidths(cluster, rings, "static"), expected)
        np.testing.assert_allclose(nccl.ring_bandwidths(cluster, rings, "adaptive"), expected)


def test_two_rings_on_one_cable_have_half():
    """One cable between two leaves: all rings that cross it share it."""
    network = fat_tree.two_layer(8, 8)
    keep = [np.flatnonzero(network.cables_C2[:, 0] == leaf)[0] for leaf in (0, 1)]
    network = network.without(cables=sorted(set(range(network.links)) - set(keep)))
    cluster = Cluster(network, Rates(1.0, 9.0, 1.0), 2)
    rings = nccl.data_parallel_rings(np.arange(4), 2, 2)  # two groups of a ring each, which cross once a way
    np.testing.assert_allclose(nccl.ring_bandwidths(cluster, rings, "ecmp"), 0.5 * 4 / 3)


@pytest.mark.parametrize("nodes", [2, 4, 7])
def test_all_to_all_bandwidth_counts_what_stays(nodes):
    """NICs at 1: a GPU's buffer, of which a part of (n-1)/n leaves the node."""
    for network in (fat_tree.multi_plane(8, nodes, 2), fat_tree.multi_rail(16, nodes, 2)):
        told = nccl.all_to_all_bandwidth(Cluster(network, Rates(1.0, 9.0, 1.0), 2), nodes)
        assert told == pytest.approx(nodes / (nodes - 1))


def test_messages_take_their_startup():
    assert nccl.message_bandwidth(1e9, 1e9, 0) == pytest.approx(1e9)
    assert nccl.message_bandwidth(1e9, 1e9, 1.0) == pytest.approx(0.5e9)


CLUSTER = Cluster(fat_tree.multi_plane(8, 2, 2), Rates(1.0, 1.0, 1.0), 2)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: patterns.all_to_all(0, 8, 1.0), "nodes .0."),
    (lambda: patterns.all_to_all(2, 8, -1.0), "bytes_each .-1.0."),
    (lambda: patterns.all_pairs(2, 0, 1.0), "node_size .0."),
    (lambda: patterns.dispatch(np.zeros((2, 1), int), Topology(8, 2, 2), 0.0, np.arange(4)), "row_bytes"),
    (lambda: patterns.dispatch(np.zeros((2, 1), int), Topology(8, 2, 2), 1.0, np.zeros(4, int)), "gpu_D"),
    (lambda: patterns.one_by_one(np.zeros((2, 1), int), Topology(8, 2, 2), 1.0, np.arange(3)), "gpu_D"),
    (lambda: patterns.backwards(Flows(*np.ones((3, 1))), 0), "factor"),
    (lambda: nccl.data_parallel_rings(np.arange(4), 8, 3), "tp .3. must divide the 8"),
    (lambda: nccl.data_parallel_rings(np.arange(1), 8, 8), "members .1."),
    (lambda: nccl.all_to_all_bandwidth(CLUSTER, 3), "nodes .3. must be 1 to 2"),
    (lambda: nccl.message_bandwidth(1.0, 1.0, -1.0), "startup"),
])
def test_nonsense_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
