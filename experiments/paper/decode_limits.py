"""How fast one sequence can be decoded when experts are spread over many devices (paper 1, sections 2.3.2 and 2.3.3).

  python experiments/paper/decode_limits.py
  python experiments/paper/decode_limits.py --hardware gb200 --link nvlink5 --expert-devices 72 --context 32768
  python experiments/paper/decode_limits.py --preset kimi_k2 --hardware mine.toml --batch 64

The paper's limit counts the network alone; beside it stand the floors of memory and compute, for any model, context,
batch and hardware (--hardware takes a name or a TOML file, see dsv3_jax/codesign/hardware_file.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dsv3_jax.codesign.decode_limits import Step, Workload, decode_step, speed_limit
from dsv3_jax.codesign.hardware import HARDWARE, Hardware
from dsv3_jax.codesign.hardware_file import find_hardware
from dsv3_jax.codesign.links import LINKS, Link, link
from dsv3_jax.config import named
from dsv3_jax.presets import MODELS
from experiments.command_line import import_pyplot
from experiments.paper.report import Item, Output, Section, run

PAPER_HIDDEN = 7000
"""The paper's 7K."""
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """What is decoded on what, for the lines and the figure beyond the paper's own."""

    preset: str = "deepseek_v3"
    hardware: str = "h800"
    """A name, or a TOML file of your own."""
    link: str | None = None
    """Over which experts are reached: a name such as roce_400g; default the hardware's slow network."""
    context: int = 4096
    """Tokens in the cache of a sequence."""
    batch: int = 32
    """Tokens of one device in one micro-batch."""
    expert_devices: int | None = None
    """Devices that the experts are spread over; default one expert a device."""
    acceptance: float = 0.85
    """Of a draft of multi-token prediction."""


def section(options: Options = Options()) -> Section:
    """The numbers of both sections, and what stands beside them."""
    model, hardware = named(MODELS, options.preset, "--preset"), find_hardware(options.hardware)
    over = hardware.scale_out if options.link is None else link(options.link)
    work = Workload(model, options.batch, options.context, expert_devices=options.expert_devices,
                    acceptance=options.acceptance)
    text = ("A device sends each of its 32 tokens of a micro-batch to 8 routed experts and a shared one, in float8, "
            "and gets results back in bf16; two micro-batches take turns, and computing is hidden. So a layer takes "
            "twice (1 + 2) bytes x 32 x 9 x 7K / bandwidth, and a token 61 layers. Latency is left out.\n\n"
            "Below it the least time of computing is added, from bytes of weights and cache over HBM bandwidth and "
            f"FLOPs over peak (weights in float8, cache in bf16): {options.preset} on {hardware.name} over "
            f"{over.name}, context {options.context:,}, {options.batch} tokens. The larger of network and compute "
            "counts in every layer.")
    items = (*_paper_items(), *_own_items(work, hardware, over, options))
    return Section("Speed limits of decoding (paper 1, sections 2.3.2 and 2.3.3)", text, items,
                   (("decode_limits", lambda: draw(work, hardware, over)),))


def _paper_items() -> list[Item]:
    """Section 2.3.2 with its rounding and without, and the multiple of section 2.3.3."""
    v3 = MODELS["deepseek_v3"]
    items = []
    for name, network, printed in (("InfiniBand CX7", LINKS["ib_cx7"], (120.96, 241.92, 14.76, 67)),
                                   ("GB200 NVL72", LINKS["nvlink5"], (6.72, None, 0.82, 1200))):
        rounded, exact = (speed_limit(Workload(v3, hidden=hidden), network) for hidden in (PAPER_HIDDEN, None))
        what = f"section 2.3.2, {name}"
        exactly = "{:.6g} with the hidden size of 7168"
        items += [
            Item(f"{what}, dispatch and combine of one micro-batch, us", printed[0], rounded.exchange * 1e6,
                 exactly.format(exact.exchange * 1e6)),
            Item(f"{what}, layer, us", printed[1], rounded.layer * 1e6, exactly.format(exact.layer * 1e6)),
            Item(f"{what}, time per output token, ms", printed[2], rounded.token * 1e3,
                 f"printed rounded; {exactly.format(exact.token * 1e3)}"),
            Item(f"{what}, tokens/s", printed[3], rounded.tokens_per_second,
                 ("printed cut off" if printed[3] == 67 else "printed as about 1200")
                 + f"; {exactly.format(exact.tokens_per_second)}")]
    plain = speed_limit(Workload(v3, hidden=PAPER_HIDDEN), LINKS["ib_cx7"]).tokens_per_second
    drafted = (speed_limit(Workload(v3, hidden=PAPER_HIDDEN, drafts=1, acceptance=rate), LINKS["ib_cx7"])
               for rate in (0.8, 0.9))
    for rate, limit in zip((80, 90), drafted, strict=True):
        items.append(Item(f"section 2.3.3, multi-token prediction, tokens/s of a sequence at {rate}% acceptance, times",
                          1.8, limit.tokens_per_second / plain,
                          f"(1 + {rate / 100:g}) x 61 / 62 layers: half as many sequences, so a device's throughput is "
                          f"{limit.tokens_per_second / plain / 2:.3f} times"))
    return items


def _own_items(work: Workload, hardware: Hardware, over: Link, options: Options) -> list[Item]:
    """The same with computing, for what was asked for; the paper prints none of it."""
    least = decode_step(work, hardware, over)
    reached = decode_step(work, hardware, over, reached=True)
    what = f"{options.preset} on {hardware.name}"
    items = [Item(f"{what}, network alone, tokens/s", None, speed_limit(work, over).tokens_per_second,
                  "by the paper's formula with the exact hidden size"),
             Item(f"{what}, dispatch and combine, us", None, least.exchange * 1e6),
             Item(f"{what}, attention of a layer at the least, us", None, least.attention * 1e6,
                  "weights read, and the cache of every sequence"),
             Item(f"{what}, experts of a layer at the least, us", None, least.experts * 1e6),
             Item(f"{what}, with computing at the least, tokens/s", None, least.tokens_per_second,
                  f"a layer waits for the {least.bound}; {_of_device(least)}"),
             Item(f"{what}, the same at the network's reached bandwidth and latency, tokens/s", None,
                  reached.tokens_per_second, _how_reached(over))]
    if work.model.num_nextn_predict_layers:
        drafted = decode_step(dataclasses.replace(work, drafts=1), hardware, over)
        items.append(Item(f"{what}, with a draft accepted at {work.acceptance:.0%}, tokens/s", None,
                          drafted.tokens_per_second, _of_device(drafted)))
    if (options.hardware, options.link) == ("h800", None):
        rack = decode_step(dataclasses.replace(work, expert_devices=72), HARDWARE["gb200"], LINKS["nvlink5"])
        items.append(Item(f"{options.preset} on one GB200 NVL72 over NVLink, with computing at the least, tokens/s",
                          None, rack.tokens_per_second,
                          f"72 GPUs have 4 experts each, not one; a layer waits for the {rack.bound}, so the paper's "
                          f"1,200 is far above (its own caveat); {_of_device(rack)}"))
    return items


def _of_device(step: Step) -> str:
    return f"{step.device_tokens_per_second:,.0f} tokens/s of a device"


def _how_reached(over: Link) -> str:
    latency = "no latency published" if over.latency is None else f"{over.latency * 1e6:.2f} us there and as much back"
    return f"{over.effective / 1e9:g} of {over.bandwidth / 1e9:g} GB/s; {latency}"


def draw(work: Workload, hardware: Hardware, over: Link) -> Any:
    """Tokens a second of a sequence over the context, beside the paper's limits."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    cases = {f"{hardware.name}, {over.name}": (work, hardware, over),
             "gb200, NVLink 5, 72 devices": (dataclasses.replace(work, expert_devices=72), HARDWARE["gb200"],
                                             LINKS["nvlink5"])}
    for index, (name, (case, device, network)) in enumerate(cases.items()):
        rates = [decode_step(dataclasses.replace(case, context=context), device, network).tokens_per_second
                 for context in CONTEXTS]
        limit = speed_limit(case, network).tokens_per_second
        axes.plot(CONTEXTS, rates, "o-", color=f"C{index}", label=f"{name}: network, weights, cache")
        axes.axhline(limit, color=f"C{index}", linestyle="--", label=f"{name}: network alone ({limit:,.0f})")
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache of a sequence", ylabel="tokens/s of a sequence",
             title="What bounds decoding")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    run(section, __doc__, Options)
