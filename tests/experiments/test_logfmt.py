"""logfmt.py as a person runs it, and the experts' outputs that it takes from a model."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.nn.model import model_structure, split_model
from dsv3_jax.presets import RUNS
from experiments.logfmt import error_of, routed_outputs
from tests.experiments.test_scripts import SMALL, _run

pytestmark = pytest.mark.slow


def test_outputs_are_those_of_the_model():
    """The layers walked one by one end where the model does, and a token's experts are not one expert."""
    config = RUNS["tiny"].model
    _, params, router_bias = jax.jit(lambda: split_model(config, 0, "float32"))()
    tokens = jnp.arange(16).reshape(2, 8) % config.vocab_size

    @jax.jit
    def run(params, router_bias):
        model = nnx.merge(model_structure(config, "float32"), params, router_bias)
        one, together, hidden = routed_outputs(model, tokens)
        return one, together, model.norm(hidden), model(tokens, mtp=False).hidden_BTD
    one, together, normed, expected = run(params, router_bias)
    np.testing.assert_allclose(normed, expected, rtol=1e-5, atol=1e-6)  # the same steps, in another order of float32
    assert one.shape == together.shape == (config.num_moe_layers, 2, 8, config.hidden_size)
    assert np.abs(np.asarray(one)).min(axis=-1).max() > 0
    assert not np.allclose(one, together, rtol=0.1)


def test_errors_are_relative_to_all_numbers():
    """Two tiles; the standard error is that of the sums 1 and -1 of tiles, around their mean."""
    x = np.ones((1, 256), np.float32)
    rounded = x.copy()
    rounded[0, 0], rounded[0, 128], rounded[0, 130] = 2, 0, 1
    assert error_of(rounded, x) == pytest.approx((np.sqrt(2 / 256), 0, np.sqrt(2) / 256, 1 / 256))


def test_rounds_what_a_run_says(tmp_path):
    (tmp_path / "text").mkdir()
    for part in range(10):
        (tmp_path / "text" / f"{part}.txt").write_text("".join(f"{n} times {part} is {n * part}.\n" for n in range(60)))
    _run("train.py", *SMALL, "--data.path", tmp_path / "text", "--steps", 2, "--run-dir", tmp_path / "run",
         "--model.num-nextn-predict-layers", 0, "--report.evaluate-every", 0)
    told = json.loads(_run("logfmt.py", "--run", tmp_path / "run", "--bits", 5, 10, "--tiles", 256, "--cost-rows", 8,
                           "--cost-width", 256, "--cost-bits", 10, "--out", tmp_path / "logfmt", "--json")[0])
    kinds = list(dict.fromkeys(row["data"] for row in told["errors"]))
    assert kinds == ["an expert's output", "sum over a token's experts", "Gaussian", "Student t, 3 degrees"]
    for kind in kinds:
        rows = {(row["format"], row["rounded_as"]): row for row in told["errors"] if row["data"] == kind}
        assert len(rows) == 2 * 2 + 4
        rms = {name: row["rms"] for (name, rounded_as), row in rows.items() if rounded_as == "numbers"}
        assert rms["BF16"] < rms["LogFMT-10"] < rms["E4M3"] < rms["E5M2"] < rms["LogFMT-5"]
        coarse = (rows["LogFMT-5", rounded_as] for rounded_as in ("numbers", "logarithms"))
        assert [row["bias"] < 0 for row in coarse] == [True, False]
    cost, = told["costs"]
    assert cost["bytes_saved"] == 8 * 256 * 2 - 8 * 2 * 164
    assert cost["seconds"] > 0
    assert cost["transfer_saved"]["InfiniBand, 50 GB/s"] == cost["bytes_saved"] / 50e9
    assert (tmp_path / "logfmt.png").read_bytes().startswith(b"\x89PNG")
    assert "| Gaussian | LogFMT-10 | 10.25 |" in (tmp_path / "logfmt.md").read_text()


def test_bits_that_are_none_are_named(tmp_path):
    _, err = _run("logfmt.py", "--bits", 3, "--cost-rows", 0, status=2)
    assert "--bits (3)" in err
    assert "Traceback" not in err
