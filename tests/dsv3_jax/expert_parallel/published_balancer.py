"""The greedy way of the published EPLB in plain Python: what `replicas.place` must never be worse than."""

from __future__ import annotations


def published(load_E: list[float], slots: int, devices: int, nodes: int, groups: int) -> list[list[int]]:
    """Experts of each device of one layer. A device may hold an expert twice.

    Groups are packed onto nodes, replicas made inside each node, and those packed onto its devices; with one group, all
    as if on one node.
    """
    if groups == 1:
        nodes = 1
    size = len(load_E) // groups
    group_loads = [sum(load_E[group * size:(group + 1) * size]) for group in range(groups)]
    placed = []
    for node in pack(group_loads, nodes):
        experts = [expert for group in node for expert in range(group * size, (group + 1) * size)]
        replicas = replicate([load_E[expert] for expert in experts], slots // nodes)
        counts = [replicas.count(index) for index in range(len(experts))]
        loads = [load_E[experts[index]] / counts[index] for index in replicas]
        placed += [[experts[replicas[item]] for item in device] for device in pack(loads, devices // nodes)]
    return placed


def pack(loads: list[float], packs: int) -> list[list[int]]:
    """Heaviest first, into the least loaded pack with room."""
    packed: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        open_packs = [pack for pack in range(packs) if len(packed[pack]) < len(loads) // packs]
        least = min(open_packs, key=lambda pack: total[pack])
        packed[least].append(item)
        total[least] += loads[item]
    return packed


def replicate(loads: list[float], slots: int) -> list[int]:
    """The expert that each slot holds."""
    replicas, counts = list(range(len(loads))), [1] * len(loads)
    while len(replicas) < slots:
        busiest = max(range(len(loads)), key=lambda expert: loads[expert] / counts[expert])
        replicas.append(busiest)
        counts[busiest] += 1
    return replicas


def fullest(load_E: list[float], placed: list[list[int]]) -> float:
    """The largest load of a device."""
    counts = [sum(device.count(expert) for device in placed) for expert in range(len(load_E))]
    return max(sum(load_E[expert] / counts[expert] for expert in device) for device in placed)
