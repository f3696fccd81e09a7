"""The planner's script: what it prints, and that other scripts take its layouts."""

from __future__ import annotations

import sys

import pytest

from dsv3_jax.codesign.pods import parse_pod
from dsv3_jax.config import ConfigError
from experiments import compile_for_pod, plan, train
from tests.experiments.in_process import run_script


def run(monkeypatch, capfd, *options: str) -> tuple[dict, str]:
    return run_script(plan, monkeypatch, capfd, *options)


SMALL = ("--preset", "deepseek_v2_lite", "--pod", "h100:1x8", "--sequences", "64")


def test_training(monkeypatch, capfd):
    told, text = run(monkeypatch, capfd, *SMALL, "--pipe", "1", "--explain")
    for key in ("layout", "step_seconds", "components", "mfu_causal", "tokens_per_second_per_device", "memory_bytes",
                "bytes_per_axis", "binding_resource"):
        assert told[key], key
    assert sum(told["components"].values()) == pytest.approx(told["step_seconds"])
    assert told["tokens_per_second_per_device"] == pytest.approx(64 * 4096 / told["step_seconds"] / 8)
    assert told["days"] == pytest.approx(14.8e12 / (64 * 4096 / told["step_seconds"]) / 86400)
    assert told["dollars"] == pytest.approx(2 * told["days"] * 24 * 8)
    assert told["runs_today"] is True
    assert text.count("\nstep_seconds ") == 5
    assert "DeepGEMM" in text  # explained


def test_other_scripts_take_the_layout(monkeypatch, capfd):
    told, _ = run(monkeypatch, capfd, *SMALL, "--pipe", "1")
    options = ["--preset", "deepseek_v2_lite", "--batch.sequences", "64", "--batch.ramp-from", "None", *told["options"]]
    config = train.parse(options).config
    layout = told["layout"]
    assert (config.mesh.scale_up, config.mesh.data, config.batch.micro_batches, config.precision, config.recompute) == (
        layout["scale_up"], layout["data"], layout["micro_batches"], layout["precision"], layout["recompute"])
    compiled = compile_for_pod.parse([*options, "--pod", "h100:1x8"]).config
    assert compiled == config
    compile_for_pod.checked_mesh(config, parse_pod("h100:1x8"))


def test_serving(monkeypatch, capfd):
    told, text = run(monkeypatch, capfd, "--goal", "decode", "--pod", "h800:8x8", "--least", "10")
    assert told["tokens_per_second_per_node"] == pytest.approx(8 * told["tokens_per_second_per_device"])
    assert told["tokens_per_second_user"] >= 10
    assert "quickest for one user" in text
    told, _ = run(monkeypatch, capfd, "--goal", "prefill", "--pod", "h800:4x8")
    assert told["layout"]["expert_devices"] <= 32
    assert told["binding_resource"]


@pytest.mark.parametrize(("options", "message"), [
    (("--pod", "h800:1x8"), r"none of \d+ layouts fits 79.1 GiB a device; the smallest needs"),
    (("--goal", "decode", "--pod", "h800:8x8", "--least", "1e6"), r"--least \(1e\+06\).*ask for less"),
    (("--goal", "decode", "--pod", "h800:1x8"), "--pod h800:1x8: none of .* fits"),
    (("--imbalance", "0.5"), r"--imbalance \(0.5\) must be at least 1"),
    (("--pod", "h801:1x8"), "hardware h801 is unknown"),
    (("--kernels", "best"), "kernels best is unknown")])
def test_mistakes_are_told(monkeypatch, options, message):
    monkeypatch.setattr(sys, "argv", ["plan.py", "--pipe", "1", *options])
    with pytest.raises(ConfigError, match=message):
        plan.main()
