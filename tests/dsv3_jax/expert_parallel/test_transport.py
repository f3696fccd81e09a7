"""Transports agree. XLA's ragged exchange does not run on CPU, so here it is its documented meaning that runs, and its
program is compiled for the machines that have it."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.codesign.pods import parse_pod, pod_mesh
from dsv3_jax.config import MeshConfig
from dsv3_jax.expert_parallel.exchange import Wire, combine, dispatch
from dsv3_jax.expert_parallel.plan import make_plan
from dsv3_jax.expert_parallel.rounds import Quota
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import EXPERT_AXES, make_mesh
from dsv3_jax.precision.quantised import Carried
from tests.dsv3_jax.expert_parallel.ragged_exchange import ragged_all_to_all

EXPERTS, TOP_K, TOKENS, WIDTH = 32, 4, 16, 256
ROOM = Quota(TOKENS, TOKENS * TOP_K)


def there_and_back(topology: Topology, wire: Wire):
    """(hidden, experts, weights) -> what comes home, and the gradients of hidden and weights."""
    def run(hidden, experts, weights):
        def of(hidden, weights):
            plan = make_plan(experts, weights, topology, ROOM, alignment=8)
            rows = dispatch(hidden, plan, wire)
            if isinstance(rows, Carried):
                rows = rows.quantised.dequantise(hidden.dtype) + rows.carrier
            return combine((jnp.sin(rows.astype(jnp.float32)) * plan.weights_P[:, None]).astype(rows.dtype), plan, wire)
        out, pull = jax.vjp(of, hidden, weights)
        return out, *pull(jnp.cos(out))
    return run


def arguments(devices: int):
    rng, rows = np.random.default_rng(0), devices * TOKENS
    experts = np.argsort(rng.random((rows, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    experts[rng.random(experts.shape) < 0.3] = -1
    return (jnp.asarray(rng.normal(size=(rows, WIDTH)), jnp.bfloat16), experts,
            rng.random(experts.shape, np.float32))


@pytest.mark.parametrize("sizes", [(2, 4), pytest.param((1, 8), marks=pytest.mark.slow),
                                   pytest.param((8, 1), marks=pytest.mark.slow)], ids=str)
def test_transports_agree_in_float8(sizes, monkeypatch):
    """Bit for bit. (In float32 the whole layer's slow tests tell it, tests/dsv3_jax/nn/test_moe.py. The Pallas kernels
    themselves are compared with their reference where they are tested.)"""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    topology, spread = Topology(EXPERTS, *sizes), P(EXPERT_AXES)
    mesh = make_mesh(MeshConfig(scale_out=sizes[0], scale_up=sizes[1]))

    def result(transport):
        run = there_and_back(topology, Wire("float8", "float8", transport=transport))
        return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spread,) * 3, out_specs=spread,
                                     check_vma=False))(*arguments(8))
    padded = result("padded")
    jax.tree.map(np.testing.assert_array_equal, result("ragged"), padded)
    jax.tree.map(np.testing.assert_array_equal, result("pallas"), padded)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax_cuda13_plugin") is None,
                    reason="needs the extra `aot`")
@pytest.mark.parametrize("pod", ["h100:2x8", pytest.param("v5p:2x2x2,slices=2", marks=pytest.mark.slow)])
def test_ragged_compiles(pod):
    """Rows travel by ragged exchanges alone: what is padded are the plan's few numbers."""
    mesh = pod_mesh(parse_pod(pod), MeshConfig(scale_out=2, scale_up=8))
    at = NamedSharding(mesh, P(EXPERT_AXES))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at) for x in arguments(16)]
    run = there_and_back(Topology(EXPERTS, 2, 8), Wire("float8", "float8", transport="ragged"))
    with jax.set_mesh(mesh):
        text = jax.jit(jax.shard_map(run, in_specs=(P(EXPERT_AXES),) * 3, out_specs=P(EXPERT_AXES),
                                     check_vma=False)).lower(*shapes).compile().as_text()
    assert "ragged-all-to-all" in text
    exchanged = [line for line in text.splitlines() if " all-to-all" in line]
    assert not any(f",{WIDTH}]" in line.split(" all-to-all")[0] for line in exchanged)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None or importlib.util.find_spec("jax_cuda13_plugin") is None,
                    reason="needs the extra `aot`")
@pytest.mark.parametrize(("pod", "kernel"), [
    pytest.param("h100:2x8", "mosaic_gpu", marks=pytest.mark.slow), ("v5p:2x2x2,slices=2", "tpu_custom_call")])
def test_kernels_carry_rows_inside_nodes(pod, kernel):
    """Out, its gradient's way home, home, and its gradient's way out; between nodes it is XLA's exchange."""
    mesh = pod_mesh(parse_pod(pod), MeshConfig(scale_out=2, scale_up=8))
    at, width = NamedSharding(mesh, P(EXPERT_AXES)), 1024
    hidden, experts, weights = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at) for x in arguments(16))
    shapes = [jax.ShapeDtypeStruct((hidden.shape[0], width), hidden.dtype, sharding=at), experts, weights]
    run = there_and_back(Topology(EXPERTS, 2, 8), Wire(transport="pallas"))
    with jax.set_mesh(mesh):
        text = jax.jit(jax.shard_map(run, in_specs=(P(EXPERT_AXES),) * 3, out_specs=P(EXPERT_AXES),
                                     check_vma=False)).lower(*shapes).compile().as_text()
    assert len([line for line in text.splitlines() if f'custom_call_target="{kernel}' in line]) >= 4
    # 2 x 16 slots between nodes, 8 x 32 inside.
    exchanged = [line for line in text.splitlines() if " all-to-all" in line]
    assert not any(f"[256,{width}]" in line for line in exchanged)
