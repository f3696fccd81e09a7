"""Rounds: any routing gives the plain result and gradients, within the quota, in as many rounds as counted by hand."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.expert_parallel.exchange import combine, dispatch
from dsv3_jax.expert_parallel.plan import make_plan
from dsv3_jax.expert_parallel.rounds import Quota, assign_rounds, in_rounds, round_quota
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import EXPERT_AXES, make_mesh
from tests.dsv3_jax.expert_parallel.by_hand import rounds_by_hand

EXPERTS, TOP_K, TOKENS, WIDTH = 16, 3, 16, 4
KINDS = ("random", "skewed", "one expert", "one node", "uneven sources", "masked", "nothing")
ANY = 1e6
"""A capacity factor that makes room for everything."""
# One round on other meshes is dispatch and combine alone, which test_exchange.py tests; factors only change two sizes.
CASES = [((1, 1, 1), 1.0), ((1, 2, 4), 1.0), ((1, 8, 1), 1.0), ((2, 2, 2), 1.25), ((1, 2, 4), ANY),
         *(pytest.param(*case, marks=pytest.mark.slow) for case in [
             ((1, 1, 4), 1.0), ((1, 4, 2), 1.0), ((1, 4, 2), 1.25)])]


def _distinct(rng: np.random.Generator, rows: int, likelihood_E: np.ndarray) -> np.ndarray:
    """int32 [rows, TOP_K]: distinct experts of each token, drawn with the given likelihoods."""
    keys = rng.gumbel(size=(rows, EXPERTS)) + np.log(likelihood_E)
    return np.argsort(-keys, axis=1)[:, :TOP_K].astype(np.int32)


def _routing(kind: str, devices: int) -> np.ndarray:
    """int32 [devices * TOKENS, TOP_K]."""
    rng, rows, even = np.random.default_rng(7), devices * TOKENS, np.ones(EXPERTS)
    choices = _distinct(rng, rows, even)
    if kind == "skewed":
        return _distinct(rng, rows, 1 / np.arange(1, EXPERTS + 1) ** 2)
    if kind == "one expert":
        return np.tile(np.array([EXPERTS - 3, -1, -1], np.int32), (rows, 1))
    if kind == "one node":  # of two, and all of its devices
        return _distinct(rng, rows, np.where(np.arange(EXPERTS) < EXPERTS // 2, 1, 1e-9))
    if kind == "uneven sources":  # the first device's tokens crowd where the others' hardly go
        choices[:TOKENS] = np.arange(TOP_K)
    if kind == "masked":
        choices[rng.uniform(size=choices.shape) < 0.4] = -1
    if kind == "nothing":
        choices[:] = -1
    return choices


def _hashed(rows: int, seed: int) -> np.ndarray:
    """Values that tell their global token and channel, in [-1, 1), so that a misroute can't pass."""
    token, channel = np.mgrid[0:rows, 0:WIDTH].astype(np.uint64)
    mixed = (token * np.uint64(2654435761) + channel * np.uint64(40503) + np.uint64(seed)) * np.uint64(2246822519)
    return ((mixed >> np.uint64(7)) % np.uint64(4093) / 2046.5 - 1).astype(np.float32)


def _one_round(experts, hidden, weights, matrices, *, topology, quota):
    """An expert is tanh(row) times its matrix."""
    plan = make_plan(experts, weights, topology, quota, alignment=4)
    rows = dispatch(hidden, plan)
    expert_P = jnp.searchsorted(jnp.cumsum(plan.group_sizes_E), jnp.arange(rows.shape[0]), side="right")
    outputs = jnp.einsum("pd,pdf->pf", jnp.tanh(rows), jnp.pad(matrices, ((0, 1), (0, 0), (0, 0)))[expert_P])
    delivered = jnp.sum(plan.moves.to_experts.slot_RK >= 0, dtype=jnp.float32)
    return combine(outputs * plan.weights_P[:, None], plan), delivered


def _quota(topology: Topology, factor: float) -> Quota:
    return round_quota(topology, TOKENS, TOP_K, TOP_K, factor)


@functools.cache
def _program(data: int, scale_out: int, scale_up: int, factor: float):
    """(choices, cotangent, hidden, weights, matrices) -> (out, [rounds, choices delivered] of each device), and the
    gradients of the last three."""
    topology = Topology(EXPERTS, scale_out, scale_up)

    def run(experts, *arrays):
        quota = _quota(topology, factor)
        one_round = functools.partial(_one_round, topology=topology, quota=quota)
        out, delivered, plan = in_rounds(one_round, experts, arrays[:2], arrays[2:], topology, quota)
        return out, jnp.stack([plan.rounds, delivered.astype(jnp.int32)])[None]
    tokens, owners = P(("data", "scale_out", "scale_up")), P(("scale_out", "scale_up"))
    devices = data * scale_out * scale_up
    mesh = make_mesh(MeshConfig(data=data, scale_out=scale_out, scale_up=scale_up), jax.devices()[:devices])
    spread = jax.shard_map(run, mesh=mesh, in_specs=(tokens, tokens, tokens, owners), out_specs=(tokens, tokens),
                           check_vma=False)

    def loss(arrays, experts, cotangent):
        out, told = spread(experts, *arrays)
        return jnp.sum(out * cotangent), (out, told)
    return jax.jit(jax.grad(loss, has_aux=True))


def _arguments(kind: str, devices: int):
    rows, rng = devices * TOKENS, np.random.default_rng(3)
    arrays = (_hashed(rows, 1), rng.uniform(0.1, 1, (rows, TOP_K)).astype(np.float32),
              rng.normal(size=(EXPERTS, WIDTH, WIDTH)).astype(np.float32))
    return arrays, _routing(kind, devices), _hashed(rows, 2)


def _plain(arrays, experts, cotangent):
    """The result and the gradients in float64, token by token."""
    hidden, weights, matrices = (x.astype(np.float64) for x in arrays)
    out, grads = np.zeros_like(hidden), [np.zeros_like(x) for x in (hidden, weights, matrices)]
    for (t, k), e in np.ndenumerate(experts):
        if e >= 0:
            x = np.tanh(hidden[t])
            out[t] += weights[t, k] * x @ matrices[e]
            grads[0][t] += weights[t, k] * (matrices[e] @ cotangent[t]) * (1 - x ** 2)
            grads[1][t, k] += x @ matrices[e] @ cotangent[t]
            grads[2][e] += weights[t, k] * np.outer(x, cotangent[t])
    return out, grads


@pytest.mark.parametrize(("mesh", "factor"), CASES, ids=str)
def test_any_routing_gives_the_plain_result_and_gradients(mesh, factor):
    """Float32 against float64: sums of at most 3 terms for tokens, of some hundred O(1) terms for matrices."""
    data, devices = mesh[0], int(np.prod(mesh))
    topology = Topology(EXPERTS, *mesh[1:])
    for kind in KINDS:
        arrays, experts, cotangent = _arguments(kind, devices)
        grads, (out, told) = _program(*mesh, factor)(arrays, experts, cotangent)
        expected, expected_grads = _plain(arrays, experts, cotangent)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-6, err_msg=kind)
        for name, got, want in zip(("hidden", "weights", "matrices"), grads, expected_grads, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * max(1, np.abs(want).max()),
                                       err_msg=f"{kind}: {name}")
        groups = experts.reshape(data, -1, TOKENS, TOP_K)
        counted = [rounds_by_hand(group, topology, _quota(topology, factor))[1] for group in groups]
        assert told[:, 1].sum() == np.sum(experts >= 0)
        np.testing.assert_array_equal(told[:, 0], np.repeat(counted, topology.devices), err_msg=kind)
        if kind == "one expert" and factor < ANY and topology.devices > 1:
            assert counted[0] > 1
        if kind == "nothing" or factor == ANY:
            assert counted[0] == 1


def test_replicas_may_need_different_rounds():
    """The expert-parallel groups of two replicas agree on rounds each for itself."""
    arrays, experts, cotangent = _arguments("masked", 8)
    experts[4 * TOKENS:] = np.arange(TOP_K)  # all on the group's first device
    _, (out, told) = _program(2, 2, 2, 1.25)(arrays, experts, cotangent)
    rounds = told[:, 0]
    assert len(set(np.asarray(rounds)[:4])) == len(set(np.asarray(rounds)[4:])) == 1
    assert rounds[0] != rounds[4]
    np.testing.assert_allclose(out, _plain(arrays, experts, cotangent)[0], rtol=1e-5, atol=2e-6)


def test_repeats_are_bit_identical():
    arguments = _arguments("skewed", 8)
    first, *others = [jax.tree.map(np.asarray, _program(1, 2, 4, 1.0)(*arguments)) for _ in range(5)]
    assert first[1][1][0, 0] > 1
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _assign(experts_NUTK, topology, quota):
    """Every source's rounds, with sources as mapped axes instead of devices."""
    assign = functools.partial(assign_rounds, topology=topology, quota=quota)
    for axis in ("context", "scale_up", "scale_out"):
        assign = jax.vmap(assign, axis_name=axis)
    return assign(experts_NUTK[:, :, None])


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 4), st.floats(0, 0.9), st.sampled_from([
    ((2, 2), Quota(3, 2)), ((2, 2), Quota(8, 5)), ((4, 2), Quota(1, 1)), ((4, 2), Quota(5, 4)), ((8, 1), Quota(3, 4)),
    ((1, 4), Quota(8, 2))]))
def test_assignment_keeps_to_the_quota_and_equals_one_made_by_hand(seed, skew, masked, case):
    (nodes, quota), rng, tokens = case, np.random.default_rng(seed), 8
    topology = Topology(EXPERTS, *nodes)
    likelihood = rng.permutation(1 / np.arange(1, EXPERTS + 1) ** skew)
    experts = _distinct(rng, topology.devices * tokens, likelihood)
    experts[rng.uniform(size=experts.shape) < masked] = -1
    experts_MTK = experts.reshape(topology.devices, tokens, TOP_K)
    plan = _assign(experts.reshape(*nodes, tokens, TOP_K), topology, quota)
    round_MTK = np.asarray(plan.round_TK).reshape(experts_MTK.shape)

    expected, count = rounds_by_hand(experts_MTK, topology, quota)
    np.testing.assert_array_equal(round_MTK, expected)
    assert np.all(np.asarray(plan.rounds) == count)
    assert round_MTK.max(initial=0) < count
    if count == 1:
        return
    for m, i in np.ndindex(topology.devices, count):
        t, k = np.nonzero(round_MTK[m] == i)
        chosen = experts_MTK[m, t, k]
        assert np.bincount(chosen // topology.experts_per_device, minlength=1).max() <= quota.device_choices
        visits = {(int(a), int(n)) for a, n in zip(t, chosen // topology.experts_per_node, strict=True)}
        assert all(sum(n == node for _, n in visits) <= quota.node_rows for node in range(topology.scale_out))


V3 = Topology(256, 8, 8)
V3_TOKENS, V3_TOP_K, V3_REACH = 4096, 8, 4


def test_balanced_routing_takes_one_round():
    """V3's routing (8 of 256 experts, in 4 of 8 groups; paper 2, section 4.2), even, with an eighth of room: some of
    the 64 x 64 pairs of devices exceed it, but no buffer does."""
    rng, tokens = np.random.default_rng(0), 1024
    keys = rng.uniform(size=(64, tokens, 8, 32)).astype(np.float32)
    experts = _best_in_groups(keys, rng.uniform(size=(64, tokens, 8)))
    quota = round_quota(V3, tokens, V3_TOP_K, V3_REACH, 1.125)
    pairs = np.stack([np.bincount(choices.ravel() // 4, minlength=64) for choices in experts])
    assert pairs.max() > quota.device_choices
    plan = _assign(experts.reshape(8, 8, tokens, V3_TOP_K), V3, quota)
    assert np.all(np.asarray(plan.rounds) == 1)
    assert np.all(np.asarray(plan.round_TK) == 0)


def _best_in_groups(keys: np.ndarray, group_keys: np.ndarray) -> np.ndarray:
    """int32 [..., V3_TOP_K]: the largest keys in the groups with the V3_REACH largest group keys."""
    reached = np.argsort(np.argsort(-group_keys, axis=-1), axis=-1) < V3_REACH
    return np.argpartition(-(keys * reached[..., None]).reshape(*keys.shape[:-2], -1), V3_TOP_K,
                           axis=-1)[..., :V3_TOP_K].astype(np.int32)


def test_buffers_hold_the_balanced_load_times_the_factor():
    """At V3's size on 8 x 8 devices, 1.5 makes room for 6T rows after the first hop and 12T after the second."""
    quota = round_quota(V3, V3_TOKENS, V3_TOP_K, V3_REACH, 1.5)
    shapes = {}

    def record(hidden, experts, weights):
        plan = make_plan(experts, weights, V3, quota, alignment=128)
        rows = dispatch(hidden, plan)
        shapes.update(rows=rows.shape[0], node=len(plan.moves.node_hop.copies.choice_S),
                      device=len(plan.moves.device_hop.copies.choice_S))
        return combine(rows, plan)
    tokens = P(EXPERT_AXES)
    mesh = AbstractMesh((8, 4, 2), EXPERT_AXES, axis_types=(AxisType.Auto,) * 3)
    jax.eval_shape(jax.shard_map(record, mesh=mesh, in_specs=(tokens,) * 3, out_specs=tokens, check_vma=False),
                   jax.ShapeDtypeStruct((64 * V3_TOKENS, 7168), jnp.bfloat16),
                   jax.ShapeDtypeStruct((64 * V3_TOKENS, V3_TOP_K), jnp.int32),
                   jax.ShapeDtypeStruct((64 * V3_TOKENS, V3_TOP_K), jnp.float32))
    assert shapes["node"] == 6 * V3_TOKENS
    assert shapes["device"] == 12 * V3_TOKENS
    assert shapes["rows"] <= 12 * V3_TOKENS + V3.experts_per_device * 128


@pytest.mark.parametrize(("nodes", "tokens", "reach", "factor", "expected"), [
    ((1, 1), 10, 3, 1.0, Quota(10, 30)),  # one device: the exact worst case
    ((1, 4), 10, 3, 1.0, Quota(10, 8)),  # no first hop
    ((4, 2), 10, 2, 1.0, Quota(5, 4)),
    ((4, 2), 10, 3, 1.5, Quota(10, 6)),  # 12 rows a node, but there are 10 tokens
    ((4, 2), 10, 2, ANY, Quota(10, 20)),  # a token has at most 2 experts on a device
])
def test_quota(nodes, tokens, reach, factor, expected):
    topology = Topology(EXPERTS, *nodes)
    quota = round_quota(topology, tokens, TOP_K, reach, factor)
    assert quota == expected
    assert quota.is_never_exceeded(topology, tokens, TOP_K) == (factor == ANY or nodes == (1, 1))
