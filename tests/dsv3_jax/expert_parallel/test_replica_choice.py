"""Which replica a token goes to: one that holds its expert, in equal shares, whatever it is batched with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.expert_parallel.replica_choice import choose_replicas
from dsv3_jax.expert_parallel.replicas import Deployment, Placement, place

EXPERTS, TOP_K = 32, 4


@pytest.fixture(scope="module")
def placement() -> Placement:
    """Some experts have one replica, some many."""
    placement = place(1 / np.arange(1.0, EXPERTS + 1)[None], Deployment(EXPERTS, 64, devices=16))
    assert placement.replicas_LE.min() == 1
    assert placement.replicas_LE.max() >= 8
    return placement


def chosen(placement: Placement, experts_TK: np.ndarray, number_T: np.ndarray) -> np.ndarray:
    tables = jnp.asarray(placement.replicas_LE[0]), jnp.asarray(placement.replica_slots_LER[0])
    return np.asarray(jax.jit(choose_replicas)(jnp.asarray(experts_TK, jnp.int32), jnp.asarray(number_T), *tables))


def test_slots_hold_the_chosen_experts(placement):
    experts_TK = np.random.default_rng(0).integers(-1, EXPERTS, (500, TOP_K))
    slots_TK = chosen(placement, experts_TK, np.arange(500) * 2 ** 22)  # past 2^31: numbers wrap
    np.testing.assert_array_equal(np.where(slots_TK < 0, -1, placement.expert_LS[0, slots_TK]), experts_TK)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 16, 128, 4096])
def test_runs_of_tokens_are_shared_evenly(placement, step):
    """All tokens choose every expert. Multiples of the golden ratio miss the even share by a logarithm of their number,
    with a step as well if it isn't near a multiple of a period; draws by lot would by its root, 30."""
    tokens = 1000
    for start in (0, 12_345):
        slots_TK = chosen(placement, np.tile(np.arange(EXPERTS), (tokens, 1)), start + step * np.arange(tokens))
        shares_S = np.bincount(slots_TK.ravel(), minlength=placement.deployment.slots)
        even_S = tokens / placement.replicas_LE[0, placement.expert_LS[0]]
        assert np.max(np.abs(shares_S - even_S)) <= np.log(tokens)


def test_tokens_here_and_there_are_shared_as_by_lot(placement):
    """The tokens that choose an expert are one in eight; beyond 5 deviations is one draw in two million."""
    experts_TK = np.argsort(np.random.default_rng(1).uniform(size=(40_000, EXPERTS)), axis=1)[:, :TOP_K]
    shares_S = np.bincount(chosen(placement, experts_TK, np.arange(40_000)).ravel(),
                           minlength=placement.deployment.slots)
    count_S = placement.replicas_LE[0, placement.expert_LS[0]]
    tokens_S = np.bincount(experts_TK.ravel(), minlength=EXPERTS)[placement.expert_LS[0]]
    deviation_S = np.sqrt(tokens_S / count_S * (1 - 1 / count_S))
    assert np.all(np.abs(shares_S - tokens_S / count_S) <= 5 * deviation_S)


def test_what_else_is_in_the_batch_does_not_matter(placement):
    rng = np.random.default_rng(2)
    experts_TK, number_T = rng.integers(0, EXPERTS, (64, TOP_K)), rng.integers(0, 10_000, 64)
    some = rng.permutation(64)[:20]
    np.testing.assert_array_equal(chosen(placement, experts_TK[some], number_T[some]),
                                  chosen(placement, experts_TK, number_T)[some])


def test_first_replicas_of_experts_get_different_tokens():
    """Every token goes to the first of two replicas for about half of the experts, not for all or none."""
    placement = place(np.ones((1, EXPERTS)), Deployment(EXPERTS, 2 * EXPERTS, devices=16))
    first_TK = chosen(placement, np.tile(np.arange(EXPERTS), (1000, 1)), np.arange(1000)
                      ) == placement.replica_slots_LER[0, :, 0]
    share_T = first_TK.mean(axis=1)
    assert 0.4 < share_T.min() <= share_T.max() < 0.6
