"""KV caches on their way to a GPU beside its expert-parallel traffic (paper 1, section 4.5).

A GPU and its NIC hang on one PCIe switch. What peers send for its experts comes from the NIC, a cached context from the
CPU, and both go down the one link from the switch into the GPU. The model is of fluids:

- that link carries `link` bytes/s; the NIC brings at most `nic`, the CPU at most `host`;
- a link that is shared "fair"ly gives both halves, and what one leaves to the other: a switch that serves its ports in
  turn, with packets of one size. "exchange_first" lets the exchange go first, at any instant. "nothing" is shared where
  the two have paths of their own: the NIC in the GPU's I/O die, or a CPU-GPU link of NVLink's kind;
- a device's transfers come one after another, in the order in which they arrive at random (Poisson);
- a step is a row of phases, in each of which one micro-batch is exchanged while the other is computed. A phase ends on
  all devices of the group at once, when the last has received its part and computed.

Left out: the way out of the GPU, where the cache that is saved meets what the GPU sends, by the same arithmetic; the
bandwidth of the CPU's memory and of the GPU's; packets, so that the exchange waits for no packet that is under way
(256 bytes of PCIe are 4 ns); congestion in the network that a slow receiver causes for others.

Units: bytes, bytes/s one way, seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from dsv3_jax.codesign.checks import not_negative, positive
from dsv3_jax.codesign.hardware import HARDWARE
from dsv3_jax.config import ConfigError

Shared = Literal["fair", "exchange_first", "nothing"]

PCIE_5_X16 = 64e9
"""Nominal, in the paper's round numbers: 160 lanes carry 640 GB/s (paper 1, section 6.2). Less the coding it is the
63.0 of `links.LINKS["pcie5_x16"]`."""
NVLINK_C2C = 450e9
"""Nominal: 900 GB/s both ways between a Grace CPU and its GPU (NVIDIA Grace Hopper white paper)."""


@dataclass(frozen=True)
class Port:
    """The ways into one GPU."""

    link: float = PCIE_5_X16
    nic: float = HARDWARE["h800"].scale_out.bandwidth
    host: float = PCIE_5_X16
    """What transfers take at most: the CPU's link, or the pace to which software holds them."""
    shared: Shared = "fair"

    def __post_init__(self) -> None:
        positive(link=self.link, nic=self.nic, host=self.host)
        if self.shared not in get_args(Shared):
            raise ConfigError(f"shared ({self.shared}) must be one of {', '.join(get_args(Shared))}")

    def rates(self, exchanging: bool, transferring: bool) -> tuple[float, float]:
        """Bytes/s of the exchange and of the transfer, each zero where it is not there."""
        nic, host = self.nic * exchanging, self.host * transferring
        if self.shared == "nothing":
            return nic, host
        nic, host = min(nic, self.link), min(host, self.link)
        if nic + host <= self.link:
            return nic, host
        if self.shared == "exchange_first" or nic <= self.link / 2:
            return nic, self.link - nic
        host = min(host, self.link / 2)
        return self.link - host, host


class Phase(NamedTuple):
    """One micro-batch's exchange, and what is computed meanwhile."""

    received: float
    """Bytes that a device receives."""
    compute: float


def decode_step(port: Port, compute_ratio: float = 1.0, layers: int = 61, rows: int = 32 * 9,
                width: int = 7000) -> list[Phase]:
    """Of paper 1 section 2.3.2: in each layer, for each of two micro-batches, a dispatch of one byte a value and a
    combine of two. `compute_ratio` is the time of computing over that of an undisturbed exchange; at 1 or less the
    exchange is all one sees.

    Raises:
      ConfigError: a number makes no sense.
    """
    positive(layers=layers, rows=rows, width=width)
    not_negative(compute_ratio=compute_ratio)
    alone, _ = port.rates(True, False)
    return [Phase(size * rows * width, compute_ratio * size * rows * width / alone)
            for _ in range(layers) for _ in range(2) for size in (1, 2)]


def undisturbed_seconds(port: Port, step: list[Phase]) -> float:
    """Of one step without transfers."""
    alone, _ = port.rates(True, False)
    return sum(max(phase.received / alone, phase.compute) for phase in step)


def busy_share(port: Port, step: list[Phase]) -> float:
    """Part of an undisturbed step in which the exchange is under way."""
    alone, _ = port.rates(True, False)
    return sum(phase.received for phase in step) / alone / undisturbed_seconds(port, step)


def transfer_capacity(port: Port, busy: float = 1.0) -> float:
    """Bytes/s of transfers that a device can take in the long run when exchanges are under way for `busy` of its time.

    (Exchanges that transfers slow down are under way for longer: with slack, an upper bound.)
    """
    return busy * port.rates(True, True)[1] + (1 - busy) * port.rates(False, True)[1]


def slowdown_of_one(port: Port, load: float) -> float:
    """Mean time of a step over the undisturbed, of a device that waits for no other and whose exchanges never pause:
    for a part `load` / rate of the time the exchange has less.

    Raises:
      ConfigError: the load is more than goes through.
    """
    not_negative(load=load)
    alone, beside = port.rates(True, False)[0], port.rates(True, True)
    if load > beside[1]:
        raise ConfigError(f"load ({load:.3g}) must be at most the {beside[1]:.3g} bytes/s left beside the exchange")
    part = load / beside[1] if load else 0.0
    return alone / (alone * (1 - part) + beside[0] * part)


def slowdown_at_most(port: Port, compute_ratio: float = 1.0) -> float:
    """Of a phase during all of which some device of the group has a transfer."""
    not_negative(compute_ratio=compute_ratio)
    stretched = port.rates(True, False)[0] / port.rates(True, True)[0]
    return max(stretched, compute_ratio) / max(1.0, compute_ratio)


class Outcome(NamedTuple):
    """What happened in a simulation."""

    steps: np.ndarray
    """Seconds of each step."""
    transfers: np.ndarray
    """Seconds from arrival to the last byte, of each transfer that arrived meanwhile; infinite where it was not
    finished in ten times as long, or where more arrives than goes through."""


def simulate(port: Port, step: list[Phase], load: float, size: float, devices: int, steps: int,
             seed: int = 0) -> Outcome:
    """Steps of a group of devices, to each of which transfers of `size` bytes come at `load` bytes/s in the mean.

    Every event is met exactly; all devices go from one to their next at once. After the last step further ones follow
    until all transfers are there.

    Raises:
      ConfigError: a number makes no sense.
    """
    positive(size=size, devices=devices, steps=steps)
    not_negative(load=load)
    longest = steps * undisturbed_seconds(port, step) * port.rates(True, False)[0] / port.rates(True, True)[0]
    group = _Group(port, size, _arrivals(load / size, longest, devices, seed))
    ends = [0.0]
    while len(ends) <= steps:
        ends.append(_run_step(group, step, ends[-1]))
    arrived = group.arrivals_DJ < ends[-1]
    now, tries = ends[-1], 9 * steps if load < transfer_capacity(port, busy_share(port, step)) else 0
    while tries and np.isinf(group.finished_DJ[arrived]).any():
        now, tries = _run_step(group, step, now), tries - 1
    return Outcome(np.diff(ends), group.finished_DJ[arrived] - group.arrivals_DJ[arrived])


def _run_step(group: _Group, step: list[Phase], now: float) -> float:
    """Its end."""
    for phase in step:
        received = group.run(phase.received, now)
        now = max(received, now + phase.compute)
        group.run(0.0, now)
    return now


def _arrivals(rate: float, horizon: float, devices: int, seed: int) -> np.ndarray:
    """Times [D, J] of a Poisson process on each device until `horizon` and beyond; the last of each is never."""
    never = np.full((devices, 1), math.inf)
    if rate == 0:
        return never
    mean = rate * horizon
    gaps = np.random.default_rng(seed).exponential(1 / rate, (devices, int(mean + 8 * math.sqrt(mean) + 8)))
    return np.concatenate([np.cumsum(gaps, axis=1), never], axis=1)


class _Group:
    """Devices with clocks of their own, and their transfers."""

    def __init__(self, port: Port, size: float, arrivals_DJ: np.ndarray) -> None:
        self.rates = np.array([[port.rates(exchanging, transferring) for transferring in (False, True)]
                               for exchanging in (False, True)])
        self.size, self.arrivals_DJ = size, arrivals_DJ
        self.finished_DJ = np.full(arrivals_DJ.shape, math.inf)
        devices = len(arrivals_DJ)
        self.each = np.arange(devices)
        self.clock_D = np.zeros(devices)
        self.job_D = np.zeros(devices, int)
        self.left_D = np.full(devices, size)

    def run(self, exchange: float, until: float) -> float:
        """Each device goes on until it has received `exchange` and it is at least `until`; the latest clock."""
        exchange_D = np.full(len(self.each), exchange)
        while (running := (exchange_D > 0) | (self.clock_D < until)).any():
            exchange_D = self._next_event(exchange_D, until, running)
        return float(self.clock_D.max())

    def _next_event(self, exchange_D: np.ndarray, until: float, running: np.ndarray) -> np.ndarray:
        exchanging = exchange_D > 0
        arrival_D = self.arrivals_DJ[self.each, self.job_D]
        transferring = arrival_D <= self.clock_D
        received, transferred = self.rates[exchanging.astype(int), transferring.astype(int)].T
        with np.errstate(divide="ignore", invalid="ignore"):
            own_D = np.where(exchanging, exchange_D / received, until - self.clock_D)
            other_D = np.where(transferring, self.left_D / transferred, arrival_D - self.clock_D)
        step_D = np.where(running, np.minimum(own_D, other_D), 0.0)
        done = running & transferring & (other_D <= own_D)
        # What an event brings about is set, not added up, so that rounding never leaves a rest.
        exchange_D = np.where(exchanging & (own_D <= other_D), 0.0, np.maximum(exchange_D - received * step_D, 0))
        self.left_D = np.where(done, self.size, self.left_D - transferred * step_D)
        clock_D = np.where(running & ~exchanging & (own_D <= other_D), until, self.clock_D + step_D)
        self.clock_D = np.where(running & ~transferring & (other_D <= own_D), arrival_D, clock_D)
        self.finished_DJ[self.each[done], self.job_D[done]] = self.clock_D[done]
        self.job_D = self.job_D + done
        return exchange_D
