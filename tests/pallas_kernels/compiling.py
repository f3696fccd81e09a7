"""Kernels as compilers see them: which operations a program has, and machine code for an H100 that is not here."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
from jax.sharding import SingleDeviceSharding

ROOT = pathlib.Path(__file__).parents[2]

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3"
"""


def backends(text: str) -> set[str]:
    """What multiplies matrices in this StableHLO."""
    operations = {"mosaic_gpu": "@mosaic_gpu", "tpu_kernel": "@tpu_custom_call", "dot_general": "stablehlo.dot_general",
                  "ragged_dot": "chlo.ragged_dot"}
    return {name for name, operation in operations.items() if operation in text}


@functools.cache
def nvidia(target: str = H100):
    """A device to compile for."""
    from jax.experimental import topologies
    return topologies.get_topology_desc(platform="cuda", topology_name="gpu", target_config=target,
                                        topology="1x1x8").devices[0]


def shaped(device, *shape: int, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))


def print_compiled(function, *operands: jax.ShapeDtypeStruct, **names) -> None:
    """Prints what the compiler made of it, as a line of JSON."""
    compiled = jax.jit(function).lower(*operands).compile()
    text = compiled.as_text()
    print(json.dumps({**names, "kernels": text.count('custom_call_target="mosaic_gpu'),
                      "dots": text.count(" dot(") + text.count("gemm"),
                      "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes}), flush=True)


def run_compilations(script: str, *arguments: str) -> tuple[list[dict], str]:
    """(the lines of JSON that the script prints, all it says), in a process that may load NVIDIA's compiler."""
    environment = {**os.environ, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu",
                   "MOSAIC_GPU_DUMP_PTXAS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")], run.stdout + run.stderr
