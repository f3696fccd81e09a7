"""Rows of a token over both networks, and rounds, by hand."""

from __future__ import annotations

import numpy as np

from dsv3_jax.codesign.traffic import rounds_needed, rows_a_token
from dsv3_jax.expert_parallel.rounds import Quota
from dsv3_jax.expert_parallel.topology import Topology


def test_rows_of_one_token_by_hand():
    """Experts 0..15 on 2 nodes of 4 devices, 2 each; the token lives on node 0's first device."""
    told = rows_a_token(np.array([[0, 1, 6, 8, 9, 15]]), Topology(16, 2, 4))
    # Node 0: devices 0 (at home) and 3. Node 1, entered at its device 0: devices 0 and 3.
    assert told == (2, 3, 1, 2)


def test_every_home_is_counted():
    experts = np.tile(np.array([[0, 15]]), (8, 1))
    told = rows_a_token(experts, Topology(16, 2, 4))
    assert told == (2, 1, 1, 2 * 6 / 8)


def test_rounds_of_devices_that_agree():
    """Each of 4 devices has 2 tokens for expert 0, of which a round takes one from each."""
    experts = np.zeros((8, 1), np.int32)
    assert rounds_needed(experts, Topology(8, 2, 2), Quota(2, 2)) == 1
    assert rounds_needed(experts, Topology(8, 2, 2), Quota(2, 1)) == 2
