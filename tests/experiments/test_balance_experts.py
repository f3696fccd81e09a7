"""The script that balances experts: what it tells, where loads come from, and what it refuses."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from experiments import balance_experts
from tests.experiments.in_process import run_script

OWN = ("--preset", "quickstart", "--devices", "8", "--nodes", "2", "--redundant", "8", "--by-group")


def run(monkeypatch, capfd, *options: str) -> tuple[dict, str]:
    return run_script(balance_experts, monkeypatch, capfd, *options)


def test_named_deployments(monkeypatch, capfd):
    told, _ = run(monkeypatch, capfd, "--layers", "2")
    rows = {row["deployment"]: row for row in told["deployments"]}
    assert {name: (row["slots"], row["devices"], row["nodes"], row["groups"]) for name, row in rows.items()} == {
        "prefill": (288, 32, 4, 8), "decode144": (288, 144, 18, 1), "decode320": (320, 320, 40, 1),
        "decode72": (288, 72, 1, 1)}
    for row in rows.values():
        for which in ("mean", "worst"):
            assert row["before"][which] > row["greedy"][which] >= row["placed"][which] >= row["bound"][which] - 1e-9
        stay, follow, anew = (row["later"][choice] for choice in ("stay", "follow", "anew"))
        assert stay["replicas_moved"] == 0
        assert follow["mean"] <= anew["mean"] + 0.02 + 1e-9 < stay["mean"]
        assert follow["replicas_moved"] <= anew["replicas_moved"]
        sizes = [choice["bytes_inside_nodes"] + choice["bytes_between_nodes"] for choice in (follow, anew)]
        # A float8 expert of DeepSeek-V3: three matrices of 7168 x 2048, and 16 x 56 scales each.
        assert sizes == [choice["replicas_moved"] * 3 * (7168 * 2048 + 4 * 16 * 56) for choice in (follow, anew)]


@pytest.mark.parametrize("form", ["json", "csv", "jsonl"])
def test_measured_loads_are_read(monkeypatch, capfd, tmp_path, form):
    """Two layers: one balanced, one with a quarter of all tokens at one expert."""
    loads = [[1] * 16, [5] + [1] * 15]
    path = tmp_path / f"load.{form}"
    path.write_text({"json": json.dumps(loads), "csv": "\n".join(",".join(map(str, row)) for row in loads),
                     "jsonl": '{"step": 1, "share": [[1]]}\n' + json.dumps({"step": 2, "share": loads}) + "\n"}[form])
    told, _ = run(monkeypatch, capfd, *OWN, "--load", str(path), "--drift", "0", "--out", str(tmp_path / "report"))
    row = told["deployments"][0]
    assert row["layers"] == 2
    assert row["before"] == {"mean": pytest.approx((1 + 6 / 2.5) / 2), "worst": pytest.approx(6 / 2.5)}
    assert row["later"]["follow"]["replicas_moved"] == 0  # nothing has changed
    assert json.loads((tmp_path / "report.json").read_text()) == told
    assert "| own | 24 | 8 | 2 | 4 | 2 | 1.700, 2.400 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_drawn_loads(monkeypatch):
    def drawn(*options: str) -> np.ndarray:
        arguments = balance_experts.Arguments(layers=50, **dict(zip(("skew", "amount"), options, strict=True)))
        return balance_experts.loads_of(arguments, balance_experts.MODELS["deepseek_v3"])
    assert np.std(np.log(drawn("lognormal", 0.7))) == pytest.approx(0.7, rel=0.05)  # 12,800 draws: within 0.6%
    np.testing.assert_allclose(np.sort(drawn("zipf", 1.5))[:, ::-1], np.tile(np.arange(1.0, 257) ** -1.5, (50, 1)))
    hot = drawn("hot", 30)
    assert np.all(np.sort(hot)[:, -2:] == [1, 30])
    assert len(set(np.argmax(hot, axis=1))) > 25  # another expert in each layer


@pytest.mark.parametrize(("options", "message"), [
    (("--deployment", "prefil"), "--deployment prefil is unknown; did you mean prefill"),
    (("--devices", "48"), r"slots \(256\) must be divisible by devices \(48\)"),
    (("--preset", "deepseek_v4"), "--preset deepseek_v4 is unknown"),
    (("--amount", "-1"), r"--amount \(-1\) must be at least 0"),
    (("--drift", "-1"), r"--drift \(-1\) must be at least 0"),
    (("--layers", "0"), r"--layers \(0\) must be at least 1"),
    (("--load", "absent.json"), "--load absent.json: .*give .json with"),
    (("--load", "zero.csv"), "--load zero.csv: layer 1 has no load")])
def test_mistakes_are_told(monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero.csv").write_text("1,2\n0,0\n")
    monkeypatch.setattr(sys, "argv", ["balance_experts.py", *options])
    with pytest.raises(ConfigError, match=message):
        balance_experts.main()
