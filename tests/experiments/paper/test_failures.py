"""The page on failures."""

from __future__ import annotations

import pytest

from dsv3_jax.config import ConfigError
from experiments.paper.failures import Options, section
from tests.experiments.paper.pages import checked


def test_page(tmp_path):
    items = checked(section(), tmp_path)
    assert all(item.paper is None for item in items.values())  # the paper has no numbers of failures
    # 685 G parameters of 8 bytes through 256 NICs.
    floor = items["2,048 GPUs: a checkpoint through the storage NICs, at least, s"].ours
    assert floor == pytest.approx(682.6e9 * 8 / (256 * 50e9), rel=0.01)
    for size in ("2,048", "16,384", "65,536"):
        shares = [items[f"{size} GPUs, {name}: share of time that is progress"].ours
                  for name in ("as it is", "links send again", "noticed sooner", "both")]
        assert shares == sorted(shares)
    assert items["16,384 GPUs: hours between failures"].ours == pytest.approx(54 * 24 / 419)


def test_nonsense_is_refused():
    with pytest.raises(ConfigError, match=r"retried \(2\)"):
        section(Options(retried=2))
