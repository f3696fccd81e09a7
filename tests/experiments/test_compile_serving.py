"""The script that compiles serving for pods that are not there."""

from __future__ import annotations

import importlib.util
import json

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.presets import DEPLOYMENTS, ServingDeployment
from experiments import compile_serving
from tests.experiments.in_process import run_script

OPTIONS = ("--preset", "tiny", "--rows", "4", "--context", "64", "--page-size", "32", "--chunk", "16", "--precision",
           "bf16")


def run(monkeypatch, capfd, *options: str) -> tuple[dict, str]:
    return run_script(compile_serving, monkeypatch, capfd, *OPTIONS, *options)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra aot")
def test_programs_and_what_they_send(monkeypatch, capfd, tmp_path):
    small = ServingDeployment(devices=4, nodes=2, redundant=8, by_group=False)
    monkeypatch.setitem(DEPLOYMENTS, "prefill", small)
    monkeypatch.setitem(DEPLOYMENTS, "decode144", small)
    told, _ = run(monkeypatch, capfd, "--deployment", "prefill", "decode144", "--way", "plain", "--out",
                  str(tmp_path / "report"))
    rows = told["results"]
    assert [(row["deployment"], row["program"], row["rows"], row["drafts"]) for row in rows] == [
        ("prefill", "chunk", 4, 1), ("prefill", "move", 4, 1), ("decode144", "step", 4, 0), ("decode144", "step", 2, 1),
        ("decode144", "move", 4, 1)]
    plain, drafted = rows[2:4]
    assert plain["tokens"] == drafted["tokens"] == 4
    assert drafted["expert_layers"] == plain["expert_layers"] + 1
    assert rows[0]["expert_layers"] == plain["expert_layers"]  # of a chunk nobody wants what the module predicts
    for row in (rows[0], plain, drafted):
        for domain in ("slow", "fast"):
            compiled, alone = (row[key]["bytes_per_token_and_layer"][domain] for key in ("compiled", "rows_alone"))
            assert compiled > alone > 0
    assert json.loads((tmp_path / "report.json").read_text()) == told
    assert (tmp_path / "report.md").read_text().count("| decode144 | step | 2, 1 | rows alone |") == 1


def test_what_cannot_be_compiled_is_refused(monkeypatch, capfd):
    with pytest.raises(ConfigError, match=r"--rows \(6\) must be divisible by 4"):
        run(monkeypatch, capfd, "--rows", "6")
    with pytest.raises(ConfigError, match="--way"):
        run(monkeypatch, capfd, "--way", "fast")
    with pytest.raises(ConfigError, match="--deployment"):
        run(monkeypatch, capfd, "--deployment", "decode")
