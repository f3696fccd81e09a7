"""What the limit saves, on random affinities."""

from __future__ import annotations

import itertools

import pytest

from experiments import node_limited_routing
from experiments.node_limited_routing import random_router


def test_a_limit_bounds_nodes_and_copies_a_node_save_rows():
    rows = random_router(2048, 0)
    assert [row["limit"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert row["nodes"] <= row["limit"]
        assert row["slow_rows"] == pytest.approx(row["nodes"] * 7 / 8, rel=0.03)
        assert row["slow_copies"] == pytest.approx(8 * 7 / 8, rel=0.03)
    assert all(a["slow_rows"] < b["slow_rows"] for a, b in itertools.pairwise(rows))
    # 7168 codes and 56 scales there, bf16 back.
    assert rows[3]["slow_bytes"] == rows[3]["slow_rows"] * (7168 + 4 * 56 + 2 * 7168)
    assert node_limited_routing.TOPOLOGY.devices == 64
