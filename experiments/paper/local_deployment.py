"""How fast a PC or a small server decodes DeepSeek-V2, V3 and a dense model (paper 1, section 2.2.2).

  python experiments/paper/local_deployment.py
  python experiments/paper/local_deployment.py --preset kimi_k2 --machine mine.toml --bits q8_0 --context 32768

Upper bounds from what a token reads and how fast the memories are; --machine takes a name or a TOML file (see
dsv3_jax/codesign/local_machines.py), and adds a line for one's own case.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import tyro

from dsv3_jax.codesign.dense_models import DENSE_MODELS, DenseModel
from dsv3_jax.codesign.local_deployment import BITS, Speed, tokens_per_second
from dsv3_jax.codesign.local_machines import LOCAL_MACHINES, LocalMachine, find_machine
from dsv3_jax.config import ModelConfig, named
from dsv3_jax.presets import MODELS
from experiments.command_line import import_pyplot
from experiments.paper.report import Item, Output, Section, run

CONTEXT = 1024
"""Tokens in the cache, of the paper's cases; of V3 they are 0.07 of 22 GB."""
DENSE = DENSE_MODELS["llama3.1_70b"]


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """One's own case, a line more than the paper's; none without --machine."""

    preset: Annotated[str, tyro.conf.arg(
        help=f"Model: {', '.join(MODELS)}, or dense: {', '.join(DENSE_MODELS)}.")] = "deepseek_v3"
    machine: Annotated[str | None, tyro.conf.arg(help=f"A TOML file, or one of {', '.join(LOCAL_MACHINES)}.")] = None
    bits: Annotated[str, tyro.conf.arg(help=f"Format of weights: {', '.join(BITS)}.")] = "q4_k_m"
    context: int = CONTEXT
    """Tokens in the cache."""


def section(options: Options = Options()) -> Section:
    """The paper's three claims, and one's own case."""
    text = ("One sequence is decoded as fast as the memories deliver the weights that a token activates, without the "
            "embedding table, and its cache, in bf16, of 1,024 tokens. All is an upper bound: computing and launches "
            "are free, bandwidths nominal unless said otherwise. On PCs weights have 4.5 bits (Q4_0), the most at "
            "which the 235.7B of DeepSeek-V2 fit 128 GiB; on the server 4.82 (Q4_K_M), as KTransformers ran it, with "
            "the routed experts in the processors' memory and all else in the GPU's, which take turns.")
    items = [*_pc_items(), *_server_items()]
    if options.machine is not None:
        items.append(_own_item(options))
    return Section("Local deployment (paper 1, section 2.2.2)", text, tuple(items),
                   (("local_deployment", lambda: draw(tuple(items))),))


def _pc_items() -> list[Item]:
    """DeepSeek-V2 and a dense model of 70B on PCs with an AI system on chip."""
    items = []
    for key, printed in (("ryzen_ai_max", 20), ("dgx_spark", 20), ("m4_max", 40)):
        machine = LOCAL_MACHINES[key]
        speed = tokens_per_second(MODELS["deepseek_v2"], machine, BITS["q4_0"], CONTEXT)
        items.append(Item(f"section 2.2.2, DeepSeek-V2 on {machine.name}, tokens/s", printed, speed.nominal,
                          f"paper: nearly 20, or twice that, naming no chip; a bound; {_why(speed, machine)}"))
    for key in ("ryzen_ai_max", "dgx_spark", "m4_max"):
        machine = LOCAL_MACHINES[key]
        speed = tokens_per_second(DENSE, machine, BITS["q4_0"], CONTEXT)
        claim = ("paper: single digits" if speed.nominal < 10 else
                 "paper: single digits, of a PC; on the fastest it takes 8 bits a weight to be so, "
                 f"{tokens_per_second(DENSE, machine, BITS['q8_0'], CONTEXT).nominal:.1f}")
        items.append(Item(f"section 2.2.2, dense 70B on {machine.name}, tokens/s", None, speed.nominal,
                          f"{claim}; {_why(speed, machine)}"))
    return items


def _server_items() -> list[Item]:
    """DeepSeek-V3 on the server of about 10,000 dollars, with one socket and two."""
    measured = {"ktransformers_one_socket": "8.7", "ktransformers_server": "13.4 (0.2.1)"}
    items = []
    for key, found in measured.items():
        machine = LOCAL_MACHINES[key]
        speed = tokens_per_second(MODELS["deepseek_v3"], machine, BITS["q4_k_m"], CONTEXT)
        items.append(Item(
            f"section 2.2.2, DeepSeek-V3 on {machine.name}, tokens/s", 20, speed.nominal,
            f"paper: nearly 20, sockets not told; a bound, of which KTransformers' guide reports {found} reached; "
            + _why(speed, machine)))
    machine = LOCAL_MACHINES["ktransformers_server"]
    dense = tokens_per_second(DENSE, machine, BITS["q4_k_m"], CONTEXT)
    return [*items, Item(f"dense 70B on {machine.name}, tokens/s", None, dense.nominal,
                         f"a tenth of V3's weights in all; {_why(dense, machine)}")]


def _own_item(options: Options) -> Item:
    model: ModelConfig | DenseModel = named(MODELS | DENSE_MODELS, options.preset, "--preset")
    machine = find_machine(str(options.machine))
    speed = tokens_per_second(model, machine, named(BITS, options.bits, "--bits"), options.context)
    return Item(f"{options.preset} on {machine.name}, {options.bits}, context {options.context:,}, tokens/s", None,
                speed.nominal, _why(speed, machine))


def _why(speed: Speed, machine: LocalMachine) -> str:
    """What a token reads from where."""
    parts = [f"{speed.memory_bytes / 1e9:.1f} GB of a token over {machine.memory.bandwidth / 1e9:.0f} GB/s"]
    if machine.gpu:
        parts.append(f"{speed.gpu_bytes / 1e9:.1f} over {machine.gpu.bandwidth / 1e9:.0f}")
    reached = f"; {speed.effective:.1f} at the {machine.memory.effective / 1e9:.0f} GB/s that are reached"
    return ", ".join(parts) + (reached if speed.effective != speed.nominal else "")


def draw(items: tuple[Item, ...]) -> Any:
    """A bar for each case, beside the paper's figures."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(items) + 1), layout="constrained")
    rows = range(len(items), 0, -1)
    names = [item.item.removeprefix("section 2.2.2, ").removesuffix(", tokens/s") for item in items]
    axes.barh(rows, [item.ours for item in items], height=0.6, label="at most, by the bytes that a token reads")
    told = [(item.paper, row) for item, row in zip(items, rows, strict=True) if item.paper is not None]
    axes.plot(*zip(*told, strict=True), "k|", markersize=18, markeredgewidth=2, label="paper, rounded up")
    axes.set_yticks(rows, names)
    axes.set(xlabel="tokens/s", title="Decoding for one person")
    axes.legend(fontsize=8, loc="lower right")
    return figure


if __name__ == "__main__":
    run(section, __doc__, Options)
