"""The page on ordering, and a script of this folder with options of its own."""

from __future__ import annotations

import json
import sys

import pytest

from dsv3_jax.config import ConfigError
from experiments.paper import ordering
from experiments.paper.ordering import Options, section
from experiments.paper.report import run
from tests.experiments.paper.pages import checked


def test_page(tmp_path):
    items = checked(section(), tmp_path)
    assert items["one message and its flag, with a fence, us"].ours == pytest.approx(7392 / 50e3 + 3 * 3.7)
    assert items["the same, ordered by the receiver, us"].ours == pytest.approx(7392 / 50e3 + 3.7)
    assert items["one fence in each exchange of a decode step, ms"].ours == pytest.approx(244 * 7.4e-3)


def test_without_latency_a_fence_costs_nothing():
    items = {item.item: item.ours for item in section(Options(latency=0.0, spread=0.0)).items}
    assert items["one message and its flag, with a fence, us"] == items["the same, ordered by the receiver, us"]
    assert items["fenced messages in flight, and threads that wait, to fill the link"] == 1
    assert items["flag held back for all earlier packets (sequence numbers), us"] == 0


def test_as_a_script(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(sys, "argv", ["ordering.py", "--latency", "1", "--json", "--out", str(tmp_path / "page")])
    run(section, "about", Options)
    out = capfd.readouterr().out  # both streams, as pytest captures them: the page, then JSON
    told = {item["item"]: item["ours"] for item in json.loads(out[out.index("[\n  {"):])}
    assert told["one fence in each exchange of a decode step, ms"] == pytest.approx(244 * 2e-3)
    assert "1 us from end to end" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "ordering.png").exists()


def test_a_machine_without_a_latency_is_refused():
    with pytest.raises(ConfigError, match="latency of DCN is not known"):
        section(Options(machine="v5p"))
    assert ordering.network_of(Options(machine="v5p", latency=2.0)).latency == 2e-6
