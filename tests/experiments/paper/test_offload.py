"""The page on what SMs do for communication."""

from __future__ import annotations

import pytest

from dsv3_jax.config import ConfigError
from experiments.paper.offload import Options, section
from tests.experiments.paper.pages import checked


def test_page(tmp_path):
    items = checked(section(Options(tokens=512)), tmp_path)
    assert items["table 4, step: sum of its parts, s"].ratio == pytest.approx(1, abs=2e-3)
    assert items["the same with a co-processor, s"].ours == pytest.approx(19.90 - 19.13 * 20 / 132)
    turn, beside = "4,096 tokens, dispatch then combine, ms", "the same, one's dispatch beside another's combine, ms"
    forward, copied = "GPUs forward: ", "switches copy, for nodes: "
    # In turn the way in is as long as ever; at once, the way out is 1 + what comes back.
    assert items[forward + turn].ours == items[copied + turn].ours
    assert items[copied + beside].ours < items[forward + beside].ours == items[forward + turn].ours
    assert items["LogFMT-8 on SMs, 50% of bf16's combine: pays on links below, GB/s"].ours == pytest.approx(48.44, .001)


def test_one_node_needs_no_copies():
    """M = 1: switches have nothing to copy."""
    items = {item.item: item.ours for item in section(Options(tokens=512, limit=1)).items}
    for kind in ("out of the NIC, KB a token there and back", "into the NIC, KB", "NVLink, KB"):
        assert items[f"GPUs forward: {kind}"] == items[f"switches copy, for nodes: {kind}"]


@pytest.mark.parametrize(("options", "words"), [
    ({"limit": 9}, r"limit \(9\)"), ({"tokens": 0}, r"tokens \(0\)"),
    ({"communicating": 132}, r"communicating \(132\)"),
    ({"compute_bound": 2}, r"compute_bound \(2\)"), ({"machine": "h900"}, "hardware h900 is unknown")])
def test_nonsense_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        section(Options(**{"tokens": 64} | options))
