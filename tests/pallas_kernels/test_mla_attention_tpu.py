"""The TPU kernels of attention and of its gradient, interpreted; memory that was not written is NaN, and races are
looked for."""

from __future__ import annotations

import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention import tpu_blocks
from tests.pallas_kernels.mla_attention_cases import Case, check, draw

CASES = {
    "blocks that see all, some and nothing": Case(300, 300, (300,)),
    "a chunk that begins just before the end of a block": Case(130, 300, (300, 150, 90), start=126),
    "padding": Case(40, 40, (0, 33)),
    "float32, two pairs of heads": Case(130, 130, (130,), heads=4, dtype="float32"),
    "whole blocks, a chunk that ends before the keys": Case(128, 384, (384,), start=128),
}
FAST = list(CASES)[:3]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Blocks as small as there are."""
    monkeypatch.setattr(tpu_blocks, "BLOCK", 128)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield


@pytest.mark.parametrize("case", [pytest.param(case, id=name, marks=[] if name in FAST else pytest.mark.slow)
                                  for name, case in CASES.items()])
def test_is_that_of_float64(case):
    check(case, draw(case), "tpu")
