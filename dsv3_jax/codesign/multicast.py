"""Dispatch and combine when switches copy and add rows (paper 1, section 6.5): rows through a device's NIC and NVLink.

Dispatch is a small multicast, a token's row to its experts; combine is its mirror, a small reduction. Four ways:

- "each choice": a row for each choice, from its home (over NVLink to devices of the home's node);
- "GPUs forward": one row for each other node, to the device with the home's index, which forwards it over NVLink to
  the owners (paper 1, section 4.3): what `expert_parallel` does;
- "switches copy, for nodes": one row leaves home; switches make one for each of these devices. The planes of a
  multi-plane network, in each of which lie the devices of one index, suffice;
- "switches copy, for devices": one row for each device that owns a chosen expert. Needs a network that joins planes.

A node's own devices are reached over NVLink in each. Whatever switches do, every device must receive what it is to
compute, so in an exchange that is balanced copying shortens the way out of the NIC alone, and adding the way in. Both
directions of a link can be busy at once: the dispatch of one micro-batch beside the combine of the other is where that
pays.

Units: rows a token, mean over tokens that live on all devices alike; bytes; seconds.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from dsv3_jax.codesign.checks import not_negative
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.traffic import rows_a_token
from dsv3_jax.expert_parallel.exchange import RowBytes
from dsv3_jax.expert_parallel.topology import Topology

Way = Literal["each choice", "GPUs forward", "switches copy, for nodes", "switches copy, for devices"]


class Crossing(NamedTuple):
    """Rows of a dispatch; a combine has `sent` and `received` the other way round."""

    sent: float
    """Through the NIC."""
    received: float
    """Through the NIC: what is sent, times the copies that switches make."""
    fast: float
    """Over NVLink, one way; the same number is received."""


def crossings(experts_TK: np.ndarray, topology: Topology) -> dict[Way, Crossing]:
    """Counts of choices [T, K]; token t lives on device t modulo their number."""
    tokens = len(experts_TK)
    home_T1 = (np.arange(tokens) % topology.devices)[:, None]
    device_TK = experts_TK // topology.experts_per_device
    chosen_TM = np.zeros((tokens, topology.devices), bool)
    np.put_along_axis(chosen_TM, device_TK, True, axis=1)
    inside_TM = np.arange(topology.devices) // topology.scale_up == home_T1 // topology.scale_up
    inside_TK = device_TK // topology.scale_up == home_T1 // topology.scale_up
    rows = rows_a_token(experts_TK, topology)
    outside = float((chosen_TM & ~inside_TM).sum() / tokens)
    leaving = float((chosen_TM & ~inside_TM).any(axis=1).mean())
    own_devices = float((chosen_TM & inside_TM & (np.arange(topology.devices) != home_T1)).sum() / tokens)
    own_choices = float((inside_TK & (device_TK != home_T1)).sum() / tokens)
    return {"each choice": Crossing(rows.slow_copies, rows.slow_copies, own_choices),
            "GPUs forward": Crossing(rows.slow_rows, rows.slow_rows, rows.fast_rows),
            "switches copy, for nodes": Crossing(leaving, rows.slow_rows, rows.fast_rows),
            "switches copy, for devices": Crossing(leaving, outside, own_devices)}


class Sent(NamedTuple):
    """Bytes of a token's way there and back."""

    nic_out: float
    nic_in: float
    fast: float


def bytes_a_token(crossing: Crossing, row: RowBytes) -> Sent:
    """Dispatch and combine."""
    return Sent(crossing.sent * row.dispatch + crossing.received * row.combine,
                crossing.received * row.dispatch + crossing.sent * row.combine,
                crossing.fast * (row.dispatch + row.combine))


class Seconds(NamedTuple):
    """Of dispatch and combine, the slowest link's."""

    in_turn: float
    """One after the other."""
    at_once: float
    """The dispatch of one micro-batch beside the combine of another."""


def seconds(crossing: Crossing, row: RowBytes, tokens: float, hardware: Hardware) -> Seconds:
    """Of a device's `tokens`, at the rates that its links reach."""
    not_negative(tokens=tokens)
    slow, fast = hardware.scale_out.effective, hardware.scale_up.effective
    slowest = max(max(crossing.sent, crossing.received) / slow, crossing.fast / fast)
    sent = bytes_a_token(crossing, row)
    return Seconds(tokens * slowest * (row.dispatch + row.combine),
                   tokens * max(sent.nic_out / slow, sent.nic_in / slow, sent.fast / fast))
