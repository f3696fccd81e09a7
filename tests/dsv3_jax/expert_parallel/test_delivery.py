"""Every row lands where it should and only there, in every type it travels in; sums come home bit for bit.

A row's values are a hash of its global token and channel, so a misroute cannot pass.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import MeshConfig
from dsv3_jax.expert_parallel.exchange import Wire, combine, dispatch, row_bytes
from dsv3_jax.expert_parallel.plan import Traffic, make_plan, traffic
from dsv3_jax.expert_parallel.rounds import Quota
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import EXPERT_AXES, make_mesh
from dsv3_jax.precision.quantised import ROW, Carried, Quantised
from tests.dsv3_jax.expert_parallel.by_hand import traffic_by_hand

TOKENS, WIDTH = 16, 136
"""Of one device; a tile and a part of one."""
DEVICES = 8
BF16 = ml_dtypes.bfloat16


def payload(tokens: int, seed: int = 0) -> np.ndarray:
    """bf16 in [-1, 1)."""
    token, channel = np.mgrid[0:tokens, 0:WIDTH].astype(np.uint64)
    mixed = (token * np.uint64(2654435761) + channel * np.uint64(40503) + np.uint64(seed)) * np.uint64(2246822519)
    return ((mixed >> np.uint64(7)) % np.uint64(4093) / 2046.5 - 1).astype(BF16)


def choices(kind: str, experts: int, top_k: int) -> np.ndarray:
    """int32 [DEVICES * TOKENS, top_k], distinct experts of each token; -1 is none."""
    rng, rows = np.random.default_rng(top_k), DEVICES * TOKENS
    chosen = np.argsort(rng.random((rows, experts)), axis=1)[:, :top_k].astype(np.int32)
    if kind == "one expert":
        chosen[:, 1:], chosen[:, 0] = -1, experts - 3
    if kind == "one device":
        chosen[:] = experts // 2 + np.arange(top_k)
    if kind == "masked":
        chosen[rng.random(chosen.shape) < 0.4] = -1
    if kind == "uneven":  # ranks with few tokens, and one with none
        for rank in range(DEVICES):
            chosen[rank * TOKENS + rank * 2:(rank + 1) * TOKENS] = -1
    return chosen


def program_on(topology: Topology, function):
    mesh = make_mesh(MeshConfig(scale_out=topology.scale_out, scale_up=topology.scale_up))
    spread = P(EXPERT_AXES)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spread, out_specs=spread, check_vma=False))


def run_on(topology: Topology, function, *arrays, times: int = 1):
    """`function` of each device's rows; its results side by side, the same each time."""
    program = program_on(topology, function)
    first, *others = (jax.tree.map(np.asarray, program(*arrays)) for _ in range(times))
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, first, other)
    return first


def quota(top_k: int) -> Quota:
    """Room for any routing in one round."""
    return Quota(TOKENS, TOKENS * top_k)


def lexicographic(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T[::-1])]


CASES = [("even", 256, 8, (2, 4)), ("even", 288, 9, (4, 2)), ("even", 256, 6, (1, 8)), ("uneven", 288, 8, (8, 1)),
         ("masked", 256, 8, (2, 4)), ("one expert", 256, 8, (4, 2)), ("one device", 288, 9, (2, 4))]


# Each case is a program. What float8 changes is the payload, and not where it goes.
@pytest.mark.parametrize(("kind", "experts", "top_k", "sizes", "sent"), [
    *((*case, "plain") for case in CASES),
    *(pytest.param(*case, "float8", marks=[] if case in CASES[3:5] else pytest.mark.slow) for case in CASES)], ids=str)
def test_each_expert_gets_its_tokens_and_no_others(kind, experts, top_k, sizes, sent):
    topology, chosen = Topology(experts, *sizes), choices(kind, experts, top_k)
    hidden, weights = payload(len(chosen)), np.random.default_rng(1).random(chosen.shape, np.float32)

    def receive(hidden, experts, weights):
        plan = make_plan(experts, weights, topology, quota(top_k), alignment=4)
        rows = dispatch(hidden, plan, Wire(dispatch=sent))
        rows = rows.quantised.dequantise() if isinstance(rows, Carried) else rows
        return rows.astype(jnp.float32), plan.weights_P, plan.group_sizes_E
    rows, row_weights, sizes_E = run_on(topology, receive, hidden, chosen, weights)
    expected = hidden.astype(np.float32)
    if sent == "float8":
        expected = np.asarray(Quantised.of(jnp.asarray(hidden), ROW, power_of_two=True).dequantise())
    here = topology.experts_per_device
    for device, (held, held_weights, sizes) in enumerate(zip(
            np.split(rows, DEVICES), np.split(row_weights, DEVICES), np.split(sizes_E, DEVICES), strict=True)):
        start = 0
        for expert, size in enumerate(sizes, device * here):
            token, k = np.nonzero(chosen == expert)
            assert len(token) <= size < len(token) + 4
            got = np.column_stack([held, held_weights])[start:start + size]
            want = np.zeros_like(got)
            want[:len(token)] = np.column_stack([expected[token], weights[token, k]])
            np.testing.assert_array_equal(lexicographic(got), lexicographic(want))
            start += size
        assert not np.any(held[start:])


def rounded(x: np.ndarray, dtype) -> np.ndarray:
    return x.astype(dtype).astype(np.float32)


def in_order(terms: list[np.ndarray], dtype=np.float32) -> np.ndarray:
    """The float32 sum from left to right, rounded once."""
    return rounded(functools.reduce(np.add, terms, np.zeros(WIDTH, np.float32)), dtype)


def by_owner(members: list[int], per_owner: int, in_owners_order: bool) -> list[list[int]]:
    """Experts of each owner of `per_owner` experts."""
    owners = list(dict.fromkeys(expert // per_owner for expert in members))
    return [[expert for expert in members if expert // per_owner == owner]
            for owner in (sorted(owners) if in_owners_order else owners)]


def summed_by_level(chosen: np.ndarray, output, topology: Topology, between) -> np.ndarray:
    """float32 [T, D]: of each token, experts on their device, devices in their node, nodes at home, rounded on wires.

    Experts are added in the order of the token's choices. So are devices and nodes where they are more than the
    choices, else in their own order.
    """
    top_k, out = chosen.shape[1], np.zeros((len(chosen), WIDTH), np.float32)
    after_device = between if topology.devices > 1 else np.float32
    after_node = between if topology.scale_out > 1 else np.float32
    for token, experts in enumerate(chosen):
        nodes = []
        for in_node in by_owner([e for e in experts if e >= 0], topology.experts_per_node, topology.scale_out <= top_k):
            devices = [in_order([output(token, e) for e in on_device], after_device) for on_device
                       in by_owner(in_node, topology.experts_per_device, topology.scale_up <= top_k)]
            nodes.append(in_order(devices, after_node) if topology.scale_up > 1 else devices[0])
        out[token] = in_order(nodes)
    return out


@pytest.mark.parametrize(("sizes", "wire"), [
    ((2, 4), "plain"), ((4, 2), "float32"), ((1, 8), "plain"), ((8, 1), "float32"),
    *(pytest.param(*case, marks=pytest.mark.slow)
      for case in [((2, 4), "float32"), ((4, 2), "plain"), ((1, 8), "float32"), ((8, 1), "plain")])], ids=str)
def test_sums_come_home_bit_for_bit_each_time(sizes, wire):
    """Expert to node to home, float32 at each level and rounded to bf16 between them, or not at all."""
    experts, top_k = 64, 8
    topology, chosen = Topology(experts, *sizes), choices("masked", experts, top_k)
    gain = np.random.default_rng(2).normal(size=experts).astype(np.float32)
    hidden = payload(len(chosen))

    def there_and_back(hidden, experts):
        plan = make_plan(experts, jnp.ones(experts.shape, jnp.float32), topology, quota(top_k))
        rows = dispatch(hidden, plan)
        here = topology.experts_per_device
        first = here * jax.lax.axis_index(EXPERT_AXES)
        expert_P = jnp.searchsorted(jnp.cumsum(plan.group_sizes_E), jnp.arange(len(rows)), side="right")
        scale_P = jnp.asarray(gain)[jnp.minimum(first + expert_P, len(gain) - 1)]
        return combine((rows.astype(jnp.float32) * scale_P[:, None]).astype(jnp.bfloat16), plan, Wire(combine=wire))
    got = run_on(topology, there_and_back, hidden, chosen, times=20)

    def output(token, expert):
        return rounded(hidden[token].astype(np.float32) * gain[expert], BF16)
    want = summed_by_level(chosen, output, topology, BF16 if wire == "plain" else np.float32)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bits", [6, 10])
def test_sums_travel_home_in_logfmt(bits):
    """Each sum is rounded on both wires, by half a step at most: max/min of 2^32 in 2^(bits-1) - 2 steps, so values are
    the plain ones within that much of the sums' magnitudes. The wire carries codes and ends; their bytes are told."""
    topology, chosen = Topology(64, 2, 4), choices("masked", 64, 8)
    hidden, wire = payload(len(chosen)), Wire(combine=f"logfmt{bits}")

    def there_and_back(hidden, experts):
        plan = make_plan(experts, jnp.ones(experts.shape, jnp.float32), topology, quota(8))
        rows = dispatch(hidden, plan)
        out, pull = jax.vjp(lambda rows: combine(rows, plan, wire), rows)
        return out, combine(rows, plan, Wire()), pull(out)[0].astype(jnp.float32) - dispatch(
            out.astype(rows.dtype), plan).astype(jnp.float32)
    got, plain, difference = run_on(topology, there_and_back, hidden, chosen)
    half_a_step = (2.0 ** (32 / (2 ** (bits - 1) - 2)) - 1) / 2
    magnitude = np.abs(hidden.astype(np.float32)) * (chosen >= 0).sum(axis=1, keepdims=True)
    assert np.all(np.abs(got - plain) <= 2.5 * half_a_step * magnitude + 1e-6)
    assert 0.01 * half_a_step < np.mean(np.abs(got - plain)) / np.mean(magnitude) < half_a_step
    assert not np.any(difference)  # gradients pass the rounding, and travel as other gradients do
    assert row_bytes(7168, 2, wire).combine == 56 * (16 * bits + 4)


def test_gradients_of_outputs_travel_in_float8():
    """The backward of combine: each expert row gets its token's gradient, rounded once, at home."""
    topology, chosen = Topology(16, 2, 4), choices("masked", 16, 3)
    cotangent = payload(len(chosen), seed=3)

    def gradients(cotangent, experts):
        plan = make_plan(experts, jnp.ones(experts.shape, jnp.float32), topology, quota(3))
        like = dispatch(cotangent, plan)
        quantised = Quantised.of(cotangent, ROW, power_of_two=True).dequantise(jnp.bfloat16)
        _, pull = jax.vjp(lambda outputs: combine(outputs, plan, Wire(gradients="float8")), like)
        return pull(cotangent.astype(jnp.float32))[0], dispatch(quantised, plan)
    got, want = run_on(topology, gradients, cotangent, chosen)
    np.testing.assert_array_equal(got, want)


def test_dispatch_in_float8_hands_gradients_back():
    """They come home as from a plain dispatch: its own rounding counts as the identity."""
    topology, chosen = Topology(16, 2, 4), choices("even", 16, 3)
    hidden = payload(len(chosen))

    def gradients(hidden, experts):
        plan = make_plan(experts, jnp.ones(experts.shape, jnp.float32), topology, quota(3))

        def of(wire):
            rows, pull = jax.vjp(lambda hidden: dispatch(hidden, plan, wire), hidden)
            cotangent = dispatch(hidden * 3, plan)
            if isinstance(rows, Carried):
                return pull(Carried(jax.tree.map(jnp.zeros_like, rows.quantised), cotangent))[0]
            return pull(cotangent)[0]
        return of(Wire(dispatch="float8")), of(Wire())
    got, want = run_on(topology, gradients, hidden, chosen)
    np.testing.assert_array_equal(got, want)
    assert np.any(want)


@functools.cache
def _count(topology: Topology):
    """Compiled: choices -> traffic as it is told, and rows sent at either hop, of each device."""
    def count(experts):
        plan = make_plan(experts, jnp.ones(experts.shape, jnp.float32), topology, quota(8))
        sent = []
        for hop, axis in ((plan.moves.node_hop, "scale_out"), (plan.moves.device_hop, ("scale_up", "context"))):
            sent.append(jnp.zeros(()) if hop is None else
                        jnp.sum(hop.sent_N) - hop.sent_N[jax.lax.axis_index(axis)].astype(jnp.float32))
        delivered = jnp.sum(plan.moves.to_experts.slot_RK >= 0, dtype=jnp.float32)
        told = traffic(experts, jnp.zeros_like(experts), delivered, topology)
        return jax.tree.map(lambda x: x[None], (told, *sent))
    return program_on(topology, count)


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2), (1, 8), (8, 1)], ids=str)
@pytest.mark.parametrize("kind", ["even", "masked", "uneven", "one device"])
def test_traffic_is_what_hops_send(kind, sizes):
    """Counted by hand, and equal to the rows that the plan sends off this device, at both hops."""
    topology, chosen = Topology(64, *sizes), choices(kind, 64, 8)
    told, node_rows, device_rows = jax.tree.map(np.asarray, _count(topology)(chosen))
    counted = traffic_by_hand(*(x.reshape(DEVICES, TOKENS, -1) for x in (chosen, np.zeros_like(chosen))), topology)
    assert Traffic(*(part.sum() for part in told)) == counted
    assert (node_rows.sum(), device_rows.sum()) == (counted.scale_out_rows, counted.scale_up_rows)
