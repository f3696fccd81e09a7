"""How much of a cluster's time is progress, and what noticing sooner or sending again buys (paper 1, section 6.1, 6.3).

  python experiments/paper/failures.py
  python experiments/paper/failures.py --checkpoint 5 --detection 60 --out failures
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from dsv3_jax.codesign.counting import count_parameters
from dsv3_jax.codesign.failures import (
    LLAMA_3_DEVICE_SECONDS,
    LLAMA_3_LINK_SHARE,
    Reliability,
    best_goodput,
    best_interval,
    checkpoint_floor,
    youngs_interval,
)
from dsv3_jax.presets import MODELS
from experiments.command_line import import_pyplot
from experiments.paper.report import Item, Output, Section, run

SIZES = tuple(2_048 * 2 ** power for power in range(6))
STATE_BYTES = 8
"""A parameter in a checkpoint: float32 master weight, bf16 moments (paper 2, section 3.3.3)."""


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """What to assume."""

    device_hours: float = LLAMA_3_DEVICE_SECONDS / 3600
    """Mean time of a device between failures; Llama 3's."""
    checkpoint: float = Reliability.checkpoint
    """Seconds that training stands still for a checkpoint."""
    detection: float = Reliability.detection
    """Seconds until a failure is noticed; 600 is PyTorch's time limit of a collective."""
    fast_detection: float = 10.0
    """The same with diagnostics."""
    restart: float = Reliability.restart
    """Seconds until training goes on."""
    retried: float = LLAMA_3_LINK_SHARE
    """Share of failures that a retry at the link would hide; Llama 3's share of switches and cables."""


def machines(options: Options) -> dict[str, Reliability]:
    """As it is, and with what the paper asks for."""
    now = Reliability(options.device_hours * 3600, options.checkpoint, options.detection, options.restart)
    return {"as it is": now,
            "links send again": dataclasses.replace(now, retried=options.retried),
            "noticed sooner": dataclasses.replace(now, detection=options.fast_detection),
            "both": dataclasses.replace(now, detection=options.fast_detection, retried=options.retried)}


def section(options: Options = Options()) -> Section:
    """The page."""
    return Section(
        "Failures: the share of time that is progress (paper 1, sections 6.1 and 6.3)",
        "The paper says that failures grow with the system, and gives no rate. Here a device fails every "
        f"{options.device_hours:,.0f} hours (Llama 3's 419 interruptions in 54 days on 16,384 H100 are "
        f"{LLAMA_3_DEVICE_SECONDS / 3600:,.0f}; its team tells of more than 90% effective time), a "
        f"checkpoint stops training for {options.checkpoint:g} s, a failure is noticed after "
        f"{options.detection:g} s (or {options.fast_detection:g}), and {options.restart:g} s later training goes "
        "on. Checkpoints come at the best interval (Young, Daly). `dsv3_jax/codesign/failures.py` has the model.",
        tuple(_items(options)), (("failures", lambda: draw(options)),))


def _items(options: Options) -> Iterator[Item]:
    count = count_parameters(MODELS["deepseek_v3"])
    floor = checkpoint_floor(STATE_BYTES * (count.main + count.mtp), SIZES[0])
    yield Item(f"{SIZES[0]:,} GPUs: a checkpoint through the storage NICs, at least, s", None, floor,
               f"{STATE_BYTES} bytes a parameter, one NIC of 50 GB/s a node")
    now = machines(options)["as it is"]
    for devices in (SIZES[0], 16_384, SIZES[-1]):
        yield Item(f"{devices:,} GPUs: hours between failures", None, now.between(devices) / 3600)
        yield Item(f"{devices:,} GPUs: best interval of checkpoints, minutes", None, best_interval(devices, now) / 60,
                   f"Young's {youngs_interval(devices, now) / 60:.1f}")
        for name, machine in machines(options).items():
            yield Item(f"{devices:,} GPUs, {name}: share of time that is progress", None,
                       best_goodput(devices, machine))


def draw(options: Options) -> Any:
    """Against the size of the system."""
    pyplot = import_pyplot()
    figure, axis = pyplot.subplots(figsize=(6.5, 4.5), layout="constrained")
    sizes = [size * 2 ** (part / 4) for size in SIZES[:-1] for part in range(4)] + [SIZES[-1]]
    for name, machine in machines(options).items():
        axis.plot(sizes, [best_goodput(round(size), machine) for size in sizes], label=name)
    axis.set(xscale="log", xlabel="GPUs", ylabel="share of time that is progress",
             title="Checkpoints at the best interval", xticks=SIZES, xticklabels=[f"{size // 1024}k" for size in SIZES])
    axis.minorticks_off()
    axis.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    run(section, __doc__, Options)
