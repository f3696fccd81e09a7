"""Placements of replicas: what any must be, how near the bounds they come, and never behind the published balancer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.expert_parallel.replica_search import fullest_bin_at_least, packed
from dsv3_jax.expert_parallel.replicas import CLOSE, Deployment, Placement, lower_bound, place
from tests.dsv3_jax.expert_parallel.published_balancer import fullest, published

ROUNDING = 1e-9
"""Sums of a few hundred float64 in another order."""
PREFILL = Deployment(256, 288, devices=32, nodes=4, groups=8)
PREFILL_GLOBAL = Deployment(256, 288, devices=32, nodes=4)
EP144, EP320 = Deployment(256, 288, devices=144, nodes=18), Deployment(256, 320, devices=320, nodes=40)
LAYERS = 3


def loads(kind: str, experts: int = 256, layers: int = LAYERS) -> np.ndarray:
    """float64 [L, E]: the same skew in another order in every layer."""
    rng = np.random.default_rng(3)
    rank = np.arange(1, experts + 1)
    load_LE = {
        "zipf": np.tile(1 / rank, (layers, 1)),
        "mild zipf": np.tile(rank ** -0.5, (layers, 1)),
        "lognormal": np.exp(0.5 * rng.standard_normal((layers, experts))),
        "wide lognormal": np.exp(rng.standard_normal((layers, experts))),
        "one hot": np.tile(np.where(rank == 1, 30.0, 1.0), (layers, 1)),
        # What training leaves balanced on the whole, a batch of one subject doesn't: a few experts get several times
        # the mean, all others vary.
        "one subject": np.exp(0.3 * rng.standard_normal((layers, experts))) * np.where(rank <= 12, 3.0, 1.0),
    }[kind]
    return rng.permuted(load_LE, axis=1)


def check(placement: Placement) -> None:
    """Every expert has a slot, no device has one twice, and by group, replicas keep to their group's node."""
    deployment = placement.deployment
    assert placement.expert_LS.shape[1] == deployment.slots
    for expert_MP in placement.expert_LMP:
        assert set(expert_MP.ravel()) == set(range(deployment.experts))
        assert all(len(set(expert_P)) == len(expert_P) for expert_P in expert_MP)
        if deployment.groups > 1:
            group_NS = expert_MP.reshape(deployment.nodes, -1) // (deployment.experts // deployment.groups)
            assert sorted(itertools.chain(*map(set, group_NS))) == list(range(deployment.groups))
    assert placement.replicas_LE.max() <= deployment.most_replicas


def fullest_L(placement: Placement, load_LE: np.ndarray) -> np.ndarray:
    return placement.device_load(load_LE).max(axis=1)


TENTH = 1.1
FORBIDDEN = {PREFILL: ("zipf", "wide lognormal", "one hot"), PREFILL_GLOBAL: (), EP144: ("zipf", "wide lognormal"),
             EP320: ("zipf", "mild zipf", "lognormal", "wide lognormal", "one hot", "one subject")}
"""Where the bound is above the mean by more than a tenth: by group, since a group as hot as that heats its node; with
few slots a device, since an expert that 32 or 64 slots more can't divide further fills one."""


@pytest.mark.parametrize("kind", ["zipf", "mild zipf", "lognormal", "wide lognormal", "one hot", "one subject"])
@pytest.mark.parametrize("deployment", [PREFILL, PREFILL_GLOBAL, EP144, EP320],
                         ids=["prefill", "prefill global", "EP144", "EP320"])
def test_fullest_device_is_within_a_tenth_of_the_mean_or_of_the_bound(deployment, kind):
    load_LE = loads(kind)
    placement, bound_L = place(load_LE, deployment), lower_bound(load_LE, deployment)
    check(placement)
    mean_L = load_LE.sum(axis=1) / deployment.devices
    np.testing.assert_allclose(placement.device_load(load_LE).sum(axis=1), load_LE.sum(axis=1), rtol=ROUNDING)
    assert np.any(bound_L > TENTH * mean_L) == (kind in FORBIDDEN[deployment])
    reached_L = fullest_L(placement, load_LE)
    assert np.all(reached_L >= bound_L * (1 - ROUNDING))
    if (deployment, kind) == (EP144, "mild zipf"):
        # Devices of two slots, most with two experts that nobody shares: the bound doesn't see that, nor does any that
        # we know. The greedy way reaches 1.256 of the mean, the search 1.22.
        assert np.all(reached_L < 0.98 * fullest_L(place(load_LE, deployment, "greedy"), load_LE))
        return
    assert np.all(reached_L <= TENTH * bound_L)
    if deployment is EP320:  # one slot a device: the counts decide, and the greedy counts are optimal
        np.testing.assert_allclose(reached_L, bound_L, rtol=ROUNDING)
    if deployment is PREFILL_GLOBAL and kind != "one hot":  # many slots a device, so that loads can be added up finely
        assert np.all(reached_L <= bound_L * 1.001)
    rivals = [fullest(list(load_E), published(list(load_E), deployment.slots, deployment.devices, deployment.nodes,
                                              deployment.groups)) for load_E in load_LE]
    assert np.all(reached_L <= np.array(rivals) * (1 + CLOSE))  # even where those have experts twice on a device


def test_search_where_the_heaviest_replica_is_not_what_counts():
    """A hot expert among others that vary: the greedy way makes the heaviest replica as light as can be, but on devices
    of two slots the pairs count. The search gains 2.3% in the mean of 4 layers; from the greedy start alone, nothing.
    """
    rng = np.random.default_rng(0)
    load_LE = np.where(np.arange(256) == 7, 30, 1) * np.exp(0.2 * rng.standard_normal((4, 256)))
    gain_L = fullest_L(place(load_LE, EP144), load_LE) / fullest_L(place(load_LE, EP144, "greedy"), load_LE)
    assert gain_L.mean() < 0.98


def random_case(rng: np.random.Generator) -> tuple[Deployment, np.ndarray] | None:
    """A small deployment and one layer's loads, where the sizes go together."""
    nodes, per_node, slots_per_device = map(int, rng.integers(1, [5, 5, 6]))
    groups = int(rng.choice([1, nodes, 2 * nodes, 4 * nodes]))
    devices = nodes * per_node
    slots = devices * slots_per_device
    # Mostly a few more slots than experts, as it is in use.
    experts = groups * int(rng.integers(slots // (2 * groups), slots // groups + 1))
    try:
        deployment = Deployment(experts, slots, devices, nodes, groups)
    except ConfigError:
        return None
    load_E = [rng.exponential(size=experts), rng.integers(0, 5, experts).astype(float),
              np.exp(2 * rng.standard_normal(experts)),
              np.where(rng.uniform(size=experts) < 0.2, 20.0, 1.0)][rng.integers(4)]
    return deployment, load_E


def test_never_worse_than_the_published_balancer():
    """Wherever that finds a placement: it may put an expert twice on a device, see below. The greedy way is its own."""
    rng = np.random.default_rng(1)
    compared = {True: 0, False: 0}
    improved = 0
    for deployment, load_E in filter(None, (random_case(rng) for _ in range(950))):
        load_LE = load_E[None]
        found = place(load_LE, deployment)
        check(found)
        ours = fullest_L(found, load_LE)[0]
        assert ours >= lower_bound(load_LE, deployment)[0] * (1 - ROUNDING)
        rival = published(list(load_E), deployment.slots, deployment.devices, deployment.nodes, deployment.groups)
        if any(len(set(device)) < len(device) for device in rival):
            continue
        compared[deployment.is_global] += 1
        theirs = fullest(list(load_E), rival)
        assert ours <= theirs * (1 + ROUNDING)
        assert fullest_L(place(load_LE, deployment, "greedy"), load_LE)[0] == pytest.approx(theirs, rel=ROUNDING)
        improved += ours < 0.999 * theirs
    assert min(compared.values()) > 50
    assert improved > 10


def best_by_trying_all(load_E: np.ndarray, deployment: Deployment) -> float:
    """The least load that a fullest device can have, anywhere."""
    best = np.inf
    sets = list(itertools.combinations(range(deployment.experts), deployment.slots_per_device))
    for devices in itertools.combinations_with_replacement(sets, deployment.devices):
        count_E = np.bincount(np.ravel(devices), minlength=deployment.experts)
        if count_E.all():
            best = min(best, (load_E / count_E)[np.array(devices)].sum(axis=1).max())
    return best


def test_an_expert_twice_on_a_device_can_be_better_and_is_never_done():
    """Three experts on two devices of two slots: one has a replica on both. Twice on one it would be no replica, and
    the slot as good as empty."""
    load_E, deployment = np.array([6.0, 5.0, 1.0]), Deployment(3, 4, devices=2)
    assert published(list(load_E), 4, 2, 1, 1) == [[1, 2], [0, 0]]
    assert fullest_L(place(load_E[None], deployment), load_E[None])[0] == 6.5
    assert best_by_trying_all(load_E, deployment) == 6.5


def test_small_cases_against_all_placements():
    rng = np.random.default_rng(5)
    ratios = []
    while len(ratios) < 60:
        experts, devices, slots = rng.integers([2, 2, 1], [6, 5, 4])
        if not experts <= devices * slots <= experts * devices:
            continue
        deployment, load_E = Deployment(int(experts), int(devices * slots), int(devices)), rng.exponential(size=experts)
        best = best_by_trying_all(load_E, deployment)
        assert lower_bound(load_E[None], deployment)[0] <= best * (1 + ROUNDING)
        ratios.append(fullest_L(place(load_E[None], deployment), load_E[None])[0] / best)
    # Some searches end beside the optimum, in sizes so small that one slot is much.
    assert np.mean(np.array(ratios) < 1 + 2 * CLOSE) > 0.8
    assert max(ratios) < 1.2


@pytest.mark.parametrize(("bins", "room"), [(3, 1), (2, 2), (3, 2), (2, 3), (3, 3)])
def test_bound_on_packings(bins, room):
    """Exact for one and two items a bin; never above the best packing."""
    rng = np.random.default_rng(bins * room)
    for _ in range(10):
        load_I = rng.exponential(size=bins * room)
        best = min(max(load_I[list(order[start:start + room])].sum() for start in range(0, bins * room, room))
                   for order in _packings(tuple(range(bins * room)), room))
        bound = fullest_bin_at_least(load_I, bins)
        assert bound <= best * (1 + ROUNDING)
        assert room > 2 or bound == pytest.approx(best, rel=ROUNDING)


def _packings(items: tuple[int, ...], room: int) -> list[tuple[int, ...]]:
    """All ways to fill bins, one after the other; the first free item begins a bin."""
    if not items:
        return [()]
    return [(items[0], *others, *rest) for others in itertools.combinations(items[1:], room - 1)
            for rest in _packings(tuple(item for item in items[1:] if item not in others), room)]


@pytest.mark.parametrize("deployment", [PREFILL, EP144])
def test_tables_of_replicas(deployment):
    placement = place(loads("zipf"), deployment)
    shape = (LAYERS, 256, deployment.most_replicas)
    assert placement.replica_slots_LER.shape == shape
    for layer, expert, _ in np.ndindex(LAYERS, 256, 1):
        slots = np.flatnonzero(placement.expert_LS[layer] == expert)
        assert placement.replicas_LE[layer, expert] == len(slots)
        padding = [-1] * (deployment.most_replicas - len(slots))
        assert placement.replica_slots_LER[layer, expert].tolist() == [*slots, *padding]
    # Slot by slot, by hand.
    load_LE = loads("zipf")
    each_LE = load_LE / placement.replicas_LE
    by_hand = [sum(each_LE[1, expert] for expert in placement.expert_LMP[1, device]) for device in (0, 5)]
    assert placement.device_load(load_LE)[1, [0, 5]].tolist() == pytest.approx(by_hand, rel=ROUNDING)


def test_packing_makes_way_for_an_item_that_fits_nowhere():
    """When the last item comes, only the first bin has room, and it has one of its kind."""
    load_K, kind_I = np.array([9.0, 3, 3, 3, 1]), np.array([0, 1, 2, 3, 4, 4])
    assert packed(load_K, kind_I, 2).tolist() == [[0, 4, 3], [1, 2, 4]]


def test_groups_are_packed_better_than_greedily():
    """Six groups of one expert, no replicas: 9 + 4 + 2 against 5 + 4 + 2, where 9 + 2 + 2 and 5 + 4 + 4 are equal."""
    load_LE, deployment = np.array([[9.0, 5, 4, 4, 2, 2]]), Deployment(6, 6, devices=2, nodes=2, groups=6)
    assert fullest_L(place(load_LE, deployment, "greedy"), load_LE)[0] == 15
    assert fullest_L(place(load_LE, deployment), load_LE)[0] == 13


def test_equally_full_devices_make_equally_full_nodes():
    """One slot a device, so nothing but which devices make a node is open: two large and two small loads."""
    load_LE = np.array([[8.0, 7.0, 2.0, 1.0]])
    placement = place(load_LE, Deployment(4, 4, devices=4, nodes=2))
    assert placement.device_load(load_LE).reshape(2, 2).sum(axis=1).tolist() == [9.0, 9.0]


@pytest.mark.parametrize(("sizes", "message"), [
    ((256, 290, 32), r"slots \(290\) must be divisible by devices \(32\): take 320 slots"),
    ((256, 224, 32), r"slots \(224\) must be at least experts \(256\)"),
    ((256, 288, 32, 5), r"devices \(32\) must be divisible by nodes \(5\)"),
    ((256, 288, 32, 4, 7), r"experts \(256\) must be divisible by groups \(7\)"),
    ((256, 288, 144, 18, 8), r"groups \(8\) must be divisible by nodes \(18\): .* groups=1"),
    ((2, 9, 3, 3), r"slots \(9\) must be at most 6: .* each of the 3 devices"),
    ((4, 20, 4, 2, 2), r"slots \(20\) must be at most 8: .* each of the 2 devices"),
    ((0, 8, 4), r"experts \(0\) must be at least 1")])
def test_sizes_that_do_not_go_together(sizes, message):
    with pytest.raises(ConfigError, match=message):
        Deployment(*sizes)


@pytest.mark.parametrize(("load", "message"), [
    (np.ones(4), r"shape \(4,\): give \[layers, experts \(4\)\]"), (np.ones((1, 5)), r"shape \(1, 5\)"),
    (np.array([[1, 2, 3, -1.0]]), "not negative"), (np.array([[1, 2, 3, np.nan]]), "finite")])
def test_loads_that_cannot_be(load, message):
    with pytest.raises(ConfigError, match=message):
        place(load, Deployment(4, 4, 2))


def test_no_load_at_all_is_placed():
    placement = place(np.zeros((1, 256)), PREFILL)
    check(placement)
    assert placement.device_load(np.zeros((1, 256))).max() == 0


@pytest.mark.parametrize("deployment", [PREFILL, EP144, EP320, Deployment(6, 12, devices=4), Deployment(6, 6, 3)])
def test_in_order_is_a_placement(deployment):
    placement = Placement.in_order(2, deployment)
    check(placement)
    assert placement.expert_LS.dtype == np.int32
    if deployment.slots == deployment.experts:
        np.testing.assert_array_equal(placement.expert_LS, np.tile(np.arange(deployment.experts), (2, 1)))
