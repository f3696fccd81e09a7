"""What rounds and traffic an expert-parallel group needs for its tokens' choices, counted token after token.

M devices of the group, in the order of their experts; -1 is no choice.
"""

from __future__ import annotations

import collections

import numpy as np

from dsv3_jax.expert_parallel.plan import Traffic
from dsv3_jax.expert_parallel.rounds import Quota
from dsv3_jax.expert_parallel.topology import Topology


def _fit_in_one_round(experts_MTK: np.ndarray, topology: Topology, quota: Quota) -> bool:
    """Whether each chunk and each device's slots, as the plan makes them, hold all that is for them."""
    to_node, through, to_device = collections.Counter(), collections.Counter(), collections.Counter()
    for m, experts_TK in enumerate(experts_MTK):
        for experts_K in experts_TK:
            devices = [e // topology.experts_per_device for e in experts_K if e >= 0]
            to_node.update((m, node) for node in {d // topology.scale_up for d in devices})
            through.update((m % topology.scale_up, d) for d in set(devices))
            to_device.update(devices)
    return (max(to_node.values(), default=0) <= quota.node_rows
            and max(through.values(), default=0) <= topology.scale_out * quota.device_choices
            and max(to_device.values(), default=0) <= topology.devices * quota.device_choices)


def rounds_by_hand(experts_MTK: np.ndarray, topology: Topology, quota: Quota) -> tuple[np.ndarray, int]:
    """The round of every choice, [M, T, K], and the number of rounds."""
    if _fit_in_one_round(experts_MTK, topology, quota):
        return np.where(experts_MTK >= 0, 0, -1), 1
    waves = -(-experts_MTK.shape[1] // quota.node_rows)
    place, parts = np.zeros((*experts_MTK.shape, 2), int), [0] * waves
    for m, experts_TK in enumerate(experts_MTK):
        visits, sent = [0] * topology.scale_out, {}
        for t, experts_K in enumerate(experts_TK):
            wave = {}
            for n in {e // topology.experts_per_node for e in experts_K if e >= 0}:
                wave[n] = visits[n] // quota.node_rows
                visits[n] += 1
            for k, e in enumerate(experts_K):
                if e >= 0:
                    v, device = wave[e // topology.experts_per_node], e // topology.experts_per_device
                    place[m, t, k] = v, sent.get((v, device), 0) // quota.device_choices
                    sent[v, device] = sent.get((v, device), 0) + 1
        for (v, _), count in sent.items():
            parts[v] = max(parts[v], -(-count // quota.device_choices))
    starts = np.cumsum([0, *parts])
    return np.where(experts_MTK >= 0, starts[place[..., 0]] + place[..., 1], -1), max(1, int(starts[-1]))


def traffic_by_hand(experts_MTK: np.ndarray, round_MTK: np.ndarray, topology: Topology) -> Traffic:
    """Sums over the group: a token goes once a round to each node, and there once to each device, of its experts."""
    choices = tokens = nodes = scale_out_rows = scale_up_rows = 0
    for home, experts_TK in enumerate(experts_MTK):
        own_node, own_place = divmod(home, topology.scale_up)
        for experts_K, round_K in zip(experts_TK, round_MTK[home], strict=True):
            to_devices = {(int(e) // topology.experts_per_device, int(i))
                          for e, i in zip(experts_K, round_K, strict=True) if e >= 0}
            to_nodes = {(device // topology.scale_up, i) for device, i in to_devices}
            choices += int(np.sum(experts_K >= 0))
            tokens += bool(to_devices)
            nodes += len({node for node, _ in to_nodes})
            scale_out_rows += sum(node != own_node for node, _ in to_nodes)
            # It enters a node at the device with its own device's place there.
            scale_up_rows += sum(device % topology.scale_up != own_place for device, _ in to_devices)
    return Traffic(choices, choices, tokens, nodes, scale_out_rows, scale_up_rows)
