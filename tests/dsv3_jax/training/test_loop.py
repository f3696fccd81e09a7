"""Whole runs: resuming bit for bit, other meshes, crashes, foreign files, and a loss that is not a number."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.config import (
    BatchConfig,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    MeshConfig,
    ReportConfig,
    RunConfig,
    ScheduleConfig,
)
from dsv3_jax.mesh import make_mesh
from dsv3_jax.presets import MODELS, RUNS
from dsv3_jax.training import loop
from dsv3_jax.training.checkpoint import Checkpoints, named_leaves
from dsv3_jax.training.evaluate import Evaluator
from dsv3_jax.training.loop import train
from dsv3_jax.training.metrics import Diverged
from dsv3_jax.training.step import compile_train_step
from dsv3_jax.training.tokens import TokenSplit


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A small text that a model can learn: counting, in words."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    folder = tmp_path_factory.mktemp("corpus")
    for part in range(12):
        lines = [" ".join(words[int(digit)] for digit in str(number)) for number in range(part * 300, part * 300 + 300)]
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tiny(corpus, tmp_path_factory) -> RunConfig:
    return dataclasses.replace(
        RUNS["tiny"], model=dataclasses.replace(MODELS["tiny"], num_hidden_layers=1, first_k_dense_replace=0),
        steps=20, recompute="none",
        batch=BatchConfig(sequences=8, sequence_length=32),
        data=DataConfig(path=str(corpus), tokenizer="bytes", validation_share=0.2,
                        cache_dir=str(corpus.parent / "cache")),
        checkpoint=CheckpointConfig(every=10, keep=5), mesh=MeshConfig(data=1))


@pytest.fixture(autouse=True)
def one_device_unless_asked(monkeypatch):
    """A mesh takes as many of the 8 simulated devices as it names."""
    def some(config, devices=None):
        return make_mesh(config, jax.devices()[:(config.data or 1) * config.expert_parallel])
    monkeypatch.setattr(loop, "make_mesh", some)


@functools.cache
def _compiled(config, mesh):
    return compile_train_step(config, mesh)


@functools.cache
def _evaluation(config, mesh):
    """What `Evaluator` compiles for all that have the same configuration but for what does not go into programs."""
    return Evaluator(config, mesh, TokenSplit(np.arange(100), None, None))._total_nll


@pytest.fixture(autouse=True)
def one_program_of_each_kind(monkeypatch):
    """Tracing a step costs more than these runs; what is left out here does not go into the programs."""
    def programs_of(config):
        plain = RunConfig(model=config.model)
        return dataclasses.replace(config, steps=1, seed=0, data=plain.data, report=plain.report,
                                   checkpoint=plain.checkpoint, schedule=plain.schedule)

    def evaluator(config, mesh, split):
        made = Evaluator(config, mesh, split)
        made._total_nll = _evaluation(programs_of(config), mesh)
        return made
    monkeypatch.setattr(loop, "compile_train_step", lambda config, mesh: _compiled(programs_of(config), mesh))
    monkeypatch.setattr(loop, "Evaluator", evaluator)


def _quiet(line: str) -> None:
    pass


def _records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def _losses(run_dir: Path) -> list[float]:
    return [r["loss"] for r in _records(run_dir) if "loss" in r]


def _final_state(config: RunConfig, run_dir: Path) -> dict[str, np.ndarray]:
    mesh = loop.make_mesh(config.mesh)
    state, _ = Checkpoints(run_dir / "checkpoints", keep=5).restore(config, mesh)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


def test_resumed_run_equals_an_unbroken_one_bit_for_bit(tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = train(tiny, whole, _quiet)
    train(dataclasses.replace(tiny, steps=10), parts, _quiet)
    said: list[str] = []
    resumed = train(tiny, parts, said.append)
    assert resumed["resumed_from"] == 10
    assert any("resuming from step 10" in line for line in said)
    assert _losses(parts) == _losses(whole)
    assert len(_losses(whole)) == 20
    a, b = _final_state(tiny, whole), _final_state(tiny, parts)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert any(name.startswith("ema") for name in a)
    assert any("e_score_correction_bias" in name and np.abs(a[name]).max() > 0 for name in a)
    assert summary["loss"] == resumed["loss"]


def test_it_learns_and_reports(tiny, tmp_path):
    config = dataclasses.replace(tiny, steps=40, report=ReportConfig(evaluate_every=20, sample_every=20,
                                                                     sample_prompt="one two", sample_tokens=5,
                                                                     tensorboard=True))
    said: list[str] = []
    summary = train(config, tmp_path / "run", said.append)
    records = _records(tmp_path / "run")
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "validation_bits_per_byte" in r]
    assert [r["step"] for r in steps] == list(range(1, 41))
    assert [r["step"] for r in evaluations] == [20, 40]
    assert {"step", "loss", "mtp_loss", "bits_per_byte", "learning_rate", "grad_norm", "step_ms", "tokens_per_second",
            "load_max_over_mean", "dead_experts", "dispatch_rounds"} <= steps[0].keys()
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert steps[-1]["mtp_loss"] < 0.6 * steps[0]["mtp_loss"]
    assert evaluations[1]["validation_bits_per_byte"] < evaluations[0]["validation_bits_per_byte"]
    assert summary["validation_bits_per_byte"] == evaluations[1]["validation_bits_per_byte"]
    assert any(line.startswith("sample step 20") for line in said)
    assert sum(line.startswith("step ") for line in said) == 40
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents*"))
    loads = [json.loads(line) for line in (tmp_path / "run" / "expert_load.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(np.sum(loads[0]["share"], axis=-1), 1, atol=1e-3)


# With a layer of every kind, and text sampled on 8 devices, it compiles for more than a minute.
@pytest.mark.parametrize(("model", "steps", "sampled"), [
    ({"num_nextn_predict_layers": 0}, 10, False),
    pytest.param({"num_hidden_layers": 2, "first_k_dense_replace": 1}, 20, True, marks=pytest.mark.slow)],
    ids=["experts", "a layer of every kind, and samples"])
def test_eight_devices_give_the_losses_of_one_and_checkpoints_move(model, steps, sampled, tiny, tmp_path):
    """Float32: losses of 20 steps differ by rounding alone (4e-7 seen). Then the state saved on 8 devices continues on
    one, and that of one device on 8; restoring on any mesh gives the same bits. With the least capacity, most steps on
    8 devices dispatch in several rounds. On 8 and on 2, pairs of devices share sequences."""
    tiny = dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, **model), steps=steps)
    eight = dataclasses.replace(
        tiny, mesh=MeshConfig(data=1, scale_out=2, scale_up=2, context=2, capacity_factor=1.0),
        report=ReportConfig(sample_every=steps if sampled else 0, sample_prompt="one two", sample_tokens=2))
    said: list[str] = []
    summaries = [train(tiny, tmp_path / "one", _quiet), train(eight, tmp_path / "eight", said.append)]
    assert any(line.startswith("mesh pipe=1 data=1 scale_out=2 scale_up=2 context=2 ") for line in said)
    assert any(line.startswith(f"sample step {steps}") for line in said) == sampled
    one, other = (summary["validation_bits_per_byte"] for summary in summaries)
    assert other == pytest.approx(one, rel=1e-5)
    rounds = {folder: [r["dispatch_rounds"] for r in _records(tmp_path / folder) if "loss" in r]
              for folder in ("one", "eight")}
    assert max(rounds["one"]) == 1
    assert np.median(rounds["eight"]) > 1
    np.testing.assert_allclose(_losses(tmp_path / "eight"), _losses(tmp_path / "one"), rtol=3e-6)
    two = dataclasses.replace(tiny, mesh=MeshConfig(data=1, context=2))
    saved = _final_state(eight, tmp_path / "eight")
    for config in (tiny, two):
        for name, value in _final_state(config, tmp_path / "eight").items():
            np.testing.assert_array_equal(value, saved[name], err_msg=name)
    for folder, config in (("one", eight), ("eight", tiny)):
        longer = dataclasses.replace(config, steps=steps + 2)
        assert train(longer, tmp_path / folder, _quiet)["resumed_from"] == steps
    np.testing.assert_allclose(_losses(tmp_path / "eight"), _losses(tmp_path / "one"), rtol=3e-6)


def test_another_configuration_is_refused(tiny, tmp_path):
    train(dataclasses.replace(tiny, steps=2), tmp_path / "run", _quiet)
    other = dataclasses.replace(tiny, seed=1, batch=BatchConfig(sequences=4, sequence_length=32))
    with pytest.raises(ConfigError, match=r"batch.sequences: 8 -> 4; seed: 0 -> 1.*--run-dir"):
        train(other, tmp_path / "run", _quiet)


def test_truncated_and_foreign_checkpoints_are_named(tiny, tmp_path):
    config = dataclasses.replace(tiny, steps=4, checkpoint=CheckpointConfig(every=2, keep=5))
    train(config, tmp_path / "run", _quiet)
    latest = tmp_path / "run" / "checkpoints" / "4"
    for file in (latest / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"checkpoints/4 cannot be read.*--resume-from 2"):
        train(dataclasses.replace(config, steps=6), tmp_path / "run", _quiet)
    assert train(dataclasses.replace(config, steps=6), tmp_path / "run", _quiet, resume_from=2)["resumed_from"] == 2
    assert Checkpoints(tmp_path / "run" / "checkpoints", keep=5).steps() == [2, 4, 6]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6" / "about")
    with pytest.raises(ConfigError, match=r"checkpoints/6 cannot be read.*--resume-from 4"):
        train(dataclasses.replace(config, steps=8), tmp_path / "run", _quiet)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 5.*\[2, 4, 6\]"):
        train(dataclasses.replace(config, steps=8), tmp_path / "run", _quiet, resume_from=5)


def test_loss_that_is_not_a_number_stops_the_run(tiny, tmp_path):
    config = dataclasses.replace(
        tiny, checkpoint=CheckpointConfig(every=2),
        schedule=dataclasses.replace(tiny.schedule, peak_learning_rate=1e38, warmup_steps=0))
    with pytest.raises(Diverged, match=r"between steps \d+ and \d+"):
        train(config, tmp_path / "run", _quiet)
    for step in Checkpoints(tmp_path / "run" / "checkpoints", keep=5).steps():
        assert all(np.isfinite(r["loss"]) for r in _records(tmp_path / "run") if r["step"] <= step)


def test_batch_that_does_not_divide_is_named(tiny, tmp_path):
    config = dataclasses.replace(tiny, mesh=MeshConfig(data=1, scale_out=2, scale_up=4),
                                 batch=BatchConfig(sequences=12, sequence_length=32))
    with pytest.raises(ConfigError, match=r"12/1=12.* 8 devices"):
        train(config, tmp_path / "run", _quiet)


def test_growing_batch_counts_its_sequences(tiny, tmp_path):
    config = dataclasses.replace(
        tiny, model=dataclasses.replace(tiny.model, num_nextn_predict_layers=0), steps=12,
        schedule=ScheduleConfig(warmup_steps=2, peak_learning_rate=1e-3),
        batch=BatchConfig(sequences=8, sequence_length=32, micro_batches=4, ramp_from=2, ramp_until=0.5),
        checkpoint=CheckpointConfig(every=5, keep=5))
    train(config, tmp_path / "run", _quiet)
    tokens = [round(r["tokens_per_second"] * r["step_ms"] / 1e3) for r in _records(tmp_path / "run") if "loss" in r]
    assert tokens[0] == 2 * 32
    assert tokens[-1] == 8 * 32
    assert tokens == sorted(tokens)
