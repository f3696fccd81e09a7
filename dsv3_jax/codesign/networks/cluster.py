"""Nodes on a network: a GPU for every endpoint, joined by NVLink inside its node, and the rate of every link.

A directed link has a number. Of E endpoints and C cables: `up` 0 to E-1 from a GPU's NIC to its switch, `down` E to
2E-1 back, `out` 2E to 3E-1 from a GPU to its node's NVSwitch, `into` 3E to 4E-1 back, then C cables as `cables_C2` has
them, then the same the other way.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from dsv3_jax.codesign.checks import at_least, positive
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.networks.graph import Network
from dsv3_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Rates:
    """Bytes/s, one way."""

    nic: float
    """Of a GPU's NIC and its cable to a switch."""
    nvlink: float
    """Of a GPU to its NVSwitch."""
    cable: float
    """Between switches."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            positive(**{field.name: getattr(self, field.name)})

    @staticmethod
    def of(hardware: Hardware, rates: Literal["nominal", "effective"] = "effective") -> Rates:
        """`effective`: what NICs and NVLink reach in practice. Cables between switches have the NICs' nominal rate:
        what falls short lies in the ends."""
        out, up = hardware.scale_out, hardware.scale_up
        if rates == "nominal":
            return Rates(out.bandwidth, up.bandwidth, out.bandwidth)
        return Rates(out.effective, up.effective, out.bandwidth)


@dataclasses.dataclass(frozen=True, eq=False)
class Cluster:
    """GPU g is on node g // node_size; its NIC is endpoint g, rail g % node_size."""

    network: Network
    rates: Rates
    node_size: int = 8

    def __post_init__(self) -> None:
        at_least(1, node_size=self.node_size)
        if self.network.endpoints % self.node_size:
            raise ConfigError(f"endpoints ({self.network.endpoints}) must be whole nodes of node_size "
                              f"({self.node_size})")

    @property
    def gpus(self) -> int:
        return self.network.endpoints

    @property
    def nodes(self) -> int:
        return self.gpus // self.node_size

    @property
    def links(self) -> int:
        return 4 * self.gpus + 2 * self.network.links

    def up(self, gpu: np.ndarray) -> np.ndarray:
        return gpu

    def down(self, gpu: np.ndarray) -> np.ndarray:
        return self.gpus + gpu

    def out(self, gpu: np.ndarray) -> np.ndarray:
        return 2 * self.gpus + gpu

    def into(self, gpu: np.ndarray) -> np.ndarray:
        return 3 * self.gpus + gpu

    def cable(self, directed: np.ndarray) -> np.ndarray:
        """Of a cable's number, plus the number of cables for the way back."""
        return 4 * self.gpus + directed

    def capacity_L(self) -> np.ndarray:
        """float64 [links], bytes/s."""
        rates = self.rates
        return np.repeat([rates.nic, rates.nic, rates.nvlink, rates.nvlink, rates.cable],
                         [self.gpus] * 4 + [2 * self.network.links]).astype(float)
