"""The README's first command, whole: it learns, and its experts stay balanced because of the bias."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def _train(run_dir: Path, *arguments: str) -> tuple[dict, list[dict]]:
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, str(ROOT / "experiments" / "train.py"), "--preset", "quickstart", "--run-dir",
                          str(run_dir), "--json", *arguments], env=environment, check=True, stdout=subprocess.PIPE)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return json.loads(out.stdout), records


@pytest.mark.slow
def test_quickstart_reaches_its_figures(tmp_path):
    summary, records = _train(tmp_path / "on")
    evaluations = [r["validation_bits_per_byte"] for r in records if "validation_bits_per_byte" in r]
    assert summary["validation_bits_per_byte"] == evaluations[-1] < 1.9
    assert evaluations[-1] < evaluations[0] - 0.1  # still falling
    mtp = [r["mtp_loss"] for r in records if "mtp_loss" in r]
    assert np.mean(mtp[-50:]) < 0.6 * mtp[0]
    _, without = _train(tmp_path / "off", "--schedule.bias-speed", "0", "--steps", "300",
                        "--schedule.horizon-steps", "1400", "--report.evaluate-every", "0")
    balanced, unbalanced = (np.mean([r["load_max_over_mean"] for r in run if 200 < r["step"] <= 300
                                     and "load_max_over_mean" in r]) for run in (records, without))
    assert balanced < 1.6
    assert unbalanced > 2 * balanced
