"""Runs a backend's kernels where its device is not: slowly, by an interpreter that looks for races."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from pallas_kernels import hopper
from pallas_kernels.targets import Backend

MULTIPROCESSORS = 2
"""Of the simulated card: each walks over several tiles or over none."""


@contextlib.contextmanager
def interpreted(backend: Backend) -> Iterator[None]:
    """Inside, kernels of `backend` are interpreted on CPU. JAX forgets on both sides what it has traced."""
    jax.clear_caches()
    real = hopper.MULTIPROCESSORS
    try:
        with contextlib.ExitStack() as stack:
            if backend == "hopper":
                from jax.experimental.pallas import mosaic_gpu as plgpu
                hopper.MULTIPROCESSORS = MULTIPROCESSORS
                stack.enter_context(plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)))
            else:
                from jax.experimental.pallas import tpu as pltpu
                stack.enter_context(pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)))
            yield
    finally:
        hopper.MULTIPROCESSORS = real
        jax.clear_caches()
