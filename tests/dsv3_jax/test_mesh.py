"""The mesh lays its axes on the right network, and weights on the right axes."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.mesh import (
    AXES,
    COMPUTE,
    EXPERT_AXES,
    SPREAD,
    STORAGE,
    _arrange,
    _gather_steps,
    make_mesh,
    partition_spec,
)
from dsv3_jax.nn.model import split_model
from dsv3_jax.presets import RUNS


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as the arrangement looks at."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"


def _hosts(hosts: int, size: int) -> list[Device]:
    return [Device(host * size + i, host) for host in range(hosts) for i in range(size)]


@pytest.mark.parametrize(("hosts", "size", "shape"), [
    (256, 8, (16, 2, 8, 8, 1)), (8, 8, (1, 1, 8, 8, 1)), (2, 4, (1, 1, 2, 4, 1)), (4, 8, (1, 2, 4, 4, 1)),
    (4, 8, (2, 2, 1, 8, 1)), (2, 8, (1, 4, 2, 2, 1)), (1, 8, (1, 1, 2, 4, 1)), (3, 4, (1, 3, 1, 4, 1)),
    (256, 8, (1, 32, 8, 4, 2)), (8, 8, (1, 2, 4, 1, 8)), (2, 4, (1, 2, 1, 2, 2)), (1, 8, (1, 2, 1, 2, 2))])
def test_scale_up_and_context_stay_inside_a_host(hosts, size, shape):
    devices = _hosts(hosts, size)
    grid = _arrange(list(reversed(devices)), shape)
    assert grid.shape == shape
    assert {d.id for d in grid.flat} == set(range(hosts * size))
    for fast in grid.reshape(-1, shape[3] * shape[4]):
        assert len({d.process_index for d in fast}) == 1
    for sharing in grid.reshape(-1, shape[4]):  # neighbours share a sequence
        assert max(d.id for d in sharing) - min(d.id for d in sharing) == shape[4] - 1
    if hosts % shape[2] == 0:  # every node of an expert-parallel group is another host
        for group in grid.reshape(-1, *shape[2:]):
            assert len({d.process_index for d in group.flat}) == shape[2]


def test_slices_count_before_hosts():
    """One process a GPU, as Slurm likes it: the slice index tells the node."""
    devices = [Device(i, process_index=i, slice_index=i // 4) for i in range(8)]
    grid = _arrange(devices, (1, 1, 2, 4, 1))
    assert [[d.slice_index for d in row.flat] for row in grid[0, 0]] == [[0] * 4, [1] * 4]


@pytest.mark.parametrize(("hosts", "size", "shape", "fast"), [
    (4, 2, (1, 1, 2, 4, 1), "mesh.scale_up (4)"), (2, 4, (1, 1, 1, 8, 1), "mesh.scale_up (8)"),
    (2, 4, (1, 1, 1, 4, 2), "mesh.scale_up*mesh.context (4*2=8)"),
    (4, 2, (1, 2, 1, 1, 4), "mesh.scale_up*mesh.context (1*4=4)")])
def test_a_fast_group_over_hosts_is_refused(hosts, size, shape, fast):
    with pytest.raises(ConfigError, match=re.escape(f"{fast} does not fit inside one fast domain of {size} devices")):
        _arrange(_hosts(hosts, size), shape)


def test_unequal_hosts_are_refused():
    with pytest.raises(ConfigError, match="unequal sizes"):
        _arrange([Device(0, 0), Device(1, 0), Device(2, 1)], (1, 3, 1, 1, 1))


def test_a_transport_that_a_cpu_has_not_is_refused():
    with pytest.raises(ConfigError, match=re.escape("mesh.transport (ragged)")):
        make_mesh(MeshConfig(transport="ragged"))


def test_mesh_takes_the_devices_left_for_data(eight_devices):
    assert dict(make_mesh(MeshConfig(scale_up=2)).shape) == {
        "pipe": 1, "data": 4, "scale_out": 1, "scale_up": 2, "context": 1}
    assert dict(make_mesh(MeshConfig(scale_up=2, context=2)).shape) == {
        "pipe": 1, "data": 2, "scale_out": 1, "scale_up": 2, "context": 2}


def _mesh(*sizes: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh(sizes, AXES)


ALL = ("scale_up", "scale_out", "data")


@pytest.mark.parametrize(("axes", "shape", "table", "expected", "context"), [
    (("expert", "embed", "mlp"), (256, 7168, 4096), STORAGE, P(("scale_out", "scale_up"), ("data",), None), 1),
    (("expert", "embed", "mlp"), (256, 7168, 4096), STORAGE, P(EXPERT_AXES, ("data",), None), 2),
    (("expert", "embed", "mlp"), (58, 256, 7168, 4096), COMPUTE, P(None, ("scale_out", "scale_up"), None, None), 1),
    (("expert", "embed", "mlp"), (58, 256, 7168, 4096), COMPUTE, P(None, EXPERT_AXES, None, None), 2),
    (("embed", "latent"), (7168, 1536), STORAGE, P(ALL, None), 1),
    (("embed", "latent"), (7168, 1536), STORAGE, P(SPREAD, None), 2),
    (("embed", "latent"), (7168, 1536), COMPUTE, P(None, None), 2),
    (("embed",), (6,), STORAGE, P(("data",)), 1),
    (("embed", "mlp"), (3, 64), STORAGE, P(None, ALL), 1),
    (("router",), (256,), STORAGE, P(None), 2),
])
def test_layout_of_weights(axes, shape, table, expected, context):
    assert partition_spec(axes, shape, table, _mesh(1, 2, 4, 8 // context, context)) == expected


def test_spread_weights_are_gathered_over_slow_networks_first():
    """And at last over the fast one, scale_up and context at once; what computes apart stays apart."""
    assert list(_gather_steps(P(SPREAD, None), P(None, None))) == [
        P(("scale_up", "context", "scale_out"), None), P(("scale_up", "context"), None)]
    assert list(_gather_steps(P(EXPERT_AXES, ("data",), None), P(EXPERT_AXES, None, None))) == [
        P(EXPERT_AXES, None, None)]


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="do not name"):
        partition_spec(("embed",), (2, 3, 4), STORAGE, _mesh(1, 2, 4, 8, 1))


@pytest.mark.parametrize("sizes", [(16, 2, 8, 8, 1), (16, 2, 8, 4, 2)], ids=str)
def test_storage_spreads_every_large_weight_of_v3_over_the_paper_cluster(sizes):
    """2,048 GPUs: no weight of more than a million values is held whole by a device."""
    mesh = _mesh(*sizes)
    params = jax.eval_shape(lambda: split_model(RUNS["deepseek_v3"].model)[1])
    for path, weight in nnx.to_flat_state(params):
        shape = weight.get_value().shape
        spec = partition_spec(weight.get_metadata("axes"), shape, STORAGE, mesh)
        taken = [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]
        ways = math.prod(mesh.shape[axis] for axis in taken)
        assert ways >= 128 or np.prod(shape) < 1e6, (path, shape, spec)
