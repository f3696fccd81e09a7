"""Bytes to experts and back: as compiled, of rows alone, and by the paper's formula; and the times they imply."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_jax.codesign.hardware import HARDWARE
from dsv3_jax.codesign.serving_aot import Sent, ServingReport
from dsv3_jax.codesign.serving_network import PerToken, as_compiled, limit, of_paper, of_rows
from dsv3_jax.presets import DEPLOYMENTS, MODELS, ServingDeployment

V3 = MODELS["deepseek_v3"]
ROW = 7168 + 4 * 56 + 2 * 7168
"""There in float8 with a scale for 128 values, and back in bf16."""


def report(*sent: Sent, tokens=64, layers=58) -> ServingReport:
    return ServingReport("h800:40x8", "step", 320, tokens, layers, 0, 0, 0, 0, True, 0.0, list(sent))


def test_the_papers_formula_and_time():
    """Section 2.3.2 with the exact hidden size: 2 x 123.86 us a layer, 61 layers; 900 GB/s are 18 times as fast."""
    assert of_paper(V3) == 3 * 9 * 7168
    paper = report(tokens=64, layers=61)
    nodes = limit(PerToken(of_paper(V3), 0), paper, HARDWARE["h800"])
    assert nodes.slow == pytest.approx(61 * 2 * 123.863e-6, rel=1e-5)
    rack = limit(PerToken(0, of_paper(V3)), paper, HARDWARE["gb200"])
    assert rack.fast == pytest.approx(61 * 2 * 123.863e-6 / 18, rel=1e-5)
    assert rack.tokens_per_second == pytest.approx(1191.1, rel=1e-4)
    drafted = limit(PerToken(0, of_paper(V3)), paper, HARDWARE["gb200"], tokens_per_pass=1.8)
    assert drafted.tokens_per_second == pytest.approx(1.8 * rack.tokens_per_second)


def test_exchanges_are_what_the_program_sends_for_a_token_in_a_layer():
    """Other collectives, such as those that count rounds, are not of rows."""
    sent = [Sent("all-to-all", "scale_out", 116, 64 * 58 * 300.0, 64 * 58 * 300.0, 0.0),
            Sent("all-to-all", "scale_up", 58, 64 * 58 * 2.0, 0.0, 0.0),
            Sent("ragged-all-to-all", "scale_up", 116, 64 * 58 * 900.0, 0.0, 0.0),
            Sent("all-reduce", "scale_out+scale_up", 58, 1e6, 1e5, 0.0)]
    assert as_compiled(report(*sent), PerToken(100, 200)) == PerToken(300, 202)


def test_rows_of_one_expert_a_token():
    """With one choice of all experts alike a row leaves its node with chance 3/4, and its place in the node with 7/8:
    65,536 tokens are within 1%."""
    model = dataclasses.replace(V3, num_experts_per_tok=1, n_group=1, topk_group=1)
    rows = of_rows(model, ServingDeployment(devices=32, nodes=4, redundant=0, by_group=False), "fp8")
    assert rows.slow == pytest.approx(ROW * 3 / 4, rel=0.01)
    assert rows.fast == pytest.approx(ROW * 7 / 8, rel=0.01)


def test_rows_of_the_deployments():
    """The node limit of 4 holds where replicas stay on their group's node; one node sends nothing to others."""
    prefill, decode, rack = (of_rows(V3, DEPLOYMENTS[name], "fp8") for name in ("prefill", "decode320", "decode72"))
    assert 2 * ROW < prefill.slow <= 3 * ROW  # four nodes altogether
    assert 5 * ROW < decode.slow < 8 * ROW
    assert rack.slow == 0
    assert 7 * ROW < rack.fast < 8 * ROW
