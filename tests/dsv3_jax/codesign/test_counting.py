"""Counts against published totals."""

from __future__ import annotations

import pytest

from dsv3_jax.codesign.counting import count_parameters, training_flops_per_token
from dsv3_jax.presets import MODELS


def test_deepseek_v3_to_the_weight():
    """Totals of the model card; with the copies of embedding and head in layer 61 and one scale a 128x128 block of
    the float8 weights, the sum is the 684,531,386,000 elements of the published files (facts of the checkpoint)."""
    count = count_parameters(MODELS["deepseek_v3"])
    assert round(count.main / 1e9, 2) == 671.03
    assert round(count.activated / 1e9, 2) == 37.55
    assert round(count.activated_without_embedding / 1e9, 2) == 36.63
    assert round(count.mtp_layer / 1e9, 1) == 11.5
    assert count.mtp_activated == pytest.approx(0.69e9, rel=0.02)
    copies = 2 * 129280 * 7168
    in_files = count.main + count.mtp + copies
    assert 684_531_386_000 - in_files == pytest.approx(in_files / 128 ** 2, rel=0.01)
    assert sum(count.by_part.values()) == count.main + count.mtp


@pytest.mark.parametrize(("preset", "total", "activated"), [
    ("deepseek_v2", 236e9, 21e9), ("deepseek_v2_lite", 15.7e9, 2.4e9), ("moonlight_16b", 16e9, 2.6e9),
    ("kimi_k2", 1.03e12, 32e9)])
def test_family_matches_its_model_cards(preset, total, activated):
    """Cards print two digits; activated is without the embedding for the small ones, as they count."""
    count = count_parameters(MODELS[preset])
    assert count.main == pytest.approx(total, rel=0.02)
    assert count.activated_without_embedding == pytest.approx(activated, rel=0.03)


@pytest.mark.parametrize(("preset", "gflop"), [("deepseek_v3", 250), ("deepseek_v2", 155)])
def test_flops_per_token_of_paper_1_table_2(preset, gflop):
    assert training_flops_per_token(MODELS[preset], 4096, mtp=False) / 1e9 == pytest.approx(gflop, rel=0.003)
