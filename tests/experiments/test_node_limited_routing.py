"""Rows of a token over both networks, as the experiment counts them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dsv3_jax.expert_parallel.topology import Topology
from experiments import node_limited_routing
from experiments.node_limited_routing import random_router, rows_a_token


def test_rows_of_one_token_by_hand():
    """Experts 0..15 on 2 nodes of 4 devices, 2 each; the token lives on node 0's first device."""
    told = rows_a_token(np.array([[0, 1, 6, 8, 9, 15]]), Topology(16, 2, 4))
    # Node 0: devices 0 (at home) and 3. Node 1, entered at its device 0: devices 0 and 3.
    assert told == {"nodes": 2, "slow_copies": 3, "slow_rows": 1, "fast_rows": 2}


def test_every_home_is_counted():
    experts = np.tile(np.array([[0, 15]]), (8, 1))
    told = rows_a_token(experts, Topology(16, 2, 4))
    assert told == {"nodes": 2, "slow_copies": 1, "slow_rows": 1, "fast_rows": 2 * 6 / 8}


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
