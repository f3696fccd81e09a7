"""What layers do, held against the count of FLOPs on the model itself, and by hand."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_jax.codesign.counting import training_flops_per_token
from dsv3_jax.codesign.planning.operations import Layer, Work, layer_operations
from dsv3_jax.codesign.traffic import RowsAToken
from dsv3_jax.config import ModelConfig
from dsv3_jax.presets import MODELS

ROWS = RowsAToken(nodes=3.96, slow_copies=7.0, slow_rows=3.47, fast_rows=6.56)
TOKENS = 64


def work_of(model: ModelConfig, **settings) -> Work:
    return dataclasses.replace(Work(model, TOKENS, 4096, True, "none", ROWS), **settings)


def flops(work: Work, layer: Layer, phase: str) -> float:
    return sum(one.flops for one in layer_operations(work, layer) if one.phase == phase)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2_lite", "quickstart_gqa"])
def test_flops_are_those_of_the_model(name):
    """6 for each weight and token, and attention: an independent count, of the model's own parameters. The backward of
    attention's core has five products for the count's four."""
    model = MODELS[name]
    work = work_of(model, length=model.max_position_embeddings if name.startswith("quick") else 4096)
    depth = model.num_nextn_predict_layers
    counts: dict[Layer, int] = {"dense": model.first_k_dense_replace, "experts": model.num_moe_layers,
                                "prediction": depth, "head": 1 + depth}
    total = sum(number * flops(work, layer, phase) for layer, number in counts.items()
                for phase in ("forward", "input", "weight"))
    layers = model.num_hidden_layers + depth
    core = next(one.flops for one in layer_operations(work, "dense") if one.kind == "core")
    expected = TOKENS * training_flops_per_token(model, work.length)
    # Gains of norms, one for each of thousands of a matrix's weights, are in the model's count.
    assert total - 0.5 * core * layers == pytest.approx(expected, rel=2e-3 if name.startswith("quick") else 2e-4)


def test_phases_balance():
    """Each product once forward, once for inputs and once for weights."""
    for layer in ("dense", "experts", "prediction", "head"):
        operations = layer_operations(work_of(MODELS["deepseek_v3"]), layer)
        sums = {phase: sum(one.flops for one in operations if one.phase == phase and "core" not in one.kind)
                for phase in ("forward", "input", "weight")}
        assert sums["forward"] == pytest.approx(sums["input"]) == pytest.approx(sums["weight"])


def test_levels_of_recomputation():
    """Paper: up-projections and rotation; experts: gate and up beside them; full: all of the forward."""
    model = MODELS["deepseek_v3"]
    none, paper, experts, full = (flops(work_of(model, recompute=level), "experts", "input")
                                  for level in ("none", "paper", "experts", "full"))
    ups = 2.0 * TOKENS * (1536 * 128 * 192 + 512 * 128 * 256)
    assert paper - none == pytest.approx(ups)
    assert experts - paper == pytest.approx(2.0 * TOKENS * 8 * 7168 * 4096)
    assert full - none == pytest.approx(flops(work_of(model), "experts", "forward"))


def test_uneven_load_and_shared_sequences():
    model = MODELS["deepseek_v3"]
    even, uneven, shared = (flops(work_of(model, **settings), "experts", "forward")
                            for settings in ({}, {"imbalance": 1.5}, {"context": 2}))
    assert uneven - even == pytest.approx(0.5 * 2.0 * TOKENS * 8 * 3 * 7168 * 2048)
    assert shared - even == pytest.approx(2.0 * TOKENS * 512 * 128 * 256)


def test_bytes_by_hand():
    """SwiGLU of the routed experts in float8: reads gate and up in bf16, writes the product and what is kept."""
    operations = {one.name: one for one in layer_operations(work_of(MODELS["deepseek_v3"]), "experts")}
    rows = TOKENS * 8
    assert operations["experts, SwiGLU"].bytes == rows * (2 * 4096 + 2048 + 4096)
    assert operations["attention's norm"].bytes == TOKENS * 7168 * 3
    wide = {one.name: one for one in layer_operations(work_of(MODELS["deepseek_v3"], fp8=False), "experts")}
    assert wide["experts, SwiGLU"].bytes == rows * (2 * 4096 + 2 * 2048)
    assert not any("retiled" in name for name in wide)
    assert not operations["router"].fp8
    assert operations["experts, down"].fp8
