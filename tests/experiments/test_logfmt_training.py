"""logfmt_training.py on a tiny model: what is combined in few bits trains otherwise, and the report tells."""

from __future__ import annotations

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from dsv3_jax.config import BatchConfig, ConfigError, DataConfig
from dsv3_jax.mesh import make_mesh
from dsv3_jax.presets import RUNS
from dsv3_jax.training import loop
from experiments import logfmt_training, loss_study


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The tiny preset as one layer, on text of its own and two of the devices; experts whose outputs weigh."""
    text = tmp_path / "text"
    text.mkdir()
    for part in range(10):
        (text / f"{part}.txt").write_text("".join(f"{n} times {part} is {n * part}.\n" for n in range(40)))
    tiny = RUNS["tiny"]
    model = dataclasses.replace(tiny.model, num_hidden_layers=1, first_k_dense_replace=0,
                                num_nextn_predict_layers=0, initializer_range=0.1)
    data = DataConfig(path=str(text), tokenizer="bytes", validation_share=0.2, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setitem(RUNS, "tiny", dataclasses.replace(
        tiny, model=model, data=data, batch=BatchConfig(sequences=2, sequence_length=32), recompute="none"))
    monkeypatch.setattr(logfmt_training.runtime, "start", lambda mesh, keep_casts: None)
    for module in (loop, loss_study):
        monkeypatch.setattr(module, "make_mesh", lambda config: make_mesh(config, jax.devices()[:2]))


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["logfmt_training.py", "--preset", "tiny", *map(str, arguments)])
    logfmt_training.main()


@pytest.mark.slow
def test_fewer_bits_drive_training_further_apart(small, monkeypatch, tmp_path, capsys):
    _run(monkeypatch, "--steps", 2, "--seeds", 1, "--combines", "logfmt4", "float32", "--mesh.scale-up", 1,
         "--mesh.simulate-devices", "None", "--runs", tmp_path / "runs", "--out", tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed.count("step 2/2 loss") == 3
    made = json.loads((tmp_path / "out.json").read_text())
    assert [(row["combine"], row["seed"]) for row in made["rows"]] == [("logfmt4", 1), ("float32", 1)]
    for kind, figure in (("rows", "largest_error"), ("same_weights", "difference")):
        coarse, fine = (abs(row[figure]) for row in made[kind])
        assert fine < coarse / 3 < 0.01, kind
    plain, logfmt4, float32 = (loss_study._losses(tmp_path / "runs" / f"{combine}-seed1" / "metrics.jsonl")
                               for combine in ("plain", "logfmt4", "float32"))
    assert np.all(logfmt4 != plain)
    assert np.any(float32 != plain)
    assert made["about"]["mesh"]["scale_out"] == 2
    assert (tmp_path / "out.md").read_text() in printed
    assert "| logfmt4 | 1 |" in printed
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_one_device_combines_nothing(monkeypatch):
    with pytest.raises(ConfigError, match=r"\(1\*1\*1=1\) must be above 1"):
        _run(monkeypatch, "--mesh.scale-out", 1, "--mesh.scale-up", 1)
