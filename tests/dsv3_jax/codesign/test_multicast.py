"""Rows through NICs and NVLink when switches copy, by walking every row's way."""

from __future__ import annotations

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from dsv3_jax.codesign.hardware import hardware
from dsv3_jax.codesign.multicast import Crossing, bytes_a_token, crossings, seconds
from dsv3_jax.codesign.traffic import random_choices, rows_a_token
from dsv3_jax.config import ConfigError
from dsv3_jax.expert_parallel.exchange import RowBytes
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.presets import MODELS

TOPOLOGY = Topology(16, 2, 4)


def walked(experts_TK: np.ndarray, topology: Topology) -> dict[str, tuple[float, float, float]]:
    """Every row of every way as (from, to) over the NIC, with switches' copies apart, or over NVLink."""
    up = topology.scale_up
    count: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)

    def carry(way: str, home: int, targets: list[int], kind: str) -> None:
        count[way]["sent"] += kind == "copied" and bool(targets)
        for target in targets:
            assert (target // up == home // up) == (kind == "fast")
            assert target != home
            count[way]["fast" if kind == "fast" else "received"] += 1
            count[way]["sent"] += kind == "slow"
    for token, chosen in enumerate(experts_TK):
        home = token % topology.devices
        choices = [int(expert) // topology.experts_per_device for expert in chosen]
        owners = sorted(set(choices))
        away = [owner for owner in owners if owner // up != home // up]
        near = [owner for owner in owners if owner // up == home // up and owner != home]
        entries = sorted({owner // up * up + home % up for owner in away})
        carry("each choice", home, [c for c in choices if c // up != home // up], "slow")
        carry("each choice", home, [c for c in choices if c // up == home // up and c != home], "fast")
        for way, kind in (("GPUs forward", "slow"), ("switches copy, for nodes", "copied")):
            carry(way, home, entries, kind)
            carry(way, home, near, "fast")
            for entry, owner in itertools.product(entries, away):
                if entry // up == owner // up and entry != owner:
                    carry(way, entry, [owner], "fast")
        carry("switches copy, for devices", home, away, "copied")
        carry("switches copy, for devices", home, near, "fast")
    tokens = len(experts_TK)
    return {way: (c["sent"] / tokens, c["received"] / tokens, c["fast"] / tokens) for way, c in count.items()}


@pytest.mark.parametrize("limit", [1, 2, 4, 8])
def test_every_row_is_walked(limit):
    topology = Topology(256, 8, 8)
    experts_TK = random_choices(dataclasses.replace(MODELS["deepseek_v3"], topk_group=limit), 512, limit)
    told, by_hand = crossings(experts_TK, topology), walked(experts_TK, topology)
    assert set(told) == set(by_hand)
    for way, crossing in told.items():
        assert tuple(crossing) == pytest.approx(by_hand[way]), way
    rows = rows_a_token(experts_TK, topology)
    assert told["GPUs forward"] == (rows.slow_rows, rows.slow_rows, rows.fast_rows)


def test_one_token_by_hand():
    """Experts 0..15 on 2 nodes of 4 devices, 2 each; the token lives on node 0's first device. Devices 0, 0, 3 of node
    0 and 0, 0, 3 of node 1."""
    told = crossings(np.array([[0, 1, 6, 8, 9, 15]]), TOPOLOGY)
    assert told == {"each choice": (3, 3, 1), "GPUs forward": (1, 1, 2), "switches copy, for nodes": (1, 1, 2),
                    "switches copy, for devices": (1, 2, 1)}


def test_one_other_node_leaves_nothing_to_copy():
    """M = 1: a row for one node is one row, copied or not."""
    experts_TK = random_choices(dataclasses.replace(MODELS["deepseek_v3"], topk_group=1), 512, 0)
    told = crossings(experts_TK, Topology(256, 8, 8))
    assert told["switches copy, for nodes"] == told["GPUs forward"]
    assert told["GPUs forward"].sent == pytest.approx(7 / 8, abs=0.06)  # 512 tokens: 4 standard errors


def test_bytes_and_times_by_hand():
    """1 row out and 3 in, 10 bytes there and 20 back; 40 and 160 GB/s are what an H800 reaches."""
    row, h800 = RowBytes(10, 20, 10, 20), hardware("h800")
    crossing = Crossing(1, 3, 2)
    assert bytes_a_token(crossing, row) == (1 * 10 + 3 * 20, 3 * 10 + 1 * 20, 2 * 30)
    assert seconds(crossing, row, 100, h800) == pytest.approx((100 * 3 * 30 / 40e9, 100 * 70 / 40e9))
    assert seconds(Crossing(1, 1, 8), row, 1, h800) == pytest.approx((8 * 30 / 160e9, 8 * 30 / 160e9))
    assert seconds(crossing, row, 0, h800) == (0, 0)


def test_nonsense_is_refused():
    with pytest.raises(ConfigError, match=r"tokens \(-1\)"):
        seconds(Crossing(1, 1, 1), RowBytes(1, 1, 1, 1), -1, hardware("h800"))
