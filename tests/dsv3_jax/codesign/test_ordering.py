"""Fences and flags against a simulation of every message and of every packet."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dsv3_jax.codesign.hardware import hardware
from dsv3_jax.codesign.ordering import (
    Network,
    bandwidth_reached,
    exchange_seconds,
    flag_delay,
    message_seconds,
    messages_in_flight,
)
from dsv3_jax.config import ConfigError

NETWORK = Network(bandwidth=100.0, latency=3.0, packet=50, spread=4.0)
NEAR = dataclasses.replace(NETWORK, latency=0.0)


def played(messages: int, size: float, network: Network, threads: int) -> float:
    """Message by message: when the NIC is free and the thread's fence has passed, it sends."""
    free, ready = 0.0, [0.0] * threads
    for message in range(messages):
        thread = message % threads
        free = max(free, ready[thread]) + size / network.bandwidth
        ready[thread] = free + 2 * network.latency
    return free + 3 * network.latency


@pytest.mark.parametrize("size", [0, 50, 100, 600, 5000])
@pytest.mark.parametrize("threads", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("messages", [1, 2, 6, 7, 13])
def test_exchange_against_every_message(size, threads, messages):
    assert exchange_seconds(messages, size, NETWORK, threads) == pytest.approx(played(messages, size, NETWORK, threads))
    assert exchange_seconds(messages, size, NEAR, threads) == pytest.approx(messages * size / 100)


def test_one_message_by_hand():
    """Two seconds to send, three on the way; with a fence, three for the acknowledgement and three for the flag."""
    assert message_seconds(200, NETWORK, fence=False) == 5
    assert message_seconds(200, NETWORK, fence=True) == 11
    assert message_seconds(200, NEAR, fence=True) == message_seconds(200, NEAR, fence=False) == 2
    assert exchange_seconds(10, 200, NETWORK, None) == 23


def test_bandwidth_is_that_of_a_long_exchange():
    for threads in (1, 3, 4, 5):
        took = played(4000 * threads, 200, NETWORK, threads)
        assert bandwidth_reached(200, NETWORK, threads) == pytest.approx(4000 * threads * 200 / took, rel=1e-3)


@pytest.mark.parametrize("size", [60, 200, 599, 600, 601])
def test_messages_in_flight_are_just_enough(size):
    needed = messages_in_flight(size, NETWORK)
    assert bandwidth_reached(size, NETWORK, needed) == pytest.approx(100)
    assert bandwidth_reached(size, NETWORK, needed - 1) < 100 * (1 - 1e-9)
    assert messages_in_flight(size, NEAR) == 1


@pytest.mark.parametrize("size", [10, 50, 120, 400, 1000])
@pytest.mark.parametrize("scope", ["regions", "sequence numbers"])
def test_flags_against_every_packet(size, scope):
    """A stream of messages; 20,000 draws of the lateness of all packets, for a mean with an error of 0.01."""
    random = np.random.default_rng(0)
    whole = min(size, NETWORK.packet)
    packets = -(-size // NETWORK.packet) if scope == "regions" else int(2 * NETWORK.spread * 100 / whole)
    sent_P = -whole / NETWORK.bandwidth * np.arange(packets)
    late_NP = random.uniform(0, NETWORK.spread, (20_000, packets))
    expected = (sent_P + late_NP).max(axis=1).mean()
    assert flag_delay(size, NETWORK, scope) == pytest.approx(expected, abs=0.03)


def test_flags_at_the_ends():
    assert flag_delay(50, NETWORK, "regions") == pytest.approx(4.0 / 2)  # one packet: the mean lateness
    fast = dataclasses.replace(NETWORK, bandwidth=1e9)
    assert flag_delay(150, fast, "regions") == pytest.approx(4.0 * 3 / 4, rel=1e-5)  # of three at once
    assert flag_delay(150, fast, "sequence numbers") == pytest.approx(4.0, rel=1e-2)
    assert flag_delay(150, dataclasses.replace(NETWORK, spread=0), "regions") == 0
    assert flag_delay(10**6, NETWORK, "regions") == pytest.approx(flag_delay(10**6, NETWORK, "sequence numbers"))


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Network(bandwidth=0), r"bandwidth \(0\)"),
    (lambda: Network(latency=-1e-6), r"latency \(-1e-06\)"),
    (lambda: Network(packet=0), r"packet \(0\)"),
    (lambda: Network(spread=-1), r"spread \(-1\)"),
    (lambda: Network.of(hardware("v5p").scale_out), "latency of DCN is not known"),
    (lambda: exchange_seconds(0, 1, NETWORK, 1), r"messages \(0\)"),
    (lambda: exchange_seconds(1, -1, NETWORK, 1), r"size \(-1\)"),
    (lambda: exchange_seconds(1, 1, NETWORK, 0), r"threads \(0\)"),
    (lambda: bandwidth_reached(0, NETWORK, 1), r"size \(0\)"),
    (lambda: flag_delay(1, NETWORK, "luck"), r"scope \(luck\)"),
])
def test_nonsense_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_network_of_a_machine():
    network = Network.of(hardware("h800").scale_out)
    assert (network.bandwidth, network.latency) == (50e9, 3.7e-6)
