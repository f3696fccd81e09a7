"""node_limit_training.py: what it trains, and its report on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.presets import MODELS
from experiments.node_limit_training import Arguments, finer, study_of

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def test_finer_experts_weigh_as_much():
    plain, fine = MODELS["quickstart"], finer(MODELS["quickstart"])
    assert (fine.n_routed_experts, fine.num_experts_per_tok, fine.n_group) == (64, 8, 8)
    for experts in ("n_routed_experts", "num_experts_per_tok", "n_shared_experts"):
        assert (getattr(fine, experts) * fine.moe_intermediate_size
                == getattr(plain, experts) * plain.moe_intermediate_size)


def test_runs_differ_in_the_limit_alone():
    study = study_of(Arguments(limits=(1, 4), seeds=(0,)))
    assert study.baseline == "8"
    assert {limit: config.model.topk_group for limit, config in study.configs.items()} == {"8": 8, "1": 1, "4": 4}
    assert len({(config.seed, config.steps, config.precision) for config in study.configs.values()}) == 1


@pytest.mark.parametrize("limit", [0, 8])
def test_limits_outside_are_refused(limit):
    with pytest.raises(ConfigError, match=rf"--limits {limit} must be from 1 to 7"):
        study_of(Arguments(limits=(limit,)))


@pytest.mark.slow
def test_trains_and_reports(tmp_path):
    command = [sys.executable, "experiments/node_limit_training.py", "--preset", "tiny", "--steps", "2", "--seeds", "0",
               "--limits", "2", "--runs", tmp_path / "runs", "--out", tmp_path / "out", "--json"]
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    [row] = told["rows"]
    assert (row["limit"], row["seed"]) == ("2", 0)
    assert row["largest_error"] > 0
    assert [row["limit"] for row in told["at_the_end"]] == ["8", "2"]
    assert told["at_the_end"][0]["validation_loss"] != told["at_the_end"][1]["validation_loss"]
    assert "| 2 | 0 |" in (tmp_path / "out.md").read_text()
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
