"""What a fence before each flag costs, and what a receiver that orders buys (paper 1, section 6.4).

  python experiments/paper/ordering.py
  python experiments/paper/ordering.py --machine h800 --spread 2 --out ordering
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from dsv3_jax.codesign.hardware import hardware
from dsv3_jax.codesign.ordering import (
    Network,
    bandwidth_reached,
    exchange_seconds,
    flag_delay,
    message_seconds,
    messages_in_flight,
)
from dsv3_jax.expert_parallel.exchange import Wire, row_bytes
from dsv3_jax.presets import MODELS
from experiments.command_line import import_pyplot
from experiments.paper.report import Item, Output, Section, run

V3 = MODELS["deepseek_v3"]
ROW = row_bytes(V3.hidden_size, 2, Wire(dispatch="float8")).dispatch
"""A token on its way to an expert."""
TOKENS, CHOICES = 32, 9
"""Section 2.3.2: tokens of a device at a time; routed experts and the shared one."""
EXCHANGES = 2 * 2 * V3.num_hidden_layers
"""Of a decode step: dispatch and combine, two micro-batches, 61 layers (section 2.3.2)."""
STEP_MS = 14.76
"""Section 2.3.2."""


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """What to assume."""

    machine: str = "h800"
    """Whose slow network."""
    latency: float | None = None
    """us from end to end, instead of the machine's."""
    spread: float = 0.9
    """us between the fastest and the slowest path."""


def network_of(options: Options) -> Network:
    """The machine's, with what was said otherwise."""
    network = Network.of(hardware(options.machine).scale_out) if options.latency is None else \
        Network(hardware(options.machine).scale_out.bandwidth, options.latency * 1e-6)
    return dataclasses.replace(network, spread=options.spread * 1e-6)


def section(options: Options = Options()) -> Section:
    """The page."""
    network = network_of(options)
    return Section(
        "Data before its flag: who waits (paper 1, section 6.4)",
        f"A message is {ROW:,} bytes, a token in E4M3 with its scales, on a link of {network.bandwidth / 1e9:g} GB/s "
        f"and {network.latency * 1e6:g} us from end to end. With a fence the sending thread waits for the "
        "acknowledgement, a round trip, before it writes the flag; with ordering at the receiver nobody does. "
        "`dsv3_jax/codesign/ordering.py` has the model.",
        tuple(_items(network)), (("ordering", lambda: draw(network)),))


def _items(network: Network) -> Iterator[Item]:
    messages = TOKENS * CHOICES
    fenced, ordered = (message_seconds(ROW, network, fence) * 1e6 for fence in (True, False))
    yield Item("one message and its flag, with a fence, us", None, fenced)
    yield Item("the same, ordered by the receiver, us", None, ordered, f"{fenced / ordered:.2f} times as fast")
    yield Item("fenced messages in flight, and threads that wait, to fill the link", None,
               messages_in_flight(ROW, network))
    yield Item("link reached by one thread with fences, GB/s", None, bandwidth_reached(ROW, network, 1) / 1e9)
    for threads in (1, 8, 32, 128):
        took = exchange_seconds(messages, ROW, network, threads) * 1e6
        yield Item(f"dispatch of {messages} messages, a fence each, {_threads(threads)}, us", None, took)
    peers = messages // CHOICES
    yield Item(f"{CHOICES} messages to each of {peers} peers, a thread and a fence a peer, us", None,
               exchange_seconds(peers, CHOICES * ROW, network, peers) * 1e6, "one flag after all that go to a peer")
    yield Item(f"dispatch of {messages} messages, ordered by the receiver, us", None,
               exchange_seconds(messages, ROW, network, None) * 1e6)
    yield Item("one fence in each exchange of a decode step, ms", None, EXCHANGES * 2 * network.latency * 1e3,
               f"of {STEP_MS} ms (section 2.3.2), where nothing hides it")
    own, all_before = (flag_delay(ROW, network, scope) * 1e6 for scope in ("regions", "sequence numbers"))
    yield Item("flag held back for its own packets (regions), us", None, own)
    yield Item("flag held back for all earlier packets (sequence numbers), us", None, all_before,
               "in a stream without a pause, over sprayed paths")


def _threads(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def draw(network: Network) -> Any:
    """Against the size of a message."""
    pyplot = import_pyplot()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    sizes = np.geomspace(64, 2 ** 22, 80)
    for name, fence in {"fence": True, "ordered by the receiver": False}.items():
        left.plot(sizes, [message_seconds(size, network, fence) * 1e6 for size in sizes], label=name)
    left.set(xscale="log", yscale="log", xlabel="bytes", ylabel="us until the flag is seen", title="One message")
    for threads in (1, 8, 32, 128):
        middle.plot(sizes, [bandwidth_reached(size, network, threads) / 1e9 for size in sizes],
                    label=f"fences, {_threads(threads)}")
    middle.axhline(network.bandwidth / 1e9, color="black", linestyle=":", label="ordered by the receiver")
    middle.set(xscale="log", xlabel="bytes", ylabel="GB/s", title="A stream of messages, a flag each")
    for scope in ("regions", "sequence numbers"):
        right.plot(sizes, [flag_delay(size, network, scope) * 1e6 for size in sizes], label=scope)
    right.set(xscale="log", xlabel="bytes", ylabel="us that a flag is held back", title="Order at the receiver",
              ylim=(0, None))
    for axis in (left, middle, right):
        axis.axvline(ROW, color="gray", linestyle=":")
        axis.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    run(section, __doc__, Options)
