"""DeepEP's figures: the definition by closed form, the calibration, and the predictions within what is claimed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dsv3_jax.codesign.hardware import hardware
from dsv3_jax.codesign.networks import deepep, fat_tree, patterns
from dsv3_jax.codesign.networks.cluster import Cluster, Rates
from dsv3_jax.codesign.networks.deepep import LOW_LATENCY, PUBLISHED, Kernel, calibrated, exchange, low_latency
from dsv3_jax.codesign.networks.routing import Flows, joined, routes
from dsv3_jax.codesign.networks.simulate import complete
from dsv3_jax.config import ConfigError
from dsv3_jax.expert_parallel.topology import Topology

TOKENS = 256
"""Of a GPU; the published figures have 4,096, which are more even."""


@pytest.fixture(scope="module")
def rates() -> Rates:
    return calibrated(TOKENS)


def test_a_nic_carries_what_leaves_the_node():
    """On 8 nodes with NVLink out of the way: about 8/7 of the NIC's rate, less for the busiest NIC."""
    group = exchange(8, TOKENS)
    told = group.bandwidth(Rates(1.0, 1e6, 10.0)).dispatch
    assert group.rows.nodes / group.rows.slow_rows == pytest.approx(8 / 7, rel=0.01)
    assert 0.93 < told / (group.rows.nodes / group.rows.slow_rows) < 1
    # Two nodes, NICs out of the way: every row that a GPU takes from another counts for NVLink.
    group = exchange(2, TOKENS)
    told = group.bandwidth(Rates(1e6, 1.0, 1e6)).dispatch
    assert 0.93 < told / (group.rows.nodes / group.rows.fast_rows) < 1


def test_calibration_gives_back_its_two_figures(rates):
    assert exchange(1, TOKENS).bandwidth(rates).dispatch == pytest.approx(PUBLISHED[8].dispatch)
    assert exchange(8, TOKENS).bandwidth(rates).dispatch == pytest.approx(PUBLISHED[64].dispatch)
    h800 = hardware("h800")
    assert h800.scale_out.effective < rates.nic < h800.scale_out.bandwidth
    assert rates.nvlink < h800.scale_up.effective  # rows a GPU has from itself count, and cross nothing


@pytest.mark.parametrize("gpus", [16, 32, 128])
def test_other_sizes_are_predicted(rates, gpus):
    told, published = exchange(gpus // 8, TOKENS if gpus < 128 else 128).bandwidth(rates), PUBLISHED[gpus]
    assert told.dispatch == pytest.approx(published.dispatch, rel=0.12)
    assert told.combine == pytest.approx(published.combine, rel=0.15)


def test_without_calibration_only_16_is_out_of_reach():
    """With the rates of paper 1, section 4.3: NVLink's 160 GB/s are more than the forwarding kernels get."""
    told = {gpus: exchange(gpus // 8, TOKENS).bandwidth(Rates.of(hardware("h800"))).dispatch for gpus in (16, 32, 64)}
    off = {gpus: value / PUBLISHED[gpus].dispatch - 1 for gpus, value in told.items()}
    assert 0.15 < off[16] < 0.35
    assert all(-0.16 < off[gpus] < 0 for gpus in (32, 64))


def test_low_latency_kernels(rates):
    startup = deepep.calibrated_startup(rates)
    told = low_latency(8, rates, startup)
    np.testing.assert_allclose(told, LOW_LATENCY[8])
    for gpus in (16, 32):
        np.testing.assert_allclose(low_latency(gpus, rates, startup, draws=1), LOW_LATENCY[gpus], rtol=0.15)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: exchange(3), "nodes .3. of 8 GPUs must divide 256"),
    (lambda: exchange(1, 0), "tokens_a_gpu"),
    (lambda: low_latency(4, Rates(1, 1, 1)), "gpus .4."),
    (lambda: low_latency(24, Rates(1, 1, 1)), "gpus .24."),
    (lambda: low_latency(8, Rates(1, 1, 1), Kernel(-1, 0)), "startup"),
    (lambda: low_latency(8, Rates(1, 1, 1), draws=0), "draws"),
])
def test_nonsense_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_training_on_2048_gpus_in_seconds():
    """32 groups of 64 GPUs dispatch at once, nodes of a group scattered over the leaves of eight planes."""
    start = time.process_time()
    cluster = Cluster(fat_tree.multi_plane(64, 256), Rates.of(hardware("h800")))
    topology = Topology(256, 8, 8)
    experts = deepep.choices(8, 64 * 64)
    nodes = np.random.default_rng(0).permutation(256).reshape(32, 8)
    groups = [patterns.dispatch(experts, topology, 7392.0, (8 * nodes[g][:, None] + np.arange(8)).ravel())
              for g in range(32)]
    flows: Flows = joined(*groups)
    matrix = routes(cluster, flows, "adaptive")
    told = complete(matrix, cluster.capacity_L(), flows.bytes_F, resolution=0.05)
    alone = exchange_seconds(experts, topology)
    assert told.seconds == pytest.approx(alone, rel=1e-6)  # full bisection: groups do not disturb each other
    assert time.process_time() - start < 60


def exchange_seconds(experts: np.ndarray, topology: Topology) -> float:
    cluster = Cluster(fat_tree.multi_plane(64, 8), Rates.of(hardware("h800")))
    flows = patterns.dispatch(experts, topology, 7392.0, np.arange(64))
    return complete(routes(cluster, flows, "static"), cluster.capacity_L(), flows.bytes_F, resolution=0.05).seconds


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["static", "adaptive", "ecmp"])
def test_all_to_all_of_2048_gpus_in_a_minute(policy):
    """Half a million flows; processor time, which others' load on the machine stretches less. At nominal rates cables
    have nothing to spare over NICs, and hashes tell."""
    start = time.process_time()
    cluster = Cluster(fat_tree.multi_plane(64, 256), Rates.of(hardware("h800"), "nominal"))
    flows = patterns.all_to_all(256, 8, 1e6)
    matrix = routes(cluster, flows, policy)
    told = complete(matrix, cluster.capacity_L(), flows.bytes_F, resolution=0.05)
    assert time.process_time() - start < 60
    assert told.seconds / (255 * 8 * 1e6 / 50e9) == pytest.approx(1.0 if policy != "ecmp" else 1.09, abs=0.03)
