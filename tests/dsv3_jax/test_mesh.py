"""The mesh lays its axes on the right network, and weights on the right axes."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.mesh import COMPUTE, STORAGE, _arrange, make_mesh, partition_spec
from dsv3_jax.presets import RUNS
from dsv3_jax.training.state import split_model


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
    (256, 8, (16, 2, 8, 8)), (8, 8, (1, 1, 8, 8)), (2, 4, (1, 1, 2, 4)), (4, 8, (1, 2, 4, 4)), (4, 8, (2, 2, 1, 8)),
    (2, 8, (1, 4, 2, 2)), (1, 8, (1, 1, 2, 4)), (3, 4, (1, 3, 1, 4))])
def test_scale_up_stays_inside_a_host(hosts, size, shape):
    devices = _hosts(hosts, size)
    grid = _arrange(list(reversed(devices)), shape)
    assert grid.shape == shape
    assert {d.id for d in grid.flat} == set(range(hosts * size))
    for row in grid.reshape(-1, shape[-1]):
        assert len({d.process_index for d in row}) == 1
    if hosts % shape[2] == 0:  # every node of an expert-parallel group is another host
        for group in grid.reshape(-1, *shape[2:]):
            assert len({d.process_index for d in group.flat}) == shape[2]


def test_slices_count_before_hosts():
    """One process a GPU, as Slurm likes it: the slice index tells the node."""
    devices = [Device(i, process_index=i, slice_index=i // 4) for i in range(8)]
    grid = _arrange(devices, (1, 1, 2, 4))
    assert [[d.slice_index for d in row] for row in grid[0, 0]] == [[0] * 4, [1] * 4]


@pytest.mark.parametrize(("hosts", "size", "shape"), [(4, 2, (1, 1, 2, 4)), (2, 4, (1, 1, 1, 8))])
def test_scale_up_over_hosts_is_refused(hosts, size, shape):
    with pytest.raises(ConfigError, match=f"mesh.scale_up .{shape[3]}. does not fit inside one fast domain of {size}"):
        _arrange(_hosts(hosts, size), shape)


def test_unequal_hosts_are_refused():
    with pytest.raises(ConfigError, match="unequal sizes"):
        _arrange([Device(0, 0), Device(1, 0), Device(2, 1)], (1, 3, 1, 1))


def test_mesh_takes_the_devices_left_for_data(eight_devices):
    assert dict(make_mesh(MeshConfig(scale_up=2)).shape) == {"pipe": 1, "data": 4, "scale_out": 1, "scale_up": 2}


ALL = ("data", "scale_out", "scale_up")
SPREAD = ALL[::-1]


@pytest.mark.parametrize(("axes", "shape", "table", "expected"), [
    (("expert", "embed", "mlp"), (256, 7168, 4096), STORAGE, P(("scale_out", "scale_up"), ("data",), None)),
    (("expert", "embed", "mlp"), (58, 256, 7168, 4096), COMPUTE, P(None, ("scale_out", "scale_up"), None, None)),
    (("embed", "latent"), (7168, 1536), STORAGE, P(SPREAD, None)),
    (("embed", "latent"), (7168, 1536), COMPUTE, P(None, None)),
    (("embed",), (6,), STORAGE, P(("data",))),
    (("embed", "mlp"), (3, 64), STORAGE, P(None, SPREAD)),
    (("router",), (256,), STORAGE, P(None)),
])
def test_layout_of_weights(axes, shape, table, expected):
    mesh = jax.sharding.AbstractMesh((1, 2, 4, 8), ("pipe", *ALL))
    assert partition_spec(axes, shape, table, mesh) == expected


def test_wrong_names_are_refused():
    mesh = jax.sharding.AbstractMesh((1, 2, 4, 8), ("pipe", *ALL))
    with pytest.raises(ValueError, match="do not name"):
        partition_spec(("embed",), (2, 3, 4), STORAGE, mesh)


def test_storage_spreads_every_large_weight_of_v3_over_the_paper_cluster():
    """2,048 GPUs as 16 x 2 x 8 x 8: no weight of more than a million values is held whole by a device."""
    mesh = jax.sharding.AbstractMesh((16, 2, 8, 8), ("pipe", *ALL))
    params = jax.eval_shape(lambda: split_model(RUNS["deepseek_v3"])[1])
    for path, weight in nnx.to_flat_state(params):
        shape = weight.get_value().shape
        spec = partition_spec(weight.get_metadata("axes"), shape, STORAGE, mesh)
        taken = [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]
        ways = math.prod(mesh.shape[axis] for axis in taken)
        assert ways >= 128 or np.prod(shape) < 1e6, (path, shape, spec)
