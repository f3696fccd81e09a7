"""Pods that are not there: a name such as `h800:256x8` becomes compile-only devices of the real compilers.

    h800:256x8              256 nodes of 8 GPUs
    gb200:8x72              8 racks of 72 GPUs
    v5p:8x8x8               one slice, a torus of 8x8x8 chips
    v5p:4x4x4,slices=4      4 such slices, joined by the slow network
    tpu7x:8x8x8             512 chips, which JAX shows as 1,024 devices

Needs the extra `aot`: libtpu for TPU, the CUDA plug-in and compiler of jax's own version for GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from dsv3_jax.codesign.collectives import Layout
from dsv3_jax.codesign.hardware import HARDWARE, Hardware
from dsv3_jax.config import ConfigError, MeshConfig, ModelConfig, named
from dsv3_jax.mesh import AXES, fast_domain, make_mesh

_EXAMPLES = "for example h800:256x8 (nodes x GPUs), v5p:8x8x8 or v5p:4x4x4,slices=4 (chips of a slice)"

# What XLA:GPU asks about a card, from OpenXLA's target_config/specs (h100_sxm, b200, gb200). H800 and H200 are Hopper
# like H100. Streaming multiprocessors, bytes of L2, clock in GHz, compute capability.
_HOPPER = (132, 52_428_800, 1.98, 9)
_GPU_CORES = {"h800": _HOPPER, "h100": _HOPPER, "h200": _HOPPER, "b200": (148, 132_644_864, 1.965, 10),
              "gb200": (152, 135_528_448, 2.062, 10)}


class Pod(NamedTuple):
    """Hardware and its shape."""

    hardware: Hardware
    shape: tuple[int, ...]
    """GPU: (fast domains, devices in each). TPU: chips of one slice along each torus dimension."""
    slices: int = 1
    """TPU slices; 1 on GPU."""

    @property
    def domains(self) -> int:
        """Fast domains: nodes or racks of GPUs, slices of TPU."""
        return self.shape[0] if self.hardware.kind == "gpu" else self.slices

    @property
    def devices_per_domain(self) -> int:
        return self.shape[1] if self.hardware.kind == "gpu" else (
            math.prod(self.shape) * self.hardware.devices_per_chip)

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.domains * self.devices_per_domain

    def __str__(self) -> str:
        return (f"{self.hardware.name}:{'x'.join(map(str, self.shape))}"
                + (f",slices={self.slices}" if self.slices > 1 else ""))


def parse_pod(text: str, own: Hardware | None = None) -> Pod:
    """Reads a pod's name; it may also name `own` hardware, of a file (`hardware_file.load_hardware`).

    Raises:
      ConfigError: unknown hardware, or a shape that the hardware cannot have.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:,slices=(\d+))?", text)
    known = HARDWARE | ({own.name: own} if own is not None else {})
    if found is None:
        raise ConfigError(f"--pod {text} is not HARDWARE:SHAPE: write {_EXAMPLES}. Hardware: {', '.join(known)}")
    kind = named(known, found.group(1), "hardware")
    shape, slices = tuple(map(int, found.group(2).split("x"))), int(found.group(3) or 1)
    if min(shape) < 1 or slices < 1:
        raise ConfigError(f"--pod {text}: every size must be at least 1")
    if kind.kind == "gpu":
        if len(shape) != 2 or slices != 1:
            raise ConfigError(f"--pod {text}: a GPU pod is {kind.name}:NODESxGPUS, such as {kind.name}:4x8")
        if shape[1] > kind.largest_scale_up:
            raise ConfigError(f"--pod {text}: {shape[1]} GPUs a node, but {kind.scale_up.name} joins at most "
                              f"{kind.largest_scale_up} {kind.name}: write {kind.name}:NODESx{kind.largest_scale_up}")
    elif len(shape) != kind.torus:
        raise ConfigError(f"--pod {text}: a {kind.name} slice has {kind.torus} dimensions, such as "
                          f"{kind.name}:{'x'.join(['4'] * kind.torus)}")
    elif math.prod(shape) * kind.devices_per_chip > kind.largest_scale_up:
        raise ConfigError(f"--pod {text}: {math.prod(shape)} chips, but a {kind.name} slice has at most "
                          f"{kind.largest_scale_up // kind.devices_per_chip}: use several smaller slices "
                          f"({kind.name}:SHAPE,slices=N)")
    return Pod(kind, shape, slices)


@functools.cache
def pod_devices(pod: Pod) -> tuple[Any, ...]:
    """Compile-only devices.

    Raises:
      ImportError: the extra `aot` is not installed.
      ConfigError: the compiler knows no such topology, or no such hardware.
    """
    _require_compiler(pod.hardware)
    target = pod.hardware.compiles_as or pod.hardware.name
    if target not in HARDWARE:
        raise ConfigError(f"--pod {pod}: no compiler knows {target}; write based_on = the nearest of "
                          f"{', '.join(HARDWARE)} into its file to compile as for that")
    _prepare_environment()
    settings: dict[str, Any]
    if pod.hardware.kind == "gpu":
        name = pod.hardware.name
        # Slices x hosts x devices; every fast domain is a host here.
        settings = {"target_config": _gpu_target(pod.hardware), "topology": f"1x{pod.shape[0]}x{pod.shape[1]}"}
    else:
        name = f"{target}:{'x'.join(map(str, pod.shape))}"
        settings = {"num_slices": pod.slices} if pod.slices > 1 else {}
    platform = "cuda" if pod.hardware.kind == "gpu" else "tpu"
    try:
        return tuple(topologies.get_topology_desc(platform=platform, topology_name=name, **settings).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--pod {pod}: the {platform} compiler has no such topology: {str(error).splitlines()[0]}"
                          ) from error


def pod_mesh(pod: Pod, config: MeshConfig) -> Mesh:
    """The mesh of `config` over the pod's devices."""
    return make_mesh(config, pod_devices(pod), _domain_of(pod))


def _domain_of(pod: Pod) -> Callable[[Any], int]:
    """Compile-only GPUs tell no slices; here each fast domain is one host (see `pod_devices`)."""
    return (lambda device: device.process_index) if pod.hardware.kind == "gpu" else fast_domain


def layout_of(pod: Pod, mesh: Mesh) -> Layout:
    """Where a mesh's devices stand: fast domains, and places on the torus."""
    devices = list(mesh.devices.flat)
    # The cores of one chip are neighbours as well; they count as one more dimension.
    places = tuple((*device.coords, device.core_on_chip) for device in devices) if pod.hardware.torus else ()
    return Layout({axis: mesh.shape[axis] for axis in AXES}, tuple(map(_domain_of(pod), devices)), places)


def default_mesh(model: ModelConfig, pod: Pod, config: MeshConfig) -> MeshConfig:
    """`config` with expert-parallel axes from the pod where it has none: scale_up inside a fast domain, scale_out
    over as many domains as the router has groups; the rest is data."""
    if config.scale_out * config.scale_up > 1 or config.data is not None:
        return config
    near, experts, groups = config.context, model.n_routed_experts, model.n_group
    up = max((size for size in _divisors(pod.devices_per_domain)
              if pod.devices_per_domain % (size * near) == 0 and experts % (size * near) == 0), default=1)
    out = max((size for size in _divisors(pod.domains)
               if experts % (size * up * near) == 0 and (groups == 1 or groups % size == 0)), default=1)
    return dataclasses.replace(config, scale_up=up, scale_out=out)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _require_compiler(kind: Hardware) -> None:
    module = "libtpu" if kind.kind == "tpu" else "jax_cuda13_plugin"
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"compiling for {kind.name} needs {module}: pip install 'dsv3-jax[aot]'")


def _prepare_environment() -> None:
    """Lets the compilers load without their hardware. Settings that the user made stay."""
    for name, value in {
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # no driver here
            "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",  # no cloud to ask about this host
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compiling needs no lock on chips
            "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}.items():
        os.environ.setdefault(name, value)
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # 1 is what importing jax sets
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def _gpu_target(kind: Hardware) -> str:
    """The text of XLA's GpuTargetConfig for a card."""
    cores, cache, clock, capability = _GPU_CORES[kind.compiles_as or kind.name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(kind.hbm_bandwidth)} l2_cache_size: {cache} device_memory_size: {kind.hbm_bytes}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {capability} minor: 0 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{kind.device_kind}"
"""
