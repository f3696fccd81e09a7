"""The Hopper kernel: interpreted here; on such a GPU for real, with `pytest --noconftest -o addopts=` on this file.

The interpreter simulates every warpgroup, copy and barrier on CPU and looks for races; its memory starts as NaN. It
runs a `wgmma` at once, so only a GPU shows that no slot is freed while the tensor cores still read it. Four warpgroups
wait for each other in threads of XLA's, of which tests/conftest.py makes enough.
"""

from __future__ import annotations

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.mla_decode import gpu
from tests.pallas_kernels.mla_decode_cases import Case, attend, check, draw

CASES = {
    "ragged, empty, whole pages, one more": Case((70, 0, 64, 65), heads=3, queries=2),
    "more blocks than slots, pages of two blocks": Case((200, 1), page=128, heads=20, queries=4),
    "nothing to do": Case((0,)),
    "float8": Case((65, 33), kind="float8", latent=256),
    "int8": Case((130,), kind="int8", heads=4, queries=2),
    "first queries before, inside and after": Case((40, 40, 7), queries=3, first=(-1, 12, 9)),
}
FAST = "ragged, empty, whole pages, one more", "float8", "int8"


@pytest.fixture(autouse=True)
def runnable():
    if getattr(jax.devices()[0], "compute_capability", "").startswith("9."):
        yield
        return
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield


@pytest.mark.parametrize(("case", "splits"), [
    pytest.param(case, splits, id=f"{name}, splits: {splits}",
                 marks=[] if (name in FAST) == (splits == 1) else pytest.mark.slow)
    for name, case in CASES.items() for splits in (1, 3)])
def test_is_that_of_float64(monkeypatch, case, splits):
    monkeypatch.setattr(gpu, "splits_for", lambda tiles, blocks: splits)
    drawn = draw(case)
    check(case, drawn, attend(case, drawn, "hopper"), drawn.of_rounded)


@pytest.mark.parametrize(("tiles", "blocks", "expected"), [
    (256, 64, 1),  # almost two whole waves: 128 rows of 128 heads
    (2, 512, 64),  # one row of 128 heads: eight blocks for each of 128 multiprocessors
    (1, 3, 3),  # no more than there are blocks
    (40, 64, 3),  # 120 shares in one wave
    (5000, 64, 1)])
def test_splits(tiles, blocks, expected):
    assert hopper.MULTIPROCESSORS == 132
    assert gpu.splits_for(tiles, blocks) == expected
