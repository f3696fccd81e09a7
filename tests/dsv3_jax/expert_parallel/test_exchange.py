"""Dispatch and combine: every row reaches each of its experts, nothing is lost, and gradients are exact."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.expert_parallel.exchange import combine, dispatch
from dsv3_jax.expert_parallel.permutation import copy_to_slots, permutation, sum_from_slots
from dsv3_jax.expert_parallel.plan import make_plan
from dsv3_jax.expert_parallel.rounds import Quota
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import BATCH_AXES, EXPERT_AXES, make_mesh

EXPERTS, TOP_K, TOKENS, WIDTH = 16, 3, 64, 8
MESHES = [(1, 1, 1), (2, 4, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2),
          *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(4, 2, 1), (2, 2, 1), (1, 1, 4)])]
ALL = Quota(TOKENS, TOKENS * TOP_K)
"""Room for any routing in one round."""


def _choices(kind: str) -> np.ndarray:
    """[TOKENS, TOP_K] distinct experts a token."""
    rng = np.random.default_rng(0)
    if kind == "random":
        return np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    if kind == "all to the same experts":
        return np.tile(np.arange(TOP_K), (TOKENS, 1))
    first = rng.integers(0, 2, (TOKENS, 1)) * 8  # "one node": neighbours, so that nodes see several choices of a token
    return first + np.arange(TOP_K)


def _payload(seed: int = 0) -> np.ndarray:
    """Each value tells its token and channel, so that a misroute can't pass."""
    token, channel = np.mgrid[0:TOKENS, 0:WIDTH]
    return ((token * 7919 + channel * 104729 + seed) % 1009 / 1009).astype(np.float32)


def _moe(hidden, experts, weights, scale_E, *, topology, alignment):
    """An expert multiplies by its own number: enough to see who got what."""
    plan = make_plan(experts, weights, topology, ALL, alignment)
    rows = dispatch(hidden, plan)
    ends = jnp.cumsum(plan.group_sizes_E)
    expert_P = jnp.searchsorted(ends, jnp.arange(rows.shape[0]), side="right")
    return combine(rows * (jnp.append(scale_E, 0)[expert_P] * plan.weights_P)[:, None], plan)


TOKENS_AXES = P((*BATCH_AXES, "context"))


def _on_mesh(scale_out: int, scale_up: int, context: int, alignment: int):
    topology = Topology(EXPERTS, scale_out, scale_up * context)
    run = functools.partial(_moe, topology=topology, alignment=alignment)
    if topology.devices == 1:
        return run
    mesh = make_mesh(MeshConfig(scale_out=scale_out, scale_up=scale_up, context=context))
    return jax.shard_map(run, mesh=mesh, in_specs=(*[TOKENS_AXES] * 3, P(EXPERT_AXES)), out_specs=TOKENS_AXES,
                         check_vma=False)


@functools.cache
def _program(*sizes: int):
    """(arrays, experts, cotangent) -> (loss, result), gradients of the arrays: hidden, weights and scale."""
    def loss(arrays, experts, cotangent):
        hidden, weights, scale = arrays
        out = _on_mesh(*sizes, 4)(hidden, experts, weights, scale)
        return jnp.sum(out * cotangent), out
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("kind", ["random", "all to the same experts", "one node"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_choice_is_computed_and_brought_home(sizes, kind):
    rng = np.random.default_rng(1)
    experts, hidden = _choices(kind), _payload()
    weights = rng.uniform(0.1, 1, experts.shape).astype(np.float32)
    scale = np.arange(1, EXPERTS + 1, dtype=np.float32)
    cotangent = _payload(seed=5)
    (_, out), grads = _program(*sizes)((hidden, weights, scale), experts, cotangent)

    gain = (weights * scale[experts]).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out, hidden * gain, rtol=1e-6)
    dot = (hidden * cotangent).sum(axis=1, keepdims=True)
    expected_scale = np.zeros(EXPERTS)
    np.add.at(expected_scale, experts, weights * dot)
    np.testing.assert_allclose(grads[0], cotangent * gain, rtol=1e-5)
    np.testing.assert_allclose(grads[1], dot * scale[experts], rtol=1e-5)
    np.testing.assert_allclose(grads[2], expected_scale, rtol=1e-5)


@functools.partial(jax.jit, static_argnums=2)
def _there_and_back(bucket, starts, slots, data):
    plan = permutation(bucket, starts, slots)
    return plan, sum_from_slots(copy_to_slots(data, plan), plan)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(1, 1, 1), (9, 3, 4), (12, 2, 6)]), st.sampled_from([1, 4]))
def test_permutation_places_each_choice_once_in_its_bucket(seed, shape, alignment):
    rng, (rows, choices, buckets) = np.random.default_rng(seed), shape
    bucket = rng.integers(0, buckets + 1, (rows, choices)).astype(np.int32)
    counts = np.bincount(bucket.ravel(), minlength=buckets + 1)[:buckets]
    sizes = -(-counts // alignment) * alignment
    starts = np.cumsum(sizes) - sizes
    data = rng.normal(size=(rows, 2)).astype(np.float32)
    plan, back = _there_and_back(bucket, starts.astype(np.int32), rows * choices + buckets * alignment, data)
    slot, choice = np.asarray(plan.slot_RK), np.asarray(plan.choice_S)
    assert np.array_equal(slot < 0, bucket == buckets)
    for (r, k), s in np.ndenumerate(slot):
        if s >= 0:
            assert choice[s] == r * choices + k
            assert starts[bucket[r, k]] <= s < starts[bucket[r, k]] + counts[bucket[r, k]]
    assert (choice >= 0).sum() == (slot >= 0).sum()
    np.testing.assert_allclose(back, data * (slot >= 0).sum(axis=1, keepdims=True), rtol=1e-6)


def test_slow_network_carries_one_row_for_a_token_and_node():
    """The first hop sends each (token, node) pair exactly once, however many experts the token has there."""
    experts = _choices("random")
    topology = Topology(EXPERTS, 4, 2)
    mesh = make_mesh(MeshConfig(scale_out=4, scale_up=2))

    def sent(experts, weights):
        moves = make_plan(experts, weights, topology, ALL).moves
        for hop in (moves.node_hop, moves.device_hop):
            assert hop.copies.choice_S.shape[0] % hop.sent_N.shape[0] == 0
        return moves.node_hop.sent_N, moves.device_hop.sent_N
    node_rows, device_rows = jax.jit(jax.shard_map(
        sent, mesh=mesh, in_specs=(TOKENS_AXES,) * 2, out_specs=(TOKENS_AXES,) * 2, check_vma=False))(
        jnp.asarray(experts), jnp.ones(experts.shape, jnp.float32))
    assert node_rows.sum() == sum(len(set(row // 4)) for row in experts)
    assert device_rows.sum() == sum(len(set(row // 2)) for row in experts)
