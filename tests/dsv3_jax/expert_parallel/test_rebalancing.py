"""From one placement to the next: fewest moves against all ways there are, and moves only where they are worth it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.expert_parallel.rebalancing import arranged, rebalanced, transfers
from dsv3_jax.expert_parallel.replicas import Deployment, Placement, place

PREFILL = Deployment(256, 288, devices=32, nodes=4, groups=8)
BY_GROUP, ANYWHERE = Deployment(12, 18, devices=6, nodes=3, groups=6), Deployment(8, 12, devices=6, nodes=3)
ROUNDING = 1e-9


def loads(layers: int, experts: int, seed: int) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).standard_normal((layers, experts)))


def drifted(load_LE: np.ndarray, by: float, seed: int = 9) -> np.ndarray:
    return load_LE * np.exp(by * np.random.default_rng(seed).standard_normal(load_LE.shape))


def allowed_orders(deployment: Deployment) -> list[tuple[int, ...]]:
    """Every way that devices may change places."""
    if deployment.groups == 1:
        return list(itertools.permutations(range(deployment.devices)))
    nodes = np.arange(deployment.devices).reshape(deployment.nodes, -1)
    inside = [list(itertools.permutations(node)) for node in nodes]
    return [tuple(itertools.chain(*order)) for node_order in itertools.permutations(range(deployment.nodes))
            for order in itertools.product(*(inside[node] for node in node_order))]


def sent(new_MP: np.ndarray, old_MP: np.ndarray, per_node: int) -> tuple[int, int]:
    """Replicas sent, and those of them that the node hasn't got."""
    near = far = 0
    for device, new_P in enumerate(new_MP):
        first = device // per_node * per_node
        on_node = set(old_MP[first:first + per_node].ravel())
        lacked = set(new_P) - set(old_MP[device])
        near, far = near + len(lacked & on_node), far + len(lacked - on_node)
    return near + far, far


@pytest.mark.parametrize("deployment", [BY_GROUP, ANYWHERE])
def test_fewest_moves_of_all_arrangements(deployment):
    old, new = (place(loads(8, deployment.experts, seed), deployment) for seed in (0, 1))
    found, per_node = arranged(new, old), deployment.devices_per_node
    moves = transfers(found, old)
    for layer in range(8):
        new_MP, old_MP = new.expert_LMP[layer], old.expert_LMP[layer]
        best = min(sent(new_MP[list(order)], old_MP, per_node) for order in allowed_orders(deployment))
        here = moves.layer_X == layer
        assert (np.sum(here), np.sum(here & moves.between_nodes_X)) == best
        # It is one of the arrangements, slots aside.
        orders = [np.sort(new_MP[list(order)], axis=1).tolist() for order in allowed_orders(deployment)]
        assert np.sort(found.expert_LMP[layer], axis=1).tolist() in orders
    assert 0 < np.sum(moves.between_nodes_X) < len(moves.layer_X)  # both kinds were there


@pytest.mark.parametrize("deployment", [BY_GROUP, ANYWHERE, PREFILL])
def test_transfers_make_the_new_placement(deployment):
    load_LE = loads(3, deployment.experts, 2)
    old = place(load_LE, deployment)
    new = arranged(place(drifted(load_LE, 0.5), deployment), old)
    moves, per_node = transfers(new, old), deployment.devices_per_node
    held = old.expert_LS.copy()
    for layer, expert, source, destination, slot, between in zip(*moves, strict=True):
        assert slot // deployment.slots_per_device == destination
        assert expert in old.expert_LMP[layer, source]
        assert expert not in old.expert_LMP[layer, destination]
        assert between == (source // per_node != destination // per_node)
        node = old.expert_LS[layer].reshape(deployment.nodes, -1)[destination // per_node]
        assert between == (expert not in node)  # from the own node where it can be
        held[layer, slot] = expert
    np.testing.assert_array_equal(held, new.expert_LS)
    # Slots that no transfer names stay as they are.
    assert len(moves.layer_X) == np.sum(new.expert_LS != old.expert_LS)
    inside, between = moves.bytes_sent(1000)
    assert (inside, between) == (1000 * np.sum(~moves.between_nodes_X), 1000 * np.sum(moves.between_nodes_X))


def test_holders_take_turns_to_send():
    """Two devices have expert 0, and the two others come to want it."""
    deployment = Deployment(4, 12, devices=4)
    old = Placement(np.array([[0, 1, 2, 0, 1, 2, 3, 1, 2, 3, 1, 2]], np.int32), deployment)
    new = Placement(np.array([[0, 1, 2, 0, 1, 2, 3, 0, 2, 3, 0, 2]], np.int32), deployment)
    moves = transfers(new, old)
    assert moves.source_X.tolist() == [0, 1]
    assert moves.destination_X.tolist() == [2, 3]


def test_the_same_placement_renamed_moves_nothing():
    old = place(loads(2, 256, 3), PREFILL)
    # Nodes, devices inside them, and slots, all turned round.
    turned = old.expert_LS.reshape(2, 4, 8, 9)[:, ::-1, ::-1, ::-1].reshape(2, -1)
    found = arranged(Placement(turned, PREFILL), old)
    np.testing.assert_array_equal(found.expert_LS, old.expert_LS)
    moves = transfers(found, old)
    assert len(moves.layer_X) == 0
    assert moves.bytes_sent(1000) == (0, 0)


@pytest.mark.parametrize("groups", [8, 1])
def test_rebalancing_is_within_its_tolerance_and_moves_less(groups):
    deployment = Deployment(256, 288, devices=32, nodes=4, groups=groups)
    load_LE = loads(4, 256, 4) ** 0.5
    old, new_load_LE = place(load_LE, deployment), drifted(load_LE, 0.2)
    anew = arranged(place(new_load_LE, deployment), old)
    mean_L = new_load_LE.sum(axis=1) / deployment.devices
    moved = []
    for tolerance in (0.0, 0.02, 0.1, 10.0):
        found = rebalanced(new_load_LE, old, tolerance)
        over_L = found.device_load(new_load_LE).max(axis=1) - anew.device_load(new_load_LE).max(axis=1)
        assert np.all(over_L <= (tolerance + ROUNDING) * mean_L)
        moved.append(len(transfers(found, old).layer_X))
        assert found.replicas_LE.min() > 0
        assert all(len(set(expert_P)) == len(expert_P) for expert_P in found.expert_LMP.reshape(-1, 9))
    assert moved == sorted(moved, reverse=True)
    assert moved[0] <= len(transfers(anew, old).layer_X)
    assert moved[1] < moved[0] / 1.5  # a little balance buys many moves
    assert moved[-1] == 0


def test_layers_that_are_balanced_still_stay_as_they_are():
    load_LE = loads(3, 256, 5)
    old = place(load_LE, PREFILL)
    new_load_LE = load_LE.copy()
    new_load_LE[1] = new_load_LE[1, ::-1]
    found = rebalanced(new_load_LE, old, tolerance=0.01)
    assert set(transfers(found, old).layer_X.tolist()) == {1}
    assert len(transfers(rebalanced(load_LE, old, tolerance=0.001), old).layer_X) == 0


def test_mistakes_are_told():
    old = place(np.ones((2, 12)), BY_GROUP)
    with pytest.raises(ConfigError, match=r"loads have 1 layers, the placement 2"):
        rebalanced(np.ones((1, 12)), old)
    with pytest.raises(ConfigError, match=r"tolerance \(-0.1\) must be at least 0"):
        rebalanced(np.ones((2, 12)), old, -0.1)
    with pytest.raises(ConfigError, match="place experts anew"):
        arranged(place(np.ones((2, 8)), ANYWHERE), old)
    with pytest.raises(ConfigError, match="the new placement is of 1 layers"):
        transfers(place(np.ones((1, 12)), BY_GROUP), old)
