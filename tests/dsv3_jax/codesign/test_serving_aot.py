"""Serving with replicas, compiled for GPUs that are not there: what is in memory and what is sent."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from dsv3_jax.codesign.pods import parse_pod
from dsv3_jax.codesign.serving_aot import compile_serving
from dsv3_jax.config import ConfigError
from dsv3_jax.inference.scheduler import Sizes
from dsv3_jax.presets import DEPLOYMENTS, MODELS, ServingDeployment

pytestmark = pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra aot")

MODEL = dataclasses.replace(MODELS["tiny"], num_hidden_layers=4)
SIZES = Sizes(rows=4, pages=4, page_size=64, context=64)
FOUR = ServingDeployment(devices=4, nodes=2, redundant=8, by_group=False)
GIB = 2 ** 30


def test_a_move_sends_each_devices_part_of_a_layer_twice():
    """All but a quarter of it, which stays: 6 slots of three bf16 matrices, of one layer in a stack of three."""
    report = compile_serving(MODEL, parse_pod("h800:2x2"), FOUR, "move", SIZES, precision="bf16")
    part = 6 * 3 * MODEL.hidden_size * MODEL.moe_intermediate_size * 2
    assert [(sent.kind, sent.axes) for sent in report.collectives] == [("all-to-all", "scale_out+scale_up")]
    assert report.collectives[0].bytes == 2 * part * 3 / 4
    assert report.collectives[0].slow_bytes == 2 * part * 2 / 4


@pytest.mark.parametrize("program", ["step", pytest.param("chunk", marks=pytest.mark.slow)])
def test_tokens_travel_and_weights_do_not(program):
    report = compile_serving(MODEL, parse_pod("h800:2x2"), FOUR, program, SIZES, chunk=16, precision="bf16")
    sent = {(sent.kind, sent.axes): sent for sent in report.collectives}
    assert sent["all-to-all", "scale_out"].slow_bytes > 0
    assert sent["all-to-all", "scale_up"].slow_bytes == 0
    layer = 3 * MODEL.hidden_size * MODEL.moe_intermediate_size * 2  # of the shared expert, the least of all
    assert sum(sent.bytes for sent in report.collectives if sent.kind == "all-gather") < layer
    assert report.fits


def test_another_pods_deployment_is_refused():
    with pytest.raises(ConfigError, match="32 devices on 4 nodes, --pod h800:2x2 4 on 2: choose a pod of 4 nodes of 8"):
        compile_serving(MODEL, parse_pod("h800:2x2"), DEPLOYMENTS["prefill"], "step", SIZES)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pod", "program", "most"), [
    ("prefill", "h800:4x8", "chunk", 62), ("prefill", "h800:4x8", "move", 25),
    ("decode144", "h800:18x8", "step", 43), ("decode144", "h800:18x8", "move", 6),
    ("decode320", "h800:40x8", "step", 41), ("decode320", "h800:40x8", "move", 3)])
def test_deepseek_v3s_own_deployments_fit(name, pod, program, most):
    """With 64 rows of 4096 tokens on each device; `most` GiB of 80."""
    sizes = Sizes(rows=64, pages=4096, page_size=64, context=4096)
    report = compile_serving(MODELS["deepseek_v3"], parse_pod(pod), DEPLOYMENTS[name], program, sizes)
    assert report.peak_bytes < most * GIB
    gathered = {sent.axes: sent.bytes for sent in report.collectives if sent.kind == "all-gather"}
    if program == "chunk":  # latents, to three others; keys and values would be 57 times as much
        width = MODELS["deepseek_v3"].kv_lora_rank + MODELS["deepseek_v3"].qk_rope_head_dim
        layers = MODELS["deepseek_v3"].num_hidden_layers + 1
        assert gathered.pop("context") == pytest.approx(3 * 1024 * layers * width * 2, rel=0.02)
    assert all(sent < 2 ** 20 for sent in gathered.values())


@pytest.mark.slow
def test_rows_alone_travel_beside_products_too():
    """XLA's estimates of times know no ragged exchange, so it hides less; without its scheduler it would hide none."""
    sizes, deployment = Sizes(rows=64, pages=4096, page_size=64, context=4096), DEPLOYMENTS["decode144"]
    model = dataclasses.replace(MODELS["deepseek_v3"], num_hidden_layers=7, num_nextn_predict_layers=0)
    report = compile_serving(model, parse_pod(deployment.pod), deployment, "step", sizes, transport="ragged", dual=True)
    sent = {sent.axes: sent for sent in report.collectives if sent.kind == "ragged-all-to-all"}
    assert sent["scale_out"].overlapped_bytes > 0.9 * sent["scale_out"].bytes
    assert sent["scale_up"].overlapped_bytes > 0.8 * sent["scale_up"].bytes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "program", "least"), [("prefill", "chunk", 0.98), ("decode144", "step", 0.97)])
def test_halves_have_products_beside_their_exchanges(name, program, least):
    """Of DeepSeek-V3, by the compiler's schedule; and it takes no more than 1% more memory."""
    sizes, deployment = Sizes(rows=64, pages=4096, page_size=64, context=4096), DEPLOYMENTS[name]
    plain, halves = (compile_serving(MODELS["deepseek_v3"], parse_pod(deployment.pod), deployment, program, sizes,
                                     dual=dual) for dual in (False, True))
    assert halves.peak_bytes < 1.01 * plain.peak_bytes
    for sent in halves.collectives:
        if sent.kind == "all-to-all" and sent.axes != "context":  # the partitioner's own, twice in a chunk
            assert sent.overlapped_bytes > least * sent.bytes
    assert sum(sent.overlapped_bytes for sent in plain.collectives) < 0.5 * sum(s.bytes for s in plain.collectives)
