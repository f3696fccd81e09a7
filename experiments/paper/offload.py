"""What SMs do for communication, and what hardware that did it would buy (paper 1, sections 3.2, 4.4 and 6.5).

  python experiments/paper/offload.py
  python experiments/paper/offload.py --compute-bound 0.7 --limit 4 --out offload
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from dsv3_jax.codesign.checks import positive
from dsv3_jax.codesign.compression import Codec, Of, break_even_bandwidth, combine_bytes, combine_seconds
from dsv3_jax.codesign.hardware import hardware
from dsv3_jax.codesign.multicast import Crossing, Way, bytes_a_token, crossings, seconds
from dsv3_jax.codesign.sm_tax import (
    TABLE_4,
    Multiprocessors,
    gain,
    ratio_of_equal_times,
    step_without_tax,
    tuned,
    without_forwarding,
)
from dsv3_jax.codesign.traffic import random_choices
from dsv3_jax.config import Combine, ConfigError
from dsv3_jax.expert_parallel.exchange import Wire, row_bytes
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.presets import MODELS
from experiments.command_line import import_pyplot
from experiments.paper.report import Item, Output, Section, run

V3 = MODELS["deepseek_v3"]
TOPOLOGY = Topology(V3.n_routed_experts, scale_out=8, scale_up=8)
"""Paper 1's example, section 4.3."""
ROW = row_bytes(V3.hidden_size, 2, Wire(dispatch="float8"))
TOKENS = 4096
"""Of a device, in a training step's micro-batch."""


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """What to assume."""

    communicating: float = 20
    """SMs of 132."""
    compute_bound: float = 1.0
    """Part of forward and backward that takes time in proportion to 1 / SMs; the rest is bound by memory or power."""
    limit: int = V3.topk_group
    """Nodes that a token may go to."""
    tokens: int = 16_384
    """Whose choices are counted; affinities are random."""
    machine: str = "h800"
    """Whose links."""
    seed: int = 0

    def __post_init__(self) -> None:
        positive(tokens=self.tokens)
        if not 1 <= self.limit <= V3.n_group:
            raise ConfigError(f"limit ({self.limit}) must be 1 to {V3.n_group}, DeepSeek-V3's groups")


@functools.cache
def counted(limit: int, tokens: int, seed: int) -> dict[Way, Crossing]:
    """V3's router under a node limit."""
    return crossings(random_choices(dataclasses.replace(V3, topk_group=limit), tokens, seed), TOPOLOGY)


def section(options: Options = Options()) -> Section:
    """The page."""
    return Section(
        "What SMs do for communication, done by hardware (paper 1, sections 3.2, 4.4 and 6.5)",
        f"Three things that SMs do today: they forward, copy and add ({options.communicating:g} of 132 compute "
        "nothing meanwhile); they make the copies of a multicast, row by row over NVLink; they would encode and decode "
        "LogFMT. Rows are those of DeepSeek-V3's router with random affinities on 8 nodes of 8, E4M3 there and bf16 "
        f"back; links are those that {options.machine} reaches. Assumptions are in `sm_tax.py`, `multicast.py` and "
        "`compression.py` of `dsv3_jax/codesign`.",
        tuple([*_taxed(options), *_copied(options), *_encoded()]),
        (("offload_sms", lambda: draw_sms(options)), ("offload_multicast", lambda: draw_multicast(options)),
         ("offload_logfmt", draw_logfmt)))


def _taxed(options: Options) -> Iterator[Item]:
    sms = Multiprocessors(communicating=options.communicating)
    yield Item("table 4, step: sum of its parts, s", 19.926, sum(TABLE_4), "the parts as printed, rounded")
    step = step_without_tax(TABLE_4, sms, options.compute_bound)
    yield Item("the same with a co-processor, s", None, step,
               f"at most, {sum(TABLE_4) / step:.3f} times as fast: {options.compute_bound:.0%} bound by computing")
    for ratio in (0.5, 1.0, 1.5):
        bought = gain(ratio, sms)
        beside = f"communication {ratio:g} of computation"
        yield Item(f"co-processor, {beside}: times as fast", None, bought.fixed)
        yield Item(f"the same over the best number of SMs, {tuned(ratio, sms).communicating:.1f}", None, bought.tuned)
    ways = counted(options.limit, options.tokens, options.seed)
    forwarded, alone = ways["GPUs forward"].sent, ways["each choice"].sent
    if forwarded:
        yield Item("inference by RDMA alone: rows over the slow network, times those with forwarding", None,
                   alone / forwarded, f"{alone:.2f} over {forwarded:.2f} a token")
        yield Item("up to which communication over computation, with forwarding, it is no slower", None,
                   ratio_of_equal_times(alone / forwarded, sms))


def _copied(options: Options) -> Iterator[Item]:
    machine = hardware(options.machine)
    ways = counted(options.limit, options.tokens, options.seed)
    for way, crossing in ways.items():
        sent, took = bytes_a_token(crossing, ROW), seconds(crossing, ROW, TOKENS, machine)
        yield Item(f"{way}: out of the NIC, KB a token there and back", None, sent.nic_out / 1e3)
        yield Item(f"{way}: into the NIC, KB", None, sent.nic_in / 1e3)
        yield Item(f"{way}: NVLink, KB", None, sent.fast / 1e3)
        yield Item(f"{way}: {TOKENS:,} tokens, dispatch then combine, ms", None, took.in_turn * 1e3)
        yield Item(f"{way}: the same, one's dispatch beside another's combine, ms", None, took.at_once * 1e3)


def _encoded() -> Iterator[Item]:
    plain = combine_bytes("plain")
    formats: tuple[Combine, ...] = ("logfmt8", "logfmt10")
    readings: dict[Of, str] = {"plain": "bf16's combine", "compressed": "the shortened combine"}
    for combine in formats:
        bits = combine.removeprefix("logfmt")
        for overhead in (0.5, 1.0):
            for of, whose in readings.items():
                yield Item(f"LogFMT-{bits} on SMs, {overhead:.0%} of {whose}: pays on links below, GB/s", None,
                           break_even_bandwidth(combine, Codec(overhead, of)) / 1e9)
        yield Item(f"LogFMT-{bits} in the network: combine, times as fast", None, plain / combine_bytes(combine),
                   "on any link")


def draw_sms(options: Options) -> Any:
    """What a co-processor buys against communication over computation."""
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    sms, ratios = Multiprocessors(communicating=options.communicating), np.linspace(0, 2, 201)
    bought = [gain(ratio, sms) for ratio in ratios]
    left.plot(ratios, [each.fixed for each in bought], label=f"{options.communicating:g} SMs communicate")
    left.plot(ratios, [each.tuned for each in bought], label="as many SMs as needed")
    left.axvline(1, color="gray", linestyle=":", label="DeepSeek-V3's training, about 1:1")
    left.set(xlabel="communication over computation", ylabel="speed with a co-processor", title="Training")
    left.legend(fontsize=8)
    ways = counted(options.limit, options.tokens, options.seed)
    copies = ways["each choice"].sent / ways["GPUs forward"].sent if ways["GPUs forward"].sent else 1.0
    for name, times in {"SMs forward": [max(sms.slowdown, ratio) for ratio in ratios],
                        "RDMA alone": [without_forwarding(ratio, copies) for ratio in ratios],
                        "co-processor forwards": [max(1.0, ratio) for ratio in ratios]}.items():
        right.plot(ratios, times, label=name)
    right.set(xlabel="communication over computation, with forwarding", ylabel="time over computation",
              title=f"Inference, at most {options.limit} nodes a token")
    right.legend(fontsize=8)
    return figure


def draw_multicast(options: Options) -> Any:
    """Times of the four ways against the node limit."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    machine, limits = hardware(options.machine), range(1, V3.n_group + 1)
    for way in counted(1, options.tokens, options.seed):
        took = [seconds(counted(limit, options.tokens, options.seed)[way], ROW, TOKENS, machine)
                for limit in limits]
        style = "s--" if way == "switches copy, for nodes" else "o-"  # in turn it is no faster, and lies on another
        axes[0].plot(limits, [each.in_turn * 1e3 for each in took], style, label=way)
        axes[1].plot(limits, [each.at_once * 1e3 for each in took], style, label=way)
    axes[0].set(xlabel="node limit M", ylabel=f"ms, dispatch and combine of {TOKENS:,} tokens", ylim=(0, None),
                title="One after the other")
    axes[1].set(xlabel="node limit M", title="Dispatch of one beside combine of another")
    axes[0].legend(fontsize=8)
    return figure


def draw_logfmt() -> Any:
    """A combine's time against the link."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    links = np.geomspace(5e9, 900e9, 100)
    formats: tuple[Combine, ...] = ("logfmt8", "logfmt10")
    for axis, combine in zip(axes, formats, strict=True):
        plain = np.array([combine_seconds("plain", link, Codec()) for link in links])
        for name, codec in {"SMs, 100% of bf16's combine": Codec(1.0), "SMs, 50% of it": Codec(0.5),
                            "SMs, 50% of the shortened one": Codec(0.5, "compressed"),
                            "in the network": Codec(0.0)}.items():
            axis.plot(links / 1e9, plain / [combine_seconds(combine, link, codec) for link in links], label=name)
        axis.axhline(1, color="gray", linestyle=":")
        axis.axvline(50, color="gray", linestyle=":")
        axis.set(xscale="log", xlabel="link, GB/s (dotted: the paper's 50)",
                 title=f"LogFMT-{combine.removeprefix('logfmt')}")
    axes[0].set(ylabel="combine, times as fast as bf16")
    axes[0].legend(fontsize=8)
    return figure


if __name__ == "__main__":
    run(section, __doc__, Options)
