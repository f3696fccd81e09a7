"""score.py against the logits that Hugging Face transformers gives for the same files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.experiments.test_scripts import _run

GOLDENS = Path(__file__).parents[1] / "goldens" / "hugging_face"


@pytest.mark.parametrize(("case", "mesh"), [
    ("float8", ()), ("yarn", ("--mesh.simulate-devices", "4", "--mesh.scale-up", "4", "--rows", "2"))])
def test_scores_a_published_model_as_transformers_does(case, mesh, tmp_path):
    """Tolerance: the project's for parity, 1e-5 of the largest logit; log-probabilities follow from the logits."""
    with np.load(GOLDENS / case / "expected.npz") as expected:
        tokens, logits = expected["tokens"], expected["logits"]
    np.save(tmp_path / "ids.npy", tokens)
    out, err = _run("score.py", GOLDENS / case, "--tokens", tmp_path / "ids.npy", "--out", tmp_path / "scores.npz",
                    "--precision", "float32", "--json", *mesh)
    told = json.loads(out)
    assert f"scored rows {len(tokens)}/{len(tokens)}" in err
    with np.load(tmp_path / "scores.npz") as scores:
        np.testing.assert_array_equal(scores["tokens"], tokens)
        assert scores["logits"].dtype == scores["logprobs"].dtype == np.float32
        np.testing.assert_allclose(scores["logits"], logits, rtol=0, atol=1e-5 * np.abs(logits).max())
        wide = scores["logits"][:, :-1].astype(np.float64)
        normed = wide - np.log(np.sum(np.exp(wide), axis=-1, keepdims=True))
        chosen = np.take_along_axis(normed, tokens[:, 1:, None].astype(int), axis=-1)[..., 0]
        np.testing.assert_allclose(scores["logprobs"], chosen, atol=1e-5)  # float32 sums over the vocabulary
    assert told["mean_logprob"] == pytest.approx(chosen.mean(), abs=1e-5)


@pytest.mark.parametrize(("tokens", "arguments", "words"), [
    pytest.param([[1, 10 ** 6]], (), "id 1000000 outside the model's vocabulary", id="vocabulary"),
    pytest.param([[0.5]], (), "give integers", id="fractions", marks=pytest.mark.slow),
    pytest.param([list(range(8)) * 1000], (), "more than the model's window", id="window", marks=pytest.mark.slow),
    pytest.param([[1, 2]], ("--mesh.scale-up", "3"), "must be divisible by", id="mesh")])
def test_mistakes_are_explained_and_leave_nothing(tokens, arguments, words, tmp_path):
    np.save(tmp_path / "ids.npy", np.array(tokens))
    _, err = _run("score.py", GOLDENS / "yarn", "--tokens", tmp_path / "ids.npy", "--out", tmp_path / "scores.npz",
                  *arguments, status=2)
    assert words in err
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"ids.npy"}
