"""Counts against published totals."""

from __future__ import annotations

import dataclasses

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


GQA = dataclasses.replace(MODELS["quickstart_gqa"], num_nextn_predict_layers=0)


def test_attention_of_groups_by_hand():
    """Hidden 128; four heads of 32 make 128, two shared ones 64, one 32; no biases and no norms; three layers."""
    assert count_parameters(GQA).by_part["attention"] == 3 * (128 * 128 + 2 * 128 * 64 + 128 * 128)
    mqa = dataclasses.replace(MODELS["quickstart_mqa"], num_nextn_predict_layers=0)
    assert count_parameters(mqa).by_part["attention"] == 3 * (128 * 128 + 2 * 128 * 32 + 128 * 128)


@pytest.mark.parametrize(("window", "keys"), [(None, 64), (128, 64), (500, 64), (1, 1 - 1 / 256), (32, 32 - 4)])
def test_attention_flops_by_hand(window, keys):
    """Of 128 tokens; forward and backward of scores and of values, 2 FLOPs a product, 128 wide over all heads. A window
    of W takes W keys less the triangle W^2/2 over 128 tokens (as T/2 counts the whole triangle, half the diagonal)."""
    config = dataclasses.replace(GQA, attention_window=window)
    flops = training_flops_per_token(config, 128) - 6 * count_parameters(config).activated_without_embedding
    assert flops == 3 * 3 * 2 * (128 + 128) * keys
    square = training_flops_per_token(config, 128, causal=False) - training_flops_per_token(config, 128)
    assert square == 3 * 3 * 2 * (128 + 128) * (min(window or 128, 128) - keys)
