"""The converter as a person runs it, and a run that begins from converted weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.presets import MODELS
from tests import oracle
from tests.published import in_format, published_from_oracle, read_bytes, save, small_config_json

ROOT = Path(__file__).resolve().parents[2]
TINY = MODELS["tiny"]


def _run(script: str, *arguments: object, status: int = 0) -> tuple[str, str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
                                "JAX_COMPILATION_CACHE_DIR": str(ROOT / "tests" / ".cache"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(ROOT / "experiments" / script), *map(str, arguments)], text=True,
                          env=environment, capture_output=True, cwd=ROOT, check=False, timeout=400)
    assert done.returncode == status, done.stderr[-3000:] + done.stdout[-3000:]
    assert "Traceback" not in done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A tiny model in bfloat16."""
    tensors = in_format(published_from_oracle(TINY, oracle.random_weights(TINY, seed=9)), "bfloat16")
    return save(tmp_path_factory.mktemp("model") / "published", small_config_json(TINY, False), tensors)


def test_dry_run_lists_deepseek_v3():
    out, err = _run("convert_checkpoint.py", "--dry-run", "--preset", "deepseek_v3", "--json")
    tensors = json.loads(out)
    assert len(tensors) == 91_991
    assert {"name": "model.layers.61.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "shape": [5, 56],
            "dtype": "float32"} in tensors
    assert "91991 tensors" in err


def test_there_and_back(published, tmp_path):
    out, err = _run("convert_checkpoint.py", published, tmp_path / "orbax", "--json")
    assert json.loads(out)["kind"] == "orbax"
    lines = [line for line in err.splitlines() if line.startswith("progress ")]
    assert lines
    assert lines[-1].split()[2] == f"{json.loads(out)['tensors']}/{json.loads(out)['tensors']}"
    out, _ = _run("convert_checkpoint.py", tmp_path / "orbax", tmp_path / "back")
    assert "done: " in out
    assert read_bytes(tmp_path / "back") == read_bytes(published)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--dry-run"], ["--preset"]),
    (["{published}", "{published}"], ["exists"]),
    (["{published}", "{tmp}/out", "--ema"], ["--ema", "run folder"]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (["--dry-run", "--preset", "deepseek_v4"], ["deepseek_v4", "deepseek_v3"]),
        (["{published}"], ["target"]),
        (["/no/such/folder", "{tmp}/out"], ["/no/such/folder", "safetensors"])]),
])
def test_mistakes_are_explained(published, arguments, words, tmp_path):
    filled = [argument.format(published=published, tmp=tmp_path) for argument in arguments]
    _, err = _run("convert_checkpoint.py", *filled, status=2)
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_begins_from_weights_and_becomes_a_model_again(published, tmp_path):
    """The first step's loss is that of the weights, on 8 devices as on 1; the run's checkpoint converts back."""
    text = tmp_path / "text"
    text.mkdir()
    for part in range(10):
        (text / f"{part}.txt").write_text("".join(f"{n} times {part} is {n * part}.\n" for n in range(300)))
    common = ["--preset", "tiny", "--batch.sequence-length", 32, "--data.validation-share", 0.2, "--data.path", text,
              "--steps", 2, "--init-from", published]
    losses = []
    for name, mesh in (("one", []), ("eight", ["--mesh.scale-out", 2, "--mesh.scale-up", 4,
                                               "--mesh.simulate-devices", 8])):
        out, _ = _run("train.py", *common, *mesh, "--run-dir", tmp_path / name)
        assert f"weights from {published}" in out
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append(records[0]["loss"])
    # Uniform guessing over 320 ids costs 5.77 nats, what a new tiny model starts with; random large weights cost more.
    assert losses[0] > 6.0
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[0]  # float32 sums in another order
    _run("convert_checkpoint.py", tmp_path / "one", tmp_path / "out", "--format", "bfloat16")
    assert read_bytes(tmp_path / "out").keys() == read_bytes(published).keys()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["num_hidden_layers"], written["bos_token_id"]) == (TINY.num_hidden_layers, 256)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_another_models_weights_are_refused(published, tmp_path):
    _, err = _run("train.py", "--preset", "tiny", "--model.v-head-dim", 8, "--model.topk-group", 1, "--init-from",
                  published, "--run-dir", tmp_path / "run", status=2)
    for word in ("v_head_dim: 16 there, 8 here", "topk_group: 2 there, 1 here", str(published)):
        assert word in err
    assert not (tmp_path / "run").exists()
