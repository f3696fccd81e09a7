"""The comparison of precisions: its numbers, and the script on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.fp8_vs_bf16 import compare, moving_average

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def test_moving_average_by_hand():
    np.testing.assert_allclose(moving_average(np.array([4.0, 2.0, 3.0])), [4, 3.8, 3.72])


def test_errors_of_a_run_that_drifts():
    """1% above the baseline from the middle on, after a wild start that does not count."""
    baseline = np.linspace(8, 4, 200)
    losses = baseline * np.where(np.arange(200) < 100, 1, 1.01)
    told = compare(losses, baseline)
    assert told["largest_error"] == pytest.approx(0.01, rel=1e-3)
    assert told["mean_error"] == told["mean_difference"]
    assert 0.0045 < told["mean_error"] < 0.0056
    assert told["difference_at_end"] == pytest.approx(0.01)
    wild = np.concatenate([baseline[:5] * 1.05, baseline[5:]])
    assert compare(wild, baseline)["mean_error"] < compare(losses, baseline)["mean_error"] / 2
    assert compare(2 * baseline - losses, baseline)["mean_difference"] < 0


@pytest.mark.slow
def test_trains_what_is_missing_and_reports(tmp_path):
    command = [sys.executable, "experiments/fp8_vs_bf16.py", "--preset", "tiny", "--steps", "3", "--seeds", "0",
               "--precisions", "fp8", "--runs", tmp_path / "runs", "--out", tmp_path / "out", "--json"]
    told = []
    for trains in (True, False):
        done = subprocess.run([*map(str, command)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert ("training" in done.stderr and "step 3/3" in done.stderr) == trains
        made = json.loads(done.stdout)
        told.append(made["rows"])
    assert told[0] == told[1]
    assert [(row["precision"], row["seed"]) for row in told[0]] == [("fp8", 0)]
    assert 0 < told[0][0]["largest_error"] < 0.01
    [row] = made["same_weights"]
    assert 0 < abs(row["difference"]) < 1e-3
    assert "| fp8 | 0 |" in (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
