"""Cuts of a model into stages: every layer once, in order, and no cut is better."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from dsv3_jax.codesign.counting import count_parameters
from dsv3_jax.config import ConfigError
from dsv3_jax.pipeline.stages import _sizes, _weights_used, cut_model
from dsv3_jax.presets import MODELS


def test_v3_in_16_stages():
    stages = cut_model(MODELS["deepseek_v3"], 16)
    assert [(len(stage.dense), len(stage.moe)) for stage in stages] == [(3, 2), *[(0, 4)] * 14, (0, 0)]
    assert [(stage.first, stage.last) for stage in stages] == [(True, False), *[(False, False)] * 14, (False, True)]


@pytest.mark.parametrize("name", ["deepseek_v3", "moonlight_16b", "quickstart", "quickstart_gqa"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_layers_are_cut_in_order(name, stages):
    model = MODELS[name]
    cut = cut_model(model, stages)
    assert [n for stage in cut for n in stage.dense] == list(range(model.first_k_dense_replace))
    assert [n for stage in cut for n in stage.moe] == list(range(model.num_moe_layers))


@pytest.mark.parametrize("name", ["deepseek_v3", "moonlight_16b", "deepseek_v2_lite", "quickstart_gqa"])
def test_costs_are_the_models_weights(name):
    """Matrices that a token uses, as counted on the model itself; norms and routers are less than 1% of them."""
    model = dataclasses.replace(MODELS[name], num_nextn_predict_layers=0)
    dense, moe, head = _weights_used(model)
    total = dense * model.first_k_dense_replace + moe * model.num_moe_layers + head
    assert total == pytest.approx(count_parameters(model).activated_without_embedding, rel=1e-2)


@pytest.mark.parametrize(("costs", "scarce", "stages"), [
    ([3, 1, 4, 1, 5, 9, 2, 6], [1] * 8, 3), ([2] * 6 + [5], [0, 0, 1, 1, 1, 1, 0], 3), ([1] * 7, [1] * 7, 4),
    ([5, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], 2)])
def test_no_cut_is_better(costs, scarce, stages):
    """By trying all."""
    def quality(sizes):
        bounds = [0, *itertools.accumulate(sizes)]
        parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        sums = [sum(costs[part]) for part in parts]
        return max(sums), max(sum(scarce[part]) for part in parts), sum(s * s for s in sums)
    every = [sizes for sizes in itertools.product(range(1, len(costs) + 1), repeat=stages) if sum(sizes) == len(costs)]
    got = _sizes(costs, scarce, stages)
    assert sum(got) == len(costs)
    assert quality(got) == min(map(quality, every))


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match=r"mesh.pipe \(5 stages\) must be at most 4"):
        cut_model(MODELS["tiny"], 5)
