"""The serving benchmark: each variant answers the same load, and the figures are what tickets and engine say."""

from __future__ import annotations

import pytest

from dsv3_jax.config import ConfigError
from experiments import serving_benchmark
from tests.experiments.in_process import run_script

TINY = ("--model", "tiny", "--requests", "12", "--longest", "24", "--common", "8", "--rows", "4", "--page-size", "8")


def run(monkeypatch, capfd, *options: str) -> tuple[dict, str]:
    return run_script(serving_benchmark, monkeypatch, capfd, *TINY, *options)


@pytest.mark.slow
def test_an_open_load_on_each_kind_of_engine(monkeypatch, capfd, tmp_path, eight_devices):
    told, lines = run(monkeypatch, capfd, "--rate", "100", "--variants", "one", "speculative", "apart", "replicated",
                      "--out", str(tmp_path / "report"))
    rows = {row["variant"]: row for row in told["results"]}
    assert list(rows) == ["one", "speculative", "apart", "replicated"]
    for row in rows.values():
        assert (row["requests"], row["refused"], row["rate"]) == (12, 0, 100)
        assert 0 < row["time_to_first_token_s"]["median"] <= row["time_to_first_token_s"]["p99"] < row["seconds"]
        assert row["tokens_per_second"] > 0
    made = [row["tokens_per_second"] * row["seconds"] for row in rows.values()]
    assert made == [pytest.approx(made[0])] * 4  # the same answers' lengths
    assert len(rows["speculative"]["acceptance"]) == 1
    assert rows["one"]["acceptance"] == []
    assert 1 <= rows["replicated"]["fullest_device"] < 4
    assert "rebalanced in" in lines
    assert (tmp_path / "report.md").read_text().count("| 100 requests/s |") == 4
    assert (tmp_path / "report.png").stat().st_size > 1000


@pytest.mark.slow
def test_clients_that_ask_again(monkeypatch, capfd):
    told, _ = run(monkeypatch, capfd, "--concurrent", "1", "4")
    one, four = told["results"]
    assert (one["concurrent"], four["concurrent"]) == (1, 4)
    assert one["rows_per_step"] == 1
    assert 1 < four["rows_per_step"] <= 4


@pytest.mark.parametrize(("options", "error"), [
    (("--variants", "two"), r"--variants \(two\) must be among one, speculative, apart, spread, replicated"),
    (("--rate", "0"), "--rate and --concurrent must be above 0")])
def test_what_cannot_be_measured_is_refused(monkeypatch, capfd, options, error):
    with pytest.raises(ConfigError, match=error):
        run(monkeypatch, capfd, *options)


def test_more_devices_are_asked_for(monkeypatch):
    monkeypatch.setattr(serving_benchmark.jax, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="spread wants 4 devices, and there are 2: add --simulate-devices 4"):
        serving_benchmark.check_devices(("one", "apart", "spread"))
