"""Runs compared loss by loss: the numbers, and which runs in folders are taken as they are."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from dsv3_jax.config import ConfigError, MeshConfig, ScheduleConfig, to_json
from experiments import loss_study
from experiments.loss_study import Study, compare, losses_of, moving_average, run_of, table_of_errors

STEPS = 200
BASELINE = np.linspace(8, 4, STEPS)


def test_moving_average_by_hand():
    np.testing.assert_allclose(moving_average(np.array([4.0, 2.0, 3.0])), [4, 3.8, 3.72])


def test_errors_of_a_run_that_drifts():
    """1% above the baseline from the middle on, after a wild start that does not count."""
    losses = BASELINE * np.where(np.arange(STEPS) < 100, 1, 1.01)
    told = compare(losses, BASELINE)
    assert told["largest_error"] == pytest.approx(0.01, rel=1e-3)
    assert told["mean_error"] == told["mean_difference"]
    assert 0.0045 < told["mean_error"] < 0.0056
    assert told["difference_at_end"] == pytest.approx(0.01)
    wild = np.concatenate([BASELINE[:5] * 1.05, BASELINE[5:]])
    assert compare(wild, BASELINE)["mean_error"] < compare(losses, BASELINE)["mean_error"] / 2
    assert compare(2 * BASELINE - losses, BASELINE)["mean_difference"] < 0


def _write_run(folder, config, losses):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(to_json(config))
    records = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    records.insert(3, {"step": 3, "validation_loss": 1.0})  # no training loss
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def untrained(monkeypatch):
    """Fails what trains."""
    monkeypatch.setattr(loss_study, "train", lambda config, folder, say: pytest.fail(f"{folder} is trained"))


def test_finished_runs_are_read_and_compared(tmp_path, untrained, monkeypatch):
    configs = {value: run_of("tiny", STEPS, precision=value) for value in ("bf16", "fp8")}
    study = Study("precision", "bf16", configs, (0, 7), tmp_path)
    for (value, seed), factor in {("bf16", 0): 1, ("fp8", 0): 1.01, ("bf16", 7): 2, ("fp8", 7): 1.96}.items():
        _write_run(tmp_path / f"{value}-seed{seed}", dataclasses.replace(configs[value], seed=seed), BASELINE * factor)
    curves = study.losses()
    np.testing.assert_array_equal(curves["bf16", 7], 2 * BASELINE)
    monkeypatch.setattr(Study, "_held_out", lambda study, seed: [])
    result = study.result(curves)
    assert [(row["precision"], row["seed"]) for row in result["rows"]] == [("fp8", 0), ("fp8", 7)]
    assert table_of_errors(study, result)[2:] == ["| fp8 | 0 | 1.000% | 1.000% | +1.000% | +1.000% |",
                                                  "| fp8 | 7 | 2.000% | 2.000% | -2.000% | -2.000% |"]


@pytest.mark.parametrize(("changes", "named"), [
    ({"precision": "fp8"}, "precision: bf16 -> fp8"),
    ({"seed": 1}, "seed: 0 -> 1"),
    ({"steps": 100}, "steps: 200 -> 100"),
    ({"mesh": MeshConfig(combine="logfmt8")}, "mesh.combine: plain -> logfmt8"),
    ({"schedule": ScheduleConfig(warmup_steps=7)}, "schedule.warmup_steps: 5 -> 7"),
])
def test_a_run_of_another_configuration_is_refused(tmp_path, untrained, changes, named):
    config = run_of("tiny", STEPS, precision="bf16")
    _write_run(tmp_path / "run", config, BASELINE)
    with pytest.raises(ConfigError, match=named):
        losses_of(dataclasses.replace(config, **changes), tmp_path / "run")


def test_settings_that_an_older_run_does_not_name_have_their_defaults(tmp_path, untrained):
    config = run_of("tiny", STEPS)
    _write_run(tmp_path / "run", config, BASELINE)
    saved = json.loads(to_json(config))
    del saved["mesh"]["combine"]
    saved["report"]["sample_every"] = 10
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    np.testing.assert_array_equal(losses_of(config, tmp_path / "run"), BASELINE)


def test_what_is_missing_is_trained(tmp_path, monkeypatch):
    config = run_of("tiny", STEPS)
    _write_run(tmp_path / "run", config, BASELINE[:50])

    def train(config, folder, say):
        _write_run(folder, config, BASELINE)
        return {"finished": True}
    monkeypatch.setattr(loss_study, "train", train)
    np.testing.assert_array_equal(losses_of(config, tmp_path / "run"), BASELINE)
    monkeypatch.setattr(loss_study, "train", lambda config, folder, say: {"finished": False})
    with pytest.raises(SystemExit, match="stopped by a signal"):
        losses_of(config, tmp_path / "other")
