"""Sizes of the dense models against their cards and paper 1."""

from __future__ import annotations

import pytest

from dsv3_jax.codesign.dense_models import DENSE_MODELS


@pytest.mark.parametrize(("name", "billions"), [
    ("qwen2.5_72b", 72.7), ("qwen_72b", 72.3), ("llama3.1_70b", 70.6), ("llama3.1_405b", 405.9)])
def test_parameters_of_the_model_cards(name, billions):
    """As the cards of the published files count them, to the digit."""
    assert DENSE_MODELS[name].parameters / 1e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize(("name", "kilobytes"), [("qwen2.5_72b", 327.680), ("llama3.1_405b", 516.096)])
def test_cache_of_paper_1_table_1(name, kilobytes):
    assert DENSE_MODELS[name].cache_bytes_per_token() == 1000 * kilobytes


def test_training_flops_by_hand():
    """LLaMA-3.1 405B: 6 for each of 126 layers' weights and the head's, and 3 passes over half of 4096 keys, 2 products
    of 2 FLOPs, 16,384 wide."""
    layer = 2 * 16384 * 16384 + 2 * 16384 * 1024 + 3 * 16384 * 53248
    flops = 6 * (126 * layer + 128256 * 16384) + 126 * 3 * 2 * 2 * 16384 * 2048
    model = DENSE_MODELS["llama3.1_405b"]
    assert model.training_flops_per_token(4096) == flops
    assert model.training_flops_per_token(4096, causal=False) - flops == 126 * 3 * 2 * 2 * 16384 * 2048


def test_table_2_of_paper_1_is_1_percent_off():
    """2,448 is what is left without the projections to keys and values."""
    model = DENSE_MODELS["llama3.1_405b"]
    rest = model.training_flops_per_token(4096) - 6 * 126 * 2 * 16384 * 1024
    assert round(rest / 1e9) == 2448
