"""The page on a training step."""

from __future__ import annotations

import pytest

from dsv3_jax.config import ConfigError
from experiments.paper.training_step import HOURS, PRINTED, Options, section
from tests.experiments.paper.pages import checked


def test_page(tmp_path):
    items = checked(section(), tmp_path)
    parts = [items[f"table 4, {name}, s"] for name in PRINTED]
    step = items["table 4, time of a step, s"]
    assert sum(item.ours for item in parts) == pytest.approx(step.ours)
    assert [item.paper for item in parts] == list(PRINTED.values())
    # Off by as much as the step, whatever is derived from it.
    assert items["table 4, MFU, causal, %"].ratio == pytest.approx(1 / step.ratio, rel=0.01)
    hours = items["paper 2, table 1, pre-training, thousand GPU hours"]
    assert hours.paper == HOURS / 1e3
    assert hours.ratio == pytest.approx(step.ratio, rel=0.01)
    uneven = [item.ours for name, item in items.items() if name.startswith("step if the fullest")]
    assert uneven == sorted(uneven)
    assert items["step with kernels: latest, s"].ours < step.ours


def test_other_rates_and_nonsense():
    latest = {item.item: item.ours for item in section(Options(kernels="latest")).items}
    assert latest["table 4, time of a step, s"] < latest["step with kernels: paper, s"]
    with pytest.raises(ConfigError, match="imbalance"):
        section(Options(imbalance=0.9))
