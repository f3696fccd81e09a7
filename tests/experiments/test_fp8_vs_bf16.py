"""The comparison of precisions on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


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
