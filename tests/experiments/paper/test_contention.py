"""The page on contention, of a small group."""

from __future__ import annotations

import pytest

from dsv3_jax.config import ConfigError
from experiments.paper import contention
from experiments.paper.contention import Options, section
from tests.experiments.paper.pages import checked


def test_page(tmp_path, monkeypatch):
    monkeypatch.setattr(contention, "LOADS", (1e9, 20e9))
    items = checked(section(Options(devices=8, steps=1)), tmp_path)
    step = items["section 2.3.2, decode step without transfers, ms"]
    assert step.paper == 14.76
    assert step.ratio == pytest.approx(1, abs=1e-3)
    assert sum(item.paper is not None for item in items.values()) == 1
    assert items["exchange beside a transfer, time over alone"].ours == pytest.approx(50 / 32)
    assert items["largest pace of transfers that slows nothing, GB/s"].ours == pytest.approx(14)
    beside = {name: item.ours for name, item in items.items() if name.startswith("transfer of 288 MB")}
    megabytes = 4096 * 70_272 / 1e6
    assert list(beside.values()) == pytest.approx([megabytes / rate for rate in (32, 14, 64, 450)])
    assert items["KV load of DeepSeek's service, GB/s a GPU"].ours == pytest.approx(0.153, abs=1e-3)


def test_other_hardware_has_no_number_of_the_paper(tmp_path):
    """PCIe 4.0: the link is less than the NIC, so that what goes first leaves nothing."""
    made = section(Options(pcie=32, devices=2, steps=1))
    assert all(item.paper is None for item in made.items)
    assert not any("exchange first, ms" in item.item for item in made.items)
    assert made.items[0].ours == pytest.approx(14.757 * 50 / 32, rel=1e-3)


def test_nonsense_is_refused():
    with pytest.raises(ConfigError, match=r"context \(0\)"):
        section(Options(context=0))
    with pytest.raises(ConfigError, match=r"nic \(-50"):
        section(Options(nic=-50))
