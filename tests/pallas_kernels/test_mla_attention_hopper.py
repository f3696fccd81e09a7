"""The Hopper kernels of attention and of its gradient: interpreted here; on such a GPU for real, with
`pytest --noconftest -o addopts=` on this file.

The interpreter simulates every warpgroup, copy and barrier on CPU and looks for races; its memory starts as NaN. It
runs a `wgmma` at once, so only a GPU shows that no slot is freed while the tensor cores still read it.
"""

from __future__ import annotations

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.pallas_kernels.mla_attention_cases import Case, check, draw

CASES = {
    "more blocks than slots, that see all, some and nothing": Case(264, 264, (264,), heads=1),
    "a chunk that begins inside a block": Case(70, 200, (200, 110, 60), start=90),
    "padding, odd sizes": Case(33, 41, (0, 33)),
    "narrow heads": Case(72, 72, (72,), nope=64, value=64),
    "whole tiles, a chunk that ends before the keys": Case(128, 320, (320,), start=128, heads=1),
}
FAST = list(CASES)[:3]


@pytest.fixture(autouse=True)
def runnable():
    if getattr(jax.devices()[0], "compute_capability", "").startswith("9."):
        yield
        return
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize("case", [pytest.param(case, id=name, marks=[] if name in FAST else pytest.mark.slow)
                                  for name, case in CASES.items()])
def test_is_that_of_float64(case):
    check(case, draw(case), "hopper")
