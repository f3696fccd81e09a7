"""Writes `shardings.txt`: how every parameter of every preset lies on a pod. Run it when a layout changes on purpose:

  python -m tests.dsv3_jax.codesign.golden_shardings
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
from flax import nnx

from dsv3_jax.codesign.pods import default_mesh, parse_pod
from dsv3_jax.mesh import AXES, COMPUTE, STORAGE, axes_of, mesh_shape, partition_spec
from dsv3_jax.nn.model import split_model
from dsv3_jax.presets import LAYOUTS, RUNS

PATH = Path(__file__).with_name("shardings.txt")
PODS = {**dict.fromkeys(("quickstart", "quickstart_gqa", "quickstart_mqa"), "h100:1x8"), "tiny": "h100:2x4"}
OTHERWISE = "h100:8x8"


def lines() -> Iterator[str]:
    """For each preset its mesh; for each parameter its shape, and the mesh axes of its dimensions in storage and in
    use (- is whole)."""
    for name, run in RUNS.items():
        pod = parse_pod(LAYOUTS[name].pod if name in LAYOUTS else PODS.get(name, OTHERWISE))
        mesh_config = default_mesh(run.model, pod, run.mesh)
        sizes = mesh_shape(mesh_config, pod.devices)
        mesh = jax.sharding.AbstractMesh(sizes, AXES)
        yield f"{name} on {pod}: " + " ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        params = jax.eval_shape(lambda run=run: split_model(run.model)[1])
        for path, weight in nnx.to_flat_state(params):
            shape, axes = weight.get_value().shape, weight.get_metadata("axes")
            stored, used = (_axes(partition_spec(axes, shape, table, mesh)) for table in (STORAGE, COMPUTE))
            yield f"  {'.'.join(map(str, path)):55s} {'x'.join(map(str, shape)):18s} stored {stored}  used {used}"


def _axes(spec: jax.sharding.PartitionSpec) -> str:
    return " ".join("+".join(axes_of(entry)) or "-" for entry in spec)


if __name__ == "__main__":
    PATH.write_text("\n".join(lines()) + "\n")
