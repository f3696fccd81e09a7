"""Searches, against trying everything."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_jax.codesign.hardware import HARDWARE
from dsv3_jax.codesign.planning.layers import Machine
from dsv3_jax.codesign.planning.predict import predict
from dsv3_jax.codesign.planning.rates import LATEST
from dsv3_jax.codesign.planning.search import Wanted, layouts, search
from dsv3_jax.codesign.planning.serving import decode_plans, group_sizes, prefill_plans
from dsv3_jax.codesign.pods import parse_pod
from dsv3_jax.config import ConfigError
from dsv3_jax.presets import MODELS, RUNS

POD = parse_pod("h100:2x8")
MACHINE = Machine(HARDWARE["h100"], LATEST, 8)
LITE = dataclasses.replace(RUNS["deepseek_v2_lite"], batch=dataclasses.replace(
    RUNS["deepseek_v2_lite"].batch, sequences=32, micro_batches=1, ramp_from=None))


def test_the_best_is_the_best_of_all():
    found = search(LITE, POD, MACHINE, keep=3)
    everything = []
    for layout in layouts(LITE, POD, Wanted()):
        try:
            told = predict(LITE, layout, MACHINE)
        except ConfigError:
            continue
        if told.memory_bytes <= POD.hardware.hbm_bytes:
            everything.append(told.seconds)
    assert len(everything) > 40
    assert [one.seconds for one in found.best] == sorted(everything)[:3]
    assert found.tried >= len(everything)


def test_layouts_divide():
    seen = set()
    for layout in layouts(LITE, POD, Wanted()):
        seen.add((layout.pipe, layout.schedule is None, layout.precision))
        assert layout.devices == 16
        assert LITE.model.n_routed_experts % layout.expert_parallel == 0
        layout.group_config(LITE)
        # Nodes share experts only whole.
        assert layout.scale_out == 1 or layout.scale_up * layout.context == 8
    assert {pipe for pipe, _, _ in seen} == {1, 2, 4, 8, 16}
    assert {kind for _, _, kind in seen} == {"fp8"}


def test_what_is_given_is_kept():
    wanted = Wanted(scale_out=2, scale_up=8, pipe=1, precision="bf16", recompute="full", zero="full", micro_batches=1)
    best = search(LITE, POD, MACHINE, wanted).best[0].layout
    kept = {name: value for name, value in dataclasses.asdict(wanted).items() if value is not None}
    assert {name: getattr(best, name) for name in kept} == kept
    assert best.data == 1


def test_hardware_without_float8_plans_bf16():
    pod = parse_pod("v5p:2x2x4")
    found = search(LITE, pod, Machine(pod.hardware, LATEST, pod.devices_per_domain), Wanted(pipe=1))
    assert found.best[0].layout.precision == "bf16"


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="--pipe 1, --micro-batches 7: leave some out"):
        search(LITE, POD, MACHINE, Wanted(pipe=1, micro_batches=7))
    small = parse_pod("h100:1x8")
    huge = search(RUNS["deepseek_v3"], small, MACHINE, Wanted(pipe=1))
    assert huge.best == []
    assert huge.smallest is not None
    assert huge.smallest.memory_bytes > small.hardware.hbm_bytes


V3 = MODELS["deepseek_v3"]
NODES = parse_pod("h800:40x8")
H800 = Machine(HARDWARE["h800"], LATEST, 8)


def test_decode():
    found = decode_plans(V3, NODES, H800, 4096, least=20)
    rates = [one.tokens_per_second_device for one in found.best]
    assert rates == sorted(rates, reverse=True)
    assert all(one.tokens_per_second_user >= 20 and one.memory_bytes <= NODES.hardware.hbm_bytes for one in found.best)
    # DeepSeek's own service: 14.8 thousand tokens a second of a node, with 144 devices (open-infra-index); a bound.
    assert 14.8e3 < rates[0] * 8 < 2.5 * 14.8e3
    assert found.quickest is not None
    assert found.quickest.drafts == 1
    one = decode_plans(V3, NODES, H800, 4096, expert_devices=160, tokens=32).best
    assert {(plan.expert_devices, plan.tokens) for plan in one} == {(160, 32)}


def test_prefill():
    found = prefill_plans(V3, parse_pod("h800:4x8"), H800, 4096)
    best = found.best[0]
    assert best.tokens % 4096 == 0
    assert best.tokens_per_second_device == pytest.approx(2 * best.tokens / best.seconds)
    assert best.bytes_per_axis["scale_out"] > 0
    alone = prefill_plans(V3, parse_pod("h800:1x8"), H800, 4096)
    assert alone.best == []  # 671 GB do not fit on eight
    with pytest.raises(ConfigError, match=r"--tokens \(5000\) must be whole prompts"):
        prefill_plans(V3, NODES, H800, 4096, tokens=5000)
    with pytest.raises(ConfigError, match=r"--expert-devices \(40\) must divide the 256 experts"):
        prefill_plans(V3, NODES, H800, 4096, expert_devices=40)


def test_groups_are_parts_of_a_node_or_whole_nodes():
    assert group_sizes(V3, NODES) == [1, 2, 4, 8, 16, 32, 40, 64, 80, 160]
    with pytest.raises(ConfigError, match=r"--expert-devices \(12\).*one of 1, 2, 4, 8"):
        decode_plans(V3, NODES, H800, 4096, expert_devices=12)
