"""What KV-cache transfers do to decode steps over the same PCIe, and what other hardware does (paper 1, section 4.5).

  python experiments/paper/contention.py
  python experiments/paper/contention.py --devices 144 --compute-ratio 1.3 --out contention
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.codesign.checks import positive
from dsv3_jax.codesign.contention import (
    NVLINK_C2C,
    PCIE_5_X16,
    Port,
    decode_step,
    simulate,
    slowdown_at_most,
    slowdown_of_one,
    transfer_capacity,
    undisturbed_seconds,
)
from dsv3_jax.codesign.hardware import HARDWARE
from dsv3_jax.inference.cache import bytes_per_token
from dsv3_jax.presets import MODELS
from experiments.command_line import import_pyplot
from experiments.paper.report import Item, Output, Section, run

LOADS = (0.15e9, 0.5e9, 1e9, 3e9, 10e9, 20e9, 30e9)
V3 = MODELS["deepseek_v3"]
CACHE_BYTES = bytes_per_token(V3, mtp=False)
"""Of a token, bf16."""
# DeepSeek's published service (open-infra-index, February 2025): 342e9 input tokens a day were found in a cache, by
# 226.75 nodes of 8 GPUs in the mean. From there, as if each were brought in once over PCIe.
SERVICE_LOAD = 342e9 * CACHE_BYTES / 86_400 / (226.75 * 8)


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """What to assume."""

    pcie: float = PCIE_5_X16 / 1e9
    """GB/s one way into a GPU; 64 is nominal for PCIe 5.0 x16."""
    nic: float = HARDWARE["h800"].scale_out.bandwidth / 1e9
    """GB/s that the NIC brings; 50 is nominal for 400 Gbit/s."""
    cpu_link: float = NVLINK_C2C / 1e9
    """GB/s one way of a CPU-GPU link of NVLink's kind."""
    context: int = 4096
    """Tokens of the cache that one transfer brings, 70,272 bytes each."""
    compute_ratio: float = 1.0
    """Time of computing over that of the exchange beside it; 1 is paper 1's just hidden."""
    devices: int = 320
    """That wait for each other: paper 2's decode has 320 (section 3.4.2)."""
    steps: int = 10
    """To simulate."""
    seed: int = 0


class Ways(NamedTuple):
    """How the two come to the GPU."""

    shared: Port
    exchange_first: Port
    own_paths: Port
    nvlink: Port


class Told(NamedTuple):
    """Means of one simulation."""

    mean: float
    """Of steps, over the undisturbed."""
    worst: float
    transfer: float
    """Seconds of one; infinite in overload, nan where none came."""


def ways(options: Options) -> Ways:
    """PCIe shared in turn; with priorities; a NIC in the I/O die; a CPU-GPU link of NVLink's kind."""
    pcie, nic, link = options.pcie * 1e9, options.nic * 1e9, options.cpu_link * 1e9
    return Ways(Port(pcie, nic, pcie, "fair"), Port(pcie, nic, pcie, "exchange_first"),
                Port(pcie, nic, pcie, "nothing"), Port(pcie, nic, link, "nothing"))


def told(port: Port, load: float, devices: int, options: Options) -> Told:
    """One simulation."""
    step = decode_step(port, options.compute_ratio)
    steps = options.steps * (8 if devices == 1 else 1)  # one alone meets few transfers
    outcome = simulate(port, step, load, options.context * CACHE_BYTES, devices, steps, options.seed)
    alone = undisturbed_seconds(port, step)
    transfer = float(np.mean(outcome.transfers)) if len(outcome.transfers) else float("nan")
    return Told(float(outcome.steps.mean()) / alone, float(outcome.steps.max()) / alone, transfer)


def section(options: Options = Options()) -> Section:
    """The page."""
    positive(context=options.context)
    return Section(
        "KV caches and experts' rows on one PCIe link (paper 1, section 4.5)",
        f"A decode step of section 2.3.2 ({options.nic:g} GB/s from the NIC, computing takes "
        f"{options.compute_ratio:g} times as long as the exchange beside it) while caches of {options.context:,} "
        f"tokens come from the CPU over the same {options.pcie:g} GB/s into the GPU, at random times. Devices wait "
        "for each other after each exchange, so a transfer to any of a group slows all: the larger the group, the "
        "smaller the load that costs the full price. All of the model is in `dsv3_jax/codesign/contention.py`.",
        tuple([*_alone(options), *_loaded(options)]),
        (("contention", lambda: draw(options)),))


def _alone(options: Options) -> Iterator[Item]:
    """Without simulation: one transfer that meets exchanges without a pause."""
    shared, first, own, nvlink = ways(options)
    seconds = undisturbed_seconds(shared, decode_step(shared, options.compute_ratio))
    as_paper = shared.rates(True, False)[0] == 50e9 and options.compute_ratio <= 1
    yield Item("section 2.3.2, decode step without transfers, ms", 14.76 if as_paper else None, seconds * 1e3)
    yield Item("exchange beside a transfer, time over alone", None,
               shared.rates(True, False)[0] / shared.rates(True, True)[0], "halves of the link")
    yield Item("the same, of a step", None, slowdown_at_most(shared, options.compute_ratio),
               "computation beside it hides the rest")
    yield Item("the same, computing takes 1.3 of the exchange", None, slowdown_at_most(shared, 1.3))
    yield Item("largest pace of transfers that slows nothing, GB/s", None,
               max(shared.link - shared.nic, 0.0) / 1e9, "software that holds transfers to it needs no hardware")
    size = options.context * CACHE_BYTES
    for name, port in (("PCIe shared", shared), ("exchange first", first), ("NIC in the I/O die", own),
                       (f"CPU-GPU link of {options.cpu_link:g} GB/s", nvlink)):
        rate = transfer_capacity(port)
        if rate:
            yield Item(f"transfer of {size / 1e6:.0f} MB beside exchanges, {name}, ms", None, size / rate * 1e3)


def _loaded(options: Options) -> Iterator[Item]:
    """Simulated."""
    shared, first, own, _ = ways(options)
    yield Item("KV load of DeepSeek's service, GB/s a GPU", None, SERVICE_LOAD / 1e9,
               "mean over day and fleet, prefill too, as if every cached token came once over PCIe")
    for load in (SERVICE_LOAD, 1e9, 10e9):
        result = told(shared, load, options.devices, options)
        yield Item(f"step, {options.devices} GPUs, {load / 1e9:.3g} GB/s each, PCIe shared: mean over undisturbed",
                   None, result.mean, f"worst {result.worst:.3f}")
        if options.compute_ratio <= 1 and load <= shared.rates(True, True)[1]:
            yield Item(f"the same, one GPU, {load / 1e9:.3g} GB/s", None, slowdown_of_one(shared, load),
                       "also a group's, if its transfers all come at the same times")
    for name, port in (("exchange first", first), ("NIC in the I/O die", own)):
        result = told(port, 10e9, options.devices, options)
        waits = f"mean transfer {result.transfer * 1e3:.1f} ms, none waiting at first"
        yield Item(f"step, {options.devices} GPUs, 10 GB/s each, {name}: mean over undisturbed", None, result.mean,
                   waits if np.isfinite(result.transfer) else "transfers pile up")


def draw(options: Options) -> Any:
    """Steps and transfers against the load."""
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    shared, first, own, nvlink = ways(options)
    loads = np.array(LOADS)
    for devices in dict.fromkeys((1, min(32, options.devices), options.devices)):
        results = [told(shared, load, devices, options) for load in LOADS]
        [line] = left.plot(loads / 1e9, [result.mean for result in results], "o-",
                           label="PCIe shared, one GPU" if devices == 1 else f"PCIe shared, {devices} that wait")
        left.plot(loads / 1e9, [result.worst for result in results], ":", color=line.get_color())
    results = [told(first, load, min(32, options.devices), options) for load in LOADS]
    left.plot(loads / 1e9, [result.mean for result in results], "s-", label="exchange first, or own paths")
    left.set(xscale="log", xlabel="KV load, GB/s a GPU", ylabel="decode step over undisturbed (dotted: worst)",
             title="What transfers cost a step")
    left.set_ylim(top=left.get_ylim()[1] + 0.15)  # room for the legend
    left.legend(fontsize=8, loc="upper left", ncols=2)
    for name, port in {"PCIe shared": shared, "exchange first": first, "NIC in the I/O die": own,
                       f"CPU-GPU link of {options.cpu_link:g} GB/s": nvlink}.items():
        times = np.array([told(port, load, min(32, options.devices), options).transfer for load in LOADS]) * 1e3
        shown = np.isfinite(times)
        right.plot(loads[shown] / 1e9, times[shown], "o-", label=name)
    right.set(xscale="log", yscale="log", xlabel="KV load, GB/s a GPU", ylabel="ms until a transfer is done",
              title=f"Transfers of {options.context:,} tokens; ends where they pile up")
    right.set_ylim(bottom=right.get_ylim()[0] / 4)
    right.legend(fontsize=8, loc="lower left")
    return figure


if __name__ == "__main__":
    run(section, __doc__, Options)
