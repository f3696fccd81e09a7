"""What the page of topologies says."""

from __future__ import annotations

import functools

import pytest

from dsv3_jax.codesign.networks import fat_tree, latency
from experiments.paper import networks
from experiments.paper.networks import any_plane
from experiments.paper.report import Item, as_markdown, draw_figures


@functools.cache
def items() -> dict[str, Item]:
    return {item.item: item for item in networks.section().items}


def test_table_3_is_met():
    counts = [item for name, item in items().items() if name.startswith("table 3") and "cost" not in name]
    assert len(counts) == 15
    assert all(item.ratio == 1 for item in counts)
    costs = {name: item for name, item in items().items() if name.startswith("table 3") and "cost" in name}
    assert {name for name, item in costs.items() if item.paper is None} == {
        "table 3, FT2, cost, M$", "table 3, FT3, cost, M$"}  # what prices were fitted to is no prediction
    for name, item in costs.items():
        assert item.ratio is None or item.ratio == pytest.approx(1, abs=0.022), name


def test_table_5_is_an_input():
    for name, item in items().items():
        if name.startswith("table 5"):
            assert item.paper is None
            assert item.note.startswith("an input")
    assert items()["InfiniBand, through three layers (five switches), us"].ours == pytest.approx(4.6)
    assert items()["InfiniBand, to another plane across leaves, us"].ours == pytest.approx(7.03)


def test_any_plane_by_hand():
    """Two nodes of two planes: of a GPU's three others, one is at NVLink, one on its leaf, one both."""
    network = fat_tree.multi_plane(4, 2, planes=2)
    told = any_plane(network, planes=2)
    assert told == pytest.approx((3.33e-6 + 2.8e-6 + (2.8e-6 + 3.33e-6)) / 3)
    assert latency.mean_message(network, latency.INFINIBAND) == pytest.approx(2.8e-6)


@pytest.mark.slow
def test_the_page_has_its_figures(tmp_path):
    made = networks.section()
    draw_figures(made, tmp_path)
    for name, _ in made.figures:
        assert f"({name}.png)" in as_markdown(made)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
