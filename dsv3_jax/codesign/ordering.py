"""A flag must not be seen before its data: who waits, the sender or the receiver (paper 1, section 6.4).

Today a sender writes data, waits until it is acknowledged (a fence), then writes the flag, and the thread that does so
stands still for a round trip. With ordering at the receiver it writes both at once: the receiver holds the flag back
until all earlier packets are there by their sequence numbers ("sequence numbers"), or the reader waits for the packets
of the flag's own range of addresses ("regions", RAR: acquire and release). The model:

- a message's last byte arrives `latency` after it was sent, and so does an acknowledgement or a flag. The paper's
  latency is from CPU to CPU; NICs acknowledge sooner, by how much it does not say, so a fence costs this at most;
- a NIC sends one message after another at `bandwidth`; flags and acknowledgements take none of it;
- `threads` send in turn, each a message of its own, and wait for their fences alone;
- packets that are sprayed over paths are late by a time that is uniform between 0 and `spread`.

Who rings the NIC's doorbell, the GPU (IBGDA) or a thread of the CPU (section 5.2), is not here: neither paper tells
what the detour takes.

Units: bytes, bytes/s, seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dsv3_jax.codesign.checks import not_negative, positive
from dsv3_jax.codesign.hardware import HARDWARE
from dsv3_jax.codesign.links import Link
from dsv3_jax.config import ConfigError

Scope = Literal["sequence numbers", "regions"]
_CX7 = HARDWARE["h800"].scale_out


@dataclass(frozen=True)
class Network:
    """Between two NICs."""

    bandwidth: float = _CX7.bandwidth
    latency: float = _CX7.latency or 0.0
    """From end to end, one way: 3.7 us between leaves (paper 1, table 5)."""
    packet: int = 4096
    """Bytes: the largest of InfiniBand."""
    spread: float = 0.9e-6
    """Between the fastest and the slowest path: what table 5 has between one leaf and two, 3.7 - 2.8 us. A guess for
    paths of equal length, whose queues differ."""

    def __post_init__(self) -> None:
        positive(bandwidth=self.bandwidth, packet=self.packet)
        not_negative(latency=self.latency, spread=self.spread)

    @classmethod
    def of(cls, link: Link) -> Network:
        """What a machine's network is.

        Raises:
          ConfigError: no latency of it is known.
        """
        if link.latency is None:
            raise ConfigError(f"latency of {link.name} is not known; take a machine where it is")
        return cls(link.bandwidth, link.latency)


def message_seconds(size: float, network: Network, fence: bool) -> float:
    """From sending until the receiver sees the flag. A fence adds a round trip."""
    return exchange_seconds(1, size, network, 1 if fence else None)


def exchange_seconds(messages: int, size: float, network: Network, threads: int | None) -> float:
    """From the first byte of so many messages, each with its flag, until the last flag is seen; `threads` of None: the
    receiver orders, and nobody waits.

    With fences, thread i sends messages i, i + threads, ...; it goes on a round trip after its message has left, and
    the NIC pauses where no thread has anything for it.

    Raises:
      ConfigError: a number makes no sense.
    """
    not_negative(size=size)
    positive(messages=messages)
    sending = size / network.bandwidth
    if threads is None:
        return messages * sending + network.latency
    positive(threads=threads)
    if threads * sending >= sending + 2 * network.latency:
        return messages * sending + 3 * network.latency
    rounds, last = divmod(messages - 1, threads)
    return rounds * (sending + 2 * network.latency) + (last + 1) * sending + 3 * network.latency


def bandwidth_reached(size: float, network: Network, threads: int) -> float:
    """Bytes/s in the long run when each of `threads` fences each message of `size` bytes."""
    positive(size=size, threads=threads)
    return min(network.bandwidth, threads * size / (size / network.bandwidth + 2 * network.latency))


def messages_in_flight(size: float, network: Network) -> int:
    """Fenced messages, and threads that stand still for them, that keep the NIC busy."""
    positive(size=size)
    return 1 + math.ceil(2 * network.latency * network.bandwidth / size)


def flag_delay(size: float, network: Network, scope: Scope) -> float:
    """Expected seconds that a flag is held back behind its message in a stream of such messages without a pause: until
    the latest of the packets it waits for, less the time of the last one on the shortest path. It waits for its own in
    "regions", which are few where messages are small; for all before it in "sequence numbers". The flag itself takes
    the path of the last packet.

    A packet sent n gaps earlier is in time by x with probability (x + n gap) / spread, at most 1. The mean of the
    latest is the integral of 1 - the product over packets, and that product a quotient of gamma functions.
    """
    positive(size=size)
    if scope not in get_args(Scope):
        raise ConfigError(f"scope ({scope}) must be one of {', '.join(get_args(Scope))}")
    if network.spread == 0:
        return 0.0
    gap = min(size, network.packet) / network.bandwidth / network.spread  # spread is 1 from here on
    own = math.ceil(size / network.packet) if scope == "regions" else math.inf

    def in_time(x: float) -> float:
        packets = min(own, math.ceil((1 - x) / gap))  # those sent earlier are there
        return math.exp(packets * math.log(gap) + math.lgamma(x / gap + packets) - math.lgamma(x / gap))
    points = 1024
    return network.spread * (1 - sum(in_time((point + 0.5) / points) for point in range(points)) / points)
