"""Section 2.3.2 of paper 1 to the digit, and the floors by hand."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_jax.codesign.decode_limits import (
    Workload,
    attention_seconds,
    decode_step,
    exchange_seconds,
    experts_seconds,
    speed_limit,
)
from dsv3_jax.codesign.hardware import Hardware, hardware
from dsv3_jax.codesign.links import LINKS, Link
from dsv3_jax.config import ConfigError
from dsv3_jax.presets import MODELS

V3 = MODELS["deepseek_v3"]
PAPER = Workload(V3, hidden=7000)
SLOW = Link(1e6, 1e6, None, "slow")


@pytest.mark.parametrize(("link", "micros", "millis", "tokens"), [
    ("ib_cx7", 120.96, 14.76, 67), ("nvlink5", 6.72, 0.82, 1219)])
def test_section_2_3_2_as_printed(link, micros, millis, tokens):
    limit = speed_limit(PAPER, LINKS[link])
    assert round(limit.exchange * 1e6, 2) == micros
    assert limit.layer == 2 * limit.exchange
    assert round(limit.token * 1e3, 2) == millis
    assert int(limit.tokens_per_second) == tokens


def test_the_exact_hidden_size():
    limit = speed_limit(Workload(V3), LINKS["ib_cx7"])
    assert limit.exchange == pytest.approx(3 * 32 * 9 * 7168 / 50e9)
    assert limit.token == pytest.approx(61 * 2 * limit.exchange)


@pytest.mark.parametrize(("acceptance", "times"), [(0.8, 1.8), (0.9, 1.9)])
def test_drafts_of_section_2_3_3(acceptance, times):
    """Each costs a layer. As a sequence has two of a device's tokens then, throughput falls a little."""
    plain, drafted = (speed_limit(dataclasses.replace(PAPER, drafts=drafts, acceptance=acceptance), LINKS["ib_cx7"])
                      for drafts in (0, 1))
    gain = drafted.tokens_per_second / plain.tokens_per_second
    assert gain == pytest.approx(times * 61 / 62)
    assert 0.85 < gain / 2 < 1
    assert dataclasses.replace(PAPER, drafts=2, acceptance=0.5).tokens_per_pass == 1.75


def test_what_is_reached_is_slower_and_late():
    nominal, reached = (exchange_seconds(PAPER, LINKS["ib_cx7"], reached) for reached in (False, True))
    assert reached == pytest.approx(nominal * 50 / 40 + 2 * 3.7e-6)


def toy(bandwidth: float, peak: float) -> Hardware:
    return dataclasses.replace(hardware("h800"), hbm_bandwidth=bandwidth, peak_flops={"bf16": peak, "fp8": 2 * peak})


def test_floors_of_memory_by_hand():
    """With all the FLOP/s there are: 1 byte a weight, 2 of each of 576 values in the cache, 4 experts of 65."""
    device, work = toy(1e9, 1e30), Workload(V3, tokens=4, context=100, expert_devices=65)
    projections = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168
    norms = 1536 + 512
    assert attention_seconds(work, device) == pytest.approx((projections + norms + 4 * 100 * 576 * 2) / 1e9)
    assert experts_seconds(work, device) == pytest.approx(4 * 3 * 7168 * 2048 / 1e9)
    assert experts_seconds(dataclasses.replace(work, expert_devices=None), device) == pytest.approx(
        3 * 7168 * 2048 / 1e9)
    drafted = dataclasses.replace(work, drafts=1)
    # Two rows of one sequence read its cache once.
    saved = attention_seconds(work, device) - attention_seconds(drafted, device)
    assert saved == pytest.approx(2 * 100 * 576 * 2 / 1e9)


def test_floors_of_compute_by_hand():
    """Of 4 tokens, 36 rows: scores of 576 and values of 512 in 128 heads over 100 tokens; experts in float8."""
    device, work = toy(1e30, 1e12), Workload(V3, tokens=4, context=100)
    assert experts_seconds(work, device) == pytest.approx(2 * 36 * 3 * 7168 * 2048 / 2e12)
    longer = dataclasses.replace(work, context=200)
    assert attention_seconds(longer, device) - attention_seconds(work, device) == pytest.approx(
        4 * 2 * 128 * (576 + 512) * 100 / 1e12)


def test_projections_in_float8_and_attentions_core_in_bf16():
    device, work = toy(1e30, 1e12), Workload(V3, tokens=4, context=100)
    wider = dataclasses.replace(work, weight_bytes=2)
    projections = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168 + 1536 + 512
    assert attention_seconds(wider, device) - attention_seconds(work, device) == pytest.approx(
        4 * 2 * projections * (1 / 1e12 - 1 / 2e12))


def test_grouped_attention_reads_keys_and_values():
    grouped = dataclasses.replace(V3, attention="gqa", num_key_value_heads=8, head_dim=128)
    one, two = (attention_seconds(Workload(grouped, tokens=1, context=context), toy(1e9, 1e30)) for context in (1, 2))
    assert two - one == pytest.approx(2 * 8 * 128 * 2 / 1e9)


def test_a_layer_waits_for_the_larger():
    device = toy(1e15, 1e18)
    waiting = decode_step(Workload(V3), device, SLOW)
    assert waiting.bound == "network"
    # 58 layers with experts; the other three and the head take no time here.
    assert waiting.token == pytest.approx(2 * 58 * waiting.exchange, rel=1e-3)
    assert waiting.device_tokens_per_second == pytest.approx(64 * waiting.tokens_per_second)
    computing = decode_step(Workload(V3, context=100_000), hardware("gb200"), LINKS["nvlink5"])
    assert computing.bound == "compute"
    assert computing.token == pytest.approx(2 * (58 * (computing.attention + computing.experts)
                                                 + 3 * (computing.attention + computing.dense) + computing.head))


def test_the_papers_caveats():
    """With long contexts attention dominates; NVL72's 1,200 tokens/s are far from what its memory allows."""
    h800 = hardware("h800")
    assert decode_step(Workload(V3, context=4096), h800).bound == "network"
    assert decode_step(Workload(V3, context=32768), h800).bound == "compute"
    rack = decode_step(Workload(V3, expert_devices=72), hardware("gb200"), LINKS["nvlink5"])
    assert rack.tokens_per_second < 1200 / 8


@pytest.mark.parametrize(("change", "message"), [
    ({"tokens": 0}, r"tokens \(0\) must be a whole number of at least 1"), ({"context": 0}, r"context \(0\)"),
    ({"expert_devices": 0}, r"expert_devices \(0\)"), ({"expert_devices": -8}, r"expert_devices \(-8\)"),
    ({"hidden": 0}, r"hidden \(0\)"), ({"dispatch_bytes": 0}, r"dispatch_bytes \(0\)"),
    ({"combine_bytes": -2}, r"combine_bytes \(-2\)"), ({"weight_bytes": float("nan")}, r"weight_bytes \(nan\)"),
    ({"acceptance": 85}, r"acceptance \(85\) must lie between 0 and 1"),
    ({"drafts": 32}, r"drafts \(32\) must be at least 0 and below tokens \(32\)"),
    ({"model": MODELS["deepseek_v2"], "drafts": 1}, r"drafts \(1\) must be 0: the model has no multi-token")])
def test_nonsense_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(Workload(V3), **change)
