"""What must be set before JAX touches a device: simulated devices, other processes, the compilation cache."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from dsv3_jax.config import ConfigError, DistributedConfig, MeshConfig
from dsv3_jax.training.tokens import default_cache_dir

# Any of these tells that a scheduler started several processes which JAX can find by itself.
_CLUSTER_SIZE_VARIABLES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_CLUSTER_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")
_LONGEST_WAIT_MS = 3600 * 1000  # tokenizing a corpus or compiling a large model may take one process this much longer


def start(mesh: MeshConfig, distributed: DistributedConfig = DistributedConfig(), keep_casts: bool = False) -> None:
    """Prepares JAX for `mesh`. Call once, before the first array.

    With `keep_casts` every cast to bf16 rounds, for studies of rounding. By default XLA drops many between operations:
    on accelerators inside a fusion, on CPU, which computes in float32, nearly all.

    Joins the other processes of the run: by `distributed` if given, else by what Slurm, Open MPI, GKE or a TPU pod say
    in the environment, which `jax.distributed` reads itself.
    """
    if _accelerator() is None:
        _keep_freed_memory()
        if importlib.util.find_spec("jax_cuda13_plugin") and not jax.config.jax_platforms:
            # The extra `aot` compiles for hardware that is not here; JAX would look for it, and complain at length.
            jax.config.update("jax_platforms", "cpu")
    if mesh.simulate_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        _set_xla_flag("xla_force_host_platform_device_count", mesh.simulate_devices)
    if keep_casts:
        _set_xla_flag("xla_allow_excess_precision", "false")
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(default_cache_dir().parent / "xla"))
    if distributed.coordinator is not None:
        jax.distributed.initialize(distributed.coordinator, distributed.processes, distributed.process)
    elif _in_cluster():
        jax.distributed.initialize()
    if mesh.simulate_devices is not None and jax.local_device_count() != mesh.simulate_devices:
        raise ConfigError(f"mesh.simulate_devices ({mesh.simulate_devices}) came too late: JAX already runs "
                          f"with {jax.local_device_count()} devices; call runtime.start before using JAX")


def _set_xla_flag(name: str, value: object) -> None:
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if name not in flag]
    os.environ["XLA_FLAGS"] = " ".join([*others, f"--{name}={value}"])


def wait_for_processes(name: str) -> None:
    """Waits until every process of the run is here; before that, a first collective could time out."""
    if jax.process_count() > 1:
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=_LONGEST_WAIT_MS)


def _in_cluster() -> bool:
    several = any(int(os.environ.get(name, "1")) > 1 for name in _CLUSTER_SIZE_VARIABLES)
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return several or pod or any(name in os.environ for name in _CLUSTER_VARIABLES)


def _keep_freed_memory() -> None:
    """Tells glibc to reuse freed memory instead of giving it back to the system.

    XLA on CPU allocates a step's buffers anew each step. By default that is 33,000 page faults a step of the
    quickstart: 181 ms against 157 ms without (two cores). Must come before the threads of XLA start. Other C libraries
    are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        arena_max, mmap_max, trim_threshold = -8, -4, -1
        libc.mallopt(arena_max, 1)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2 ** 31 - 1)


def _accelerator() -> str | None:
    """The extra that drives an accelerator which this machine has, or None."""
    if Path("/dev/nvidia0").exists():
        return "cuda13"
    return "tpu" if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists() else None


def idle_accelerator() -> str | None:
    """A warning if this machine has an accelerator that JAX does not use, else None."""
    if jax.default_backend() != "cpu" or "cpu" in (jax.config.jax_platforms or ""):
        return None
    extra = _accelerator()
    return extra and f'an accelerator is here, but JAX runs on the CPU: pip install "dsv3-jax[{extra}]"'
