"""Replicas of experts, so that all devices that serve a model have equal loads (paper 2, section 3.4).

Serving holds more experts than the model has: those that get most tokens are held several times and share their tokens
evenly. Which those are is measured, and changes; `place` finds a placement for measured loads, `rebalancing` changes
one into another, `replica_choice` sends tokens to replicas.

By group, the router's groups are packed onto nodes first and replicas stay on their group's node, so that the router's
node limit remains a limit on traffic over the slow network (paper 2's prefill). Else replicas lie anywhere, which
balances better and suits decoding on many devices. Those are the two policies of EPLB, the balancer that DeepSeek
published; its greedy way is the start of the search here (`replica_search`). What that may do and this never does is
to put an expert on a device twice: then the slot holds nothing new, though uneven shares can happen to help.

    L  layers      S  slots, experts as the devices hold them      P  slots of one device
    E  experts     M  devices                                      N  nodes
    G  groups      R  the most replicas an expert may have

Everything here is planning, in NumPy.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.expert_parallel import replica_search as search

CLOSE = 1e-4
"""Of the bound: as near is near enough. Measured loads say nothing about the next tokens as precisely."""
STARTS = (0.0, 0.25, 1.0)
"""Favours of `replica_counts` that a search starts from, until one comes close. The first is the published way; with
two slots a device, the others' searches often end a few percent below it."""


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What holds the experts of every layer. Device m is on node m // devices_per_node.

    Raises:
      ConfigError: the sizes don't go together.
    """

    experts: int
    slots: int
    """At least as many as experts, equally many on each device."""
    devices: int
    nodes: int = 1
    groups: int = 1
    """Of the router: equally many are placed on each node, with all their replicas. One: replicas lie anywhere."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            _require(value >= 1, f"{name} ({value}) must be at least 1")
        _require(self.slots >= self.experts, f"slots ({self.slots}) must be at least experts ({self.experts}): every "
                                             "expert needs one")
        next_slots = -(-self.slots // self.devices) * self.devices
        divisible = [("slots", "devices", f"take {next_slots} slots"), ("devices", "nodes", "change either"),
                     ("experts", "groups", "change either")]
        if not self.is_global:
            divisible.append(("groups", "nodes", "change either, or take groups=1 to place replicas on any node"))
        for many, few, remedy in divisible:
            _require(getattr(self, many) % getattr(self, few) == 0,
                     f"{many} ({getattr(self, many)}) must be divisible by {few} ({getattr(self, few)}): {remedy}")
        reach = self.devices // self.domains
        _require(self.slots <= self.experts * reach,
                 f"slots ({self.slots}) must be at most {self.experts * reach}: an expert has at most one replica on "
                 f"each of the {reach} devices that may hold it; take fewer slots")

    @property
    def is_global(self) -> bool:
        """Whether a replica may lie on any device."""
        return self.groups == 1

    @property
    def domains(self) -> int:
        """Parts of the deployment that share no expert."""
        return 1 if self.is_global else self.nodes

    @property
    def slots_per_device(self) -> int:
        return self.slots // self.devices

    @property
    def devices_per_node(self) -> int:
        return self.devices // self.nodes

    @property
    def most_replicas(self) -> int:
        """Of an expert, in any placement."""
        return min(self.devices // self.domains, (self.slots - self.experts) // self.domains + 1)


class Placement(NamedTuple):
    """Which expert each slot of each layer holds. No device holds one twice.

    To a dispatch, slots are experts of their own: `Topology(slots, nodes, devices_per_node)` has them on these devices.
    """

    expert_LS: np.ndarray
    """int32. Slot s is on device s // slots_per_device."""
    deployment: Deployment

    @classmethod
    def in_order(cls, layers: int, deployment: Deployment) -> Placement:
        """Of no known load: in each domain its experts in order, and then the first of them again. With as many slots
        as experts, expert e is in slot e."""
        # A device's slots are successive, and no more than a domain has experts: none is on a device twice.
        experts, slots = deployment.experts // deployment.domains, deployment.slots // deployment.domains
        expert_NS = np.arange(deployment.domains)[:, None] * experts + np.arange(slots) % experts
        return cls(np.tile(expert_NS.ravel(), (layers, 1)).astype(np.int32), deployment)

    @property
    def expert_LMP(self) -> np.ndarray:
        """What each device holds."""
        return self.expert_LS.reshape(len(self.expert_LS), self.deployment.devices, -1)

    @property
    def replicas_LE(self) -> np.ndarray:
        """int32: how many replicas an expert has."""
        return np.stack([np.bincount(expert_S, minlength=self.deployment.experts)
                         for expert_S in self.expert_LS]).astype(np.int32)

    @property
    def replica_slots_LER(self) -> np.ndarray:
        """int32: the slots that hold an expert, in order, then -1. R is the same for all placements of a deployment, so
        that a program that takes this table takes the next."""
        layers, (experts, most) = len(self.expert_LS), (self.deployment.experts, self.deployment.most_replicas)
        slots_LER = np.full((layers, experts, most), -1, np.int32)
        for slots_ER, expert_S in zip(slots_LER, self.expert_LS, strict=True):
            slot_S = np.argsort(expert_S, kind="stable")
            sorted_S = expert_S[slot_S]
            slots_ER[sorted_S, np.arange(len(slot_S)) - np.searchsorted(sorted_S, sorted_S)] = slot_S
        return slots_LER

    def device_load(self, load_LE: np.ndarray) -> np.ndarray:
        """[L, M]: each device's load, replicas sharing their expert's evenly."""
        each_LE = load_LE / self.replicas_LE
        return np.take_along_axis(each_LE, self.expert_LS, axis=1).reshape(self.expert_LMP.shape).sum(axis=2)


def place(load_LE: np.ndarray, deployment: Deployment, method: Literal["search", "greedy"] = "search") -> Placement:
    """A placement whose fullest device has as little load as can be found, and then the fullest node; layer by layer.

    `lower_bound` says how good it is. A layer of DeepSeek-V3 takes 10 to 200 ms.

    Args:
      load_LE: tokens that each expert got, or any other measure of its work.
      method: "greedy" is the published way alone, but that no device holds an expert twice. "search" goes on from there
        and is never worse on the fullest device.

    Raises:
      ConfigError: the loads are not those of this deployment's experts.
    """
    load_LE = checked_loads(load_LE, deployment)
    bound_L = lower_bound(load_LE, deployment)
    expert_LMP = [_place_layer(load_E, deployment, None if method == "greedy" else (1 + CLOSE) * bound)
                  for load_E, bound in zip(load_LE, bound_L, strict=True)]
    return Placement(np.stack(expert_LMP).reshape(len(load_LE), -1).astype(np.int32), deployment)


def lower_bound(load_LE: np.ndarray, deployment: Deployment) -> np.ndarray:
    """[L]: no placement's fullest device has less load than this.

    The largest of: the mean of devices; the heaviest replica where all slots serve to make it light; and, by group,
    what some node's devices have in the mean, however groups are packed.
    """
    load_LE = checked_loads(load_LE, deployment)
    bounds = []
    for load_E in load_LE:
        count_E = search.replica_counts(load_E, deployment.slots, deployment.most_replicas)
        bounds.append(max(load_E.sum() / deployment.devices, np.max(load_E / count_E)))
        if not deployment.is_global:
            load_G = load_E.reshape(deployment.groups, -1).sum(axis=1)
            node = search.fullest_bin_at_least(load_G, deployment.nodes)
            bounds[-1] = max(bounds[-1], node / deployment.devices_per_node)
    return np.array(bounds)


def checked_loads(load_LE: np.ndarray, deployment: Deployment) -> np.ndarray:
    """As float64.

    Raises:
      ConfigError: there are other experts, or none, or loads that can't be.
    """
    load_LE = np.asarray(load_LE, np.float64)
    _require(load_LE.ndim == 2 and load_LE.shape[0] > 0 and load_LE.shape[1] == deployment.experts,
             f"loads have shape {load_LE.shape}: give [layers, experts ({deployment.experts})]")
    _require(bool(np.all(np.isfinite(load_LE)) and np.all(load_LE >= 0)),
             "loads must be finite and not negative: give tokens that each expert got")
    return load_LE


def _place_layer(load_E: np.ndarray, deployment: Deployment, enough: float | None) -> np.ndarray:
    """[M, P]. Without `enough`, the greedy way alone."""
    if deployment.is_global:
        expert_MP = _fill(load_E, np.arange(len(load_E)), deployment, enough)
        # Which devices make a node: all nodes alike.
        load_M = search.bin_loads(search.replica_loads(load_E, expert_MP), expert_MP)
        return expert_MP[_packed(load_M, deployment.nodes, enough)[-1].ravel()]
    expert_GE = np.arange(len(load_E)).reshape(deployment.groups, -1)
    placements = [np.concatenate([_fill(load_E, expert_GE[groups].ravel(), deployment, enough) for groups in group_NG])
                  for group_NG in _packed(load_E[expert_GE].sum(axis=1), deployment.nodes, enough)]
    return min(placements, key=lambda expert_MP: _fullest(load_E, expert_MP, deployment.nodes))


def _packed(load_K: np.ndarray, bins: int, enough: float | None) -> list[np.ndarray]:
    """[N, K / N] each: the greedy packing and, in a search, a better one if there is."""
    greedy_NP = search.packed(load_K, np.arange(len(load_K)), bins)
    if enough is None:
        return [greedy_NP]
    better_NP = search.balanced_by_swaps(load_K, greedy_NP)
    return [greedy_NP] if better_NP is greedy_NP else [greedy_NP, better_NP]


def _fill(load_E: np.ndarray, experts: np.ndarray, deployment: Deployment, enough: float | None) -> np.ndarray:
    """[devices of a domain, P]: these experts and their replicas."""
    slots, devices = deployment.slots // deployment.domains, deployment.devices // deployment.domains

    def greedy(favour: float = 0.0) -> np.ndarray:
        counts = search.replica_counts(load_E[experts], slots, deployment.most_replicas, favour)
        each_E = load_E.copy()
        each_E[experts] /= counts
        return search.packed(each_E, np.repeat(experts, counts), devices)
    if enough is None:
        return greedy()
    found: list[np.ndarray] = []
    for favour in STARTS:
        found.append(search.balanced(load_E, greedy(favour), enough))
        if search.fullest_device(load_E, found[-1]) <= enough:
            break
    return min(found, key=lambda expert_MP: search.fullest_device(load_E, expert_MP))


def _fullest(load_E: np.ndarray, expert_MP: np.ndarray, nodes: int) -> tuple[float, float]:
    """Load of the fullest device, and of the fullest node."""
    load_M = search.bin_loads(search.replica_loads(load_E, expert_MP), expert_MP)
    return load_M.max(), load_M.reshape(nodes, -1).sum(axis=1).max()


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)
