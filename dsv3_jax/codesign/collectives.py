"""Which devices a compiled program makes talk, over which network, how many bytes, and what computes meanwhile.

Bytes are those that one device sends to others in one execution, hand-countable from shapes; of a ragged all-to-all,
those that it has room for. A group that spans
several fast domains is split into the least it must send over the slow network, data forwarded inside a domain where
that helps (gathers and reductions), and the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.codesign.hardware import all_to_all_hops
from dsv3_jax.codesign.hlo import Computation, Instruction, Walk, operand_bytes, shape_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")


class Layout(NamedTuple):
    """Where the program's devices stand."""

    axes: dict[str, int]
    """Mesh axes and sizes, slowest first; a device's position in the program is its position in the mesh."""
    domains: tuple[int, ...]
    """The fast domain of every position."""
    coordinates: tuple[tuple[int, ...], ...] = ()
    """Place of every position in its torus; empty for a switched network."""


class Collective(NamedTuple):
    """One collective in the program."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which its groups extend."""
    times: float
    """Executions in the whole program."""
    fast_bytes: float
    """Bytes one device sends inside its fast domain, an execution."""
    slow_bytes: float
    """Bytes one device sends over the slow network, an execution."""
    hop_bytes: float
    """fast_bytes times the torus links each crosses: more than fast_bytes only for an all-to-all on a torus."""
    flops_between: float
    """Matrix FLOPs scheduled between its start and its done; 0 for a synchronous one."""
    op_name: str

    @property
    def bytes(self) -> float:
        return self.fast_bytes + self.slow_bytes

    @property
    def overlapped(self) -> bool:
        return self.flops_between > 0


def collectives(walk: Walk, layout: Layout) -> list[Collective]:
    """Every collective of the program that runs, in the order of its computations' schedules."""
    found: list[Collective] = []
    for name, times in walk.computations():
        computation = walk.program.computations[name]
        lines = list(computation.values())
        for index, line in enumerate(lines):
            for kind, inside, instruction in _collectives_of(walk, computation, line):
                between = _flops_until_done(walk, computation, lines, index)
                groups = device_groups(instruction.attributes, layout)
                found.append(_describe(kind, inside, instruction, groups, layout, times, between))
            if line.opcode == "send":
                between = _flops_until_done(walk, computation, lines, index)
                found.append(_between_slices(computation, line, layout, times, between))
    return found


def _collectives_of(walk: Walk, computation: Computation,
                    line: Instruction) -> list[tuple[str, Computation, Instruction]]:
    """The collectives that `line` starts or is, itself or inside its fusion or asynchronous computation.

    XLA:TPU gives collectives to the SparseCores of newer chips as `custom-call-start` with a computation of their own.
    """
    kind = line.opcode.removesuffix("-start")
    if kind in KINDS:
        return [(kind, computation, line)]
    if line.opcode in ("fusion", "async-start", "call-start", "custom-call-start"):
        called = line.called("calls", "to_apply", "called_computations")
        inner = [walk.program.computations[name] for name in called]
        return [(inside.opcode, body, inside) for body in inner for inside in body.values() if inside.opcode in KINDS]
    return []


def _flops_until_done(walk: Walk, computation: Computation, lines: Sequence[Instruction], index: int) -> float:
    """Matrix FLOPs of the schedule after line `index`, a start, until its done; of a fusion with a collective, its
    own."""
    start = lines[index]
    if start.opcode == "fusion":
        return walk.flops_of(computation, start)
    if not start.opcode.endswith("-start") and start.opcode != "send":
        return 0.0
    total, carriers = 0.0, {start.name}
    for line in lines[index + 1:]:
        if carriers.intersection(line.operands):
            if line.opcode.endswith("-done"):
                return total
            carriers.add(line.name)
        total += walk.flops_of(computation, line)
    return total


def device_groups(attributes: str, layout: Layout) -> np.ndarray:
    """int [groups, members]: positions of the devices that talk to each other; for a permutation, pairs of them.

    Raises:
      ValueError: a form of `replica_groups` that is not known here.
    """
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    if pairs:
        return np.array([[int(i) for i in pair.split(",")] for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        return _groups_of_axes(*named.groups())
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, source, order = ([int(i) for i in part.split(",")] if part else [] for part in iota.groups())
        grid = np.arange(math.prod(source)).reshape(source)
        return (grid.transpose(order) if order else grid).reshape(shape)
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return np.array([[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed.group(1))])
    if re.search(r"replica_groups=\{\}", attributes):
        return np.arange(math.prod(layout.axes.values()))[None]
    raise ValueError(f"unknown form of replica_groups in: {attributes[:300]}")


def _groups_of_axes(mesh: str, names: str) -> np.ndarray:
    """Groups along `names`, such as `'a','b'`, of a printed mesh, such as `'a'=2,'b'=8`; `'b':(2)4` is part of an axis:
    the 4 after the first 2."""
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    if "device_ids" in mesh or not axes:
        raise ValueError(f"unknown form of replica_groups: mesh[{mesh}]")
    sizes: list[int] = []
    moved: list[int] = []
    parts = {name: (int(before or 1), int(size or axes[name]))
             for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", names)}
    for name, whole in axes.items():
        before, size = parts.get(name, (whole, 1))
        if name in parts:
            moved.append(len(sizes) + 1)
        sizes += [before, size, whole // (before * size)]
    kept = [axis for axis in range(len(sizes)) if axis not in moved]
    grid = np.arange(math.prod(sizes)).reshape(sizes).transpose(kept + moved)
    return grid.reshape(-1, math.prod(sizes[axis] for axis in moved))


def _varying_axes(groups: np.ndarray, layout: Layout) -> tuple[str, ...]:
    sizes = tuple(layout.axes.values())
    coordinates = np.array(np.unravel_index(groups, sizes))
    varies = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, moves in zip(layout.axes, varies, strict=True) if moves)


def _describe(kind: str, computation: Computation, line: Instruction, groups: np.ndarray, layout: Layout,
              times: float, between: float) -> Collective:
    # A ragged exchange has a buffer for the result and places in both among its operands: only the first is sent.
    size = (shape_bytes(computation[line.operands[0]].shape) if kind == "ragged-all-to-all"
            else operand_bytes(computation, line))
    axes = _varying_axes(groups, layout)
    if kind == "collective-permute":
        far = [layout.domains[a] != layout.domains[b] for a, b in groups]
        share = float(np.mean(far))
        return Collective(kind, axes, times, size * (1 - share), size * share, size * (1 - share), between,
                          line.op_name)
    members = groups.shape[1]
    domains = len({layout.domains[i] for i in groups[0]})
    inside = members // domains
    if kind == "all-gather":
        slow, fast = size * (domains - 1), size * domains * (inside - 1)
    elif kind in ("reduce-scatter", "all-reduce"):
        phases = 2 if kind == "all-reduce" else 1
        slow, fast = phases * size * (domains - 1) / members, phases * size * (inside - 1) / inside
    elif kind == "collective-broadcast":
        slow, fast = size * (domains > 1) / inside, size * (inside > 1)
    else:  # all-to-all: every pair exchanges directly
        slow, fast = size * (members - inside) / members, size * (inside - 1) / members
    hops = size * inside / members * _torus_hops(groups[0][:inside], layout) if "all-to-all" in kind else fast
    return Collective(kind, axes, times, fast, slow, max(hops, fast), between, line.op_name)


def _torus_hops(members: np.ndarray, layout: Layout) -> float:
    """Mean links between two of `members`, on a torus that wraps around just them; 0 on a switched network."""
    if not layout.coordinates:
        return 0.0
    places = np.array([layout.coordinates[i] for i in members])
    return all_to_all_hops(tuple(len(np.unique(place)) for place in places.T))


def _between_slices(computation: Computation, line: Instruction, layout: Layout, times: float,
                    between: float) -> Collective:
    """A transfer that XLA:TPU split off for the network between slices, named by what it is part of."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.attributes)
    name = kind.group(1).lower().replace("_", "-") if kind else "send"
    size = operand_bytes(computation, line)
    slices = len(set(layout.domains))
    # The send buffer is one slice's copy for a gather, and everybody's parts, one's own included, for the others.
    sent = size * (slices - 1) if name == "all-gather" else size * (slices - 1) / slices
    crossing = tuple(axis for axis in layout.axes if _crosses(axis, layout))
    return Collective(name, crossing, times, 0.0, sent, 0.0, between, line.op_name)


def _crosses(axis: str, layout: Layout) -> bool:
    """Whether moving along `axis` leaves the fast domain."""
    grid = np.array(layout.domains).reshape(tuple(layout.axes.values()))
    first = np.moveaxis(grid, list(layout.axes).index(axis), 0)
    return bool((first != first[:1]).any())
