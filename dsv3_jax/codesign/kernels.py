"""Kernels compiled for accelerators that are not here, and what their compilers say of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.codesign.pods import parse_pod, pod_mesh
from dsv3_jax.config import MeshConfig
from dsv3_jax.mesh import on_each_device
from pallas_kernels.targets import platform_named

SMALLEST_PODS = {"h100": "h100:1x1", "h200": "h200:1x1", "h800": "h800:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2",
                 "tpu7x": "tpu7x:2x2x1"}
"""What has one such device."""


class CompiledKernel(NamedTuple):
    """What a compiler made of the program that one device runs."""

    kernels: int
    """Calls of Pallas kernels, or on TPU v5p of XLA's own ragged one."""
    dots: int
    """Products of matrices that XLA computes in no such kernel; on TPU they are convolutions."""
    spilled_bytes: int | None
    """Stores and loads of registers that the kernels had too few of; None on TPU, whose compiler does not tell."""
    registers: int | None
    """Of a thread where it has most, before warpgroups share them out; None on TPU."""
    waits_for_each_wgmma: bool | None
    """Whether ptxas put a wait after every tensor core instruction (its note C7510); None on TPU."""
    temporary_bytes: int
    seconds: float


def compile_kernel(hardware: str, function: Callable[..., Any],
                   operands: Sequence[jax.ShapeDtypeStruct]) -> CompiledKernel:
    """Compiles `function(*operands)` for hardware of that name: each device of its smallest pod runs all of it.

    Raises:
      ImportError: the extra `aot` is not installed.
      jax.errors.JaxRuntimeError: the compiler refuses it.
      RuntimeError: NVIDIA's compiler told nothing of registers.
    """
    mesh = pod_mesh(parse_pod(SMALLEST_PODS[hardware]), MeshConfig())
    whole = PartitionSpec()
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, whole)) for a in operands]
    with jax.set_mesh(mesh):
        return compile_program(jax.jit(on_each_device(function, whole, whole)), *placed)[0]


def compile_program(program: jax.stages.Wrapped, *operands: jax.ShapeDtypeStruct) -> tuple[CompiledKernel, str]:
    """(what the compiler made of `program(*operands)`, its HLO), for the mesh in use.

    Raises:
      jax.errors.JaxRuntimeError: the compiler refuses it.
      RuntimeError: NVIDIA's compiler told nothing of registers.
    """
    start = time.perf_counter()
    with _ptxas_report() as report:
        compiled = program.lower(*operands).compile()
    seconds = time.perf_counter() - start
    text = compiled.as_text() or ""
    kernels = len(re.findall(r'custom_call_target="(mosaic_gpu|tpu_custom_call|ragged)', text))
    dots = len(re.findall(r'\bdot\(|\bconvolution\(|custom_call_target="__cu(blas|dnn)', text))
    spills = registers = waits = None
    if platform_named() == "gpu":
        spills, registers = _read_report(report(), kernels)
        waits = "C7510" in report()
    memory = compiled.memory_analysis()
    assert memory is not None
    made = CompiledKernel(kernels, dots, spills, registers, waits, memory.temp_size_in_bytes, seconds)
    return made, text


def _read_report(text: str, kernels: int) -> tuple[int, int]:
    """(bytes of spills of all kernels, most registers)."""
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.findall(r"Used (\d+) registers", text)
    if len(spills) != kernels or len(registers) != kernels:
        raise RuntimeError(f"ptxas told of {len(spills)} kernels where the program has {kernels}: a kernel that this "
                           "process has compiled before is not compiled again; start a new one")
    return sum(int(stores) + int(loads) for stores, loads in spills), max(map(int, registers), default=0)


@contextlib.contextmanager
def _ptxas_report() -> Iterator[Callable[[], str]]:
    """Makes Mosaic print what ptxas says of each kernel and catches it, which is only possible at file descriptors:
    it is not Python that prints. Yields a function that returns all that was printed, for use afterwards."""
    sys.stdout.flush()
    sys.stderr.flush()
    asked, caught = os.environ.get("MOSAIC_GPU_DUMP_PTXAS"), ""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with tempfile.TemporaryFile() as file:
        try:
            for descriptor in saved:
                os.dup2(file.fileno(), descriptor)
            yield lambda: caught
        finally:
            ctypes.CDLL(None).fflush(None)
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in saved.items():
                os.dup2(copy, descriptor)
                os.close(copy)
            file.seek(0)
            caught = file.read().decode(errors="replace")
            if asked is None:
                del os.environ["MOSAIC_GPU_DUMP_PTXAS"]
            else:
                os.environ["MOSAIC_GPU_DUMP_PTXAS"] = asked
