"""Kernels as compilers see them: which operations a program has, and what is asked of a compiled kernel."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from dsv3_jax.codesign.kernels import CompiledKernel


def backends(text: str) -> set[str]:
    """What multiplies matrices in this StableHLO."""
    operations = {"mosaic_gpu": "@mosaic_gpu", "tpu_kernel": "@tpu_custom_call", "dot_general": "stablehlo.dot_general",
                  "ragged_dot": "chlo.ragged_dot"}
    return {name for name, operation in operations.items() if operation in text}


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a process that has compiled nothing: a process compiles a Hopper kernel only once, and
    only then does ptxas tell of it. The function is one that the other process can import."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def check_compiled(made: CompiledKernel, name: Any, temporary_bytes: int, kernels: int = 1) -> None:
    """So many kernels and no product beside them, no registers spilled, no wait after every tensor core instruction,
    and less than so many bytes beside operands and results. A TPU's compiler does not tell of registers."""
    assert (made.kernels, made.dots) == (kernels, 0), (name, made)
    assert made.spilled_bytes in (0, None), (name, made)
    assert not made.waits_for_each_wgmma, (name, made)
    assert made.temporary_bytes < temporary_bytes, (name, made)
