"""The exchange as a script: measured on simulated devices, compiled for a small pod."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
SMALL = ["--preset", "tiny", "--tokens", "32", "--capacity-factor", "4"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "experiments/dispatch_combine.py", *SMALL, *arguments], cwd=ROOT,
                          env=ENVIRONMENT, capture_output=True, text=True)


def test_measures_on_the_devices_at_hand(tmp_path):
    done = run("--measure", "--mesh.scale-out", "2", "--mesh.scale-up", "2", "--mesh.simulate-devices", "4",
               "--transports", "padded", "--json", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)["measured"]
    assert 0.02 < row["error"] < 0.03  # that of E4M3
    assert min(row["plan_ms"], row["dispatch_ms"], row["combine_ms"], row["dispatch_gb_s"]) > 0
    assert "| padded |" in (tmp_path / "out.md").read_text()


@pytest.mark.slow
def test_compiles_for_a_pod():
    done = run("--pods", "h100:2x2", "--transports", "padded", "ragged", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    padded, ragged = (next(row for row in told["compiled"] if (row["transport"], row["leg"]) == (name, "dispatch"))
                      for name in ("padded", "ragged"))
    assert padded["slow_ratio"] > 1.1  # room for all 32 tokens
    assert ragged["slow_ratio"] == pytest.approx(1)
    assert ragged["slow_ms"] == pytest.approx(1e3 * ragged["slow"] / 50e9)
    assert [row["gpus"] for row in told["deepep"]] == [16, 32, 64, 128]


@pytest.mark.parametrize(("arguments", "message"), [
    (["--pods", "h100:3x8"], "24 devices do not divide the 16 experts of --preset tiny: take a pod or mesh with 8"),
    (["--measure"], "--measure needs all 8 devices in one expert-parallel group of at least 2"),
    (["--measure", "--mesh.scale-out", "2", "--mesh.scale-up", "2", "--mesh.simulate-devices", "4",
      "--capacity-factor", "1"], "--capacity-factor 1.0: these choices take")])
def test_what_cannot_run_is_told_first(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
