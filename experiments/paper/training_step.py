"""A training step of DeepSeek-V3 on 2,048 H800, predicted from published rates of kernels (paper 1, table 4; paper 2,
table 1).

  python experiments/paper/training_step.py
  python experiments/paper/training_step.py --kernels latest --imbalance 1.2

The layout is the papers' own. For other layouts, models and pods: experiments/plan.py.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import tyro

from dsv3_jax.codesign.hardware import hardware
from dsv3_jax.codesign.planning.layers import Machine
from dsv3_jax.codesign.planning.layout import Layout
from dsv3_jax.codesign.planning.predict import Prediction, predict, what_if
from dsv3_jax.codesign.planning.rates import RATES, kernel_rates
from dsv3_jax.config import ConfigError
from dsv3_jax.presets import RUNS
from experiments.command_line import import_pyplot
from experiments.paper.report import Item, Output, Section, run

V3 = RUNS["deepseek_v3"]
LAYOUT = Layout(scale_out=8, scale_up=8, data=2, pipe=16, schedule="dualpipe", micro_batches=120)
"""Paper 2, section 3.2: 16 stages, experts over 64 GPUs of 8 nodes, ZeRO-1; one sequence of 4096 a GPU and
micro-batch."""
PRINTED = {"1F": 1.13, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "bubble": 2.06, "optimizer": 0.29}
"""Table 4, seconds, on the multi-plane network."""
TOKENS, HOURS = 14.8e12, 2_664e3
"""Of pre-training (paper 2, table 1)."""
FULLER = (1.0, 1.1, 1.2, 1.3, 1.5)
"""Rows of the fullest device over the mean."""


@dataclasses.dataclass(frozen=True)
class Options(Output):
    """Which rates, and how uneven a load."""

    kernels: Annotated[str, tyro.conf.arg(help=f"Rates of kernels: {', '.join(RATES)}.")] = "paper"
    imbalance: float = 1.0
    """Rows of the fullest device over the mean, for which all others wait."""


def predicted(kernels: str, imbalance: float = 1.0) -> Prediction:
    """The papers' layout on H800."""
    if not imbalance >= 1:
        raise ConfigError(f"imbalance ({imbalance}) must be at least 1: the fullest device has the mean")
    return predict(V3, LAYOUT, machine(kernels), imbalance=imbalance)


def machine(kernels: str) -> Machine:
    """An H800 in a node of eight."""
    return Machine(hardware("h800"), kernel_rates(kernels), 8)


def section(options: Options = Options()) -> Section:
    """Table 4, days and hours."""
    told = predicted(options.kernels, options.imbalance)
    return Section("A training step", _text(options, told), (*_table_4(told), *_cost(told), *_if_items(options, told)),
                   (("training_step", lambda: draw(options)),))


def _text(options: Options, told: Prediction) -> str:
    short = PRINTED["1B"] - told.components["1B"]
    return (
        "Calibrated on nothing of the papers' training: products run at the rates of DeepGEMM's first release, "
        "attention at those of FlashAttention on H100, passes over memory at what FlashMLA reaches of HBM, exchanges "
        "at the 40 of 50 GB/s that paper 1 gives for a NIC and 160 of 200 for NVLink; beside exchanges 20 of 132 SMs "
        "are gone. What each stage computes comes from the configuration, what waits from the schedule's table of work "
        f"(16 ranks, 120 micro-batches). Kernels here: {options.kernels}.\n\n"
        "Where table 4 and this differ, the paper is slower, and most in the backward of inputs "
        f"({short:+.2f} s of 1B) and in what follows from it: pairs wait for it too, and so does the bubble, which is "
        "the mean over ranks. Not counted are uneven load of experts within a micro-batch, launches, clocks that sink "
        "under load, and kernels not as good as the best public ones alone on a quiet GPU; none of these is published, "
        "and fitting one of them to table 4 would make the rest no prediction. The last lines tell how much an uneven "
        "load would explain.")


def _table_4(told: Prediction) -> list[Item]:
    notes = {"1F": "chunks of forwards alone: computing, then exchanges", "1B": "gradients of inputs, alone",
             "1W": "gradients of weights, alone, with those of whole backwards",
             "1F1B": "pairs; computing that 112 of 132 SMs do, longer than exchanges",
             "bubble": "mean over ranks, with stages of unequal length",
             "optimizer": "of the fullest rank: gradients in float32 there, weights in bf16 back"}
    items = [Item(f"table 4, {name}, s", printed, told.components[name], notes[name])
             for name, printed in PRINTED.items()]
    chip = hardware("h800")
    utilisation = {causal: told.flops_utilisation(V3, chip, causal) for causal in (True, False)}
    return [*items, Item("table 4, time of a step, s", 19.926, told.seconds, "the paper's parts add up to 19.90"),
            Item("table 4, tokens a day, billions", 272.80, told.tokens_per_second(V3) * 86400 / 1e9),
            Item("table 4, TFLOP/s, causal", 385, utilisation[True] * chip.peak_flops["bf16"] / 1e12),
            Item("table 4, TFLOP/s, non-causal", 432, utilisation[False] * chip.peak_flops["bf16"] / 1e12),
            Item("table 4, MFU, causal, %", 38.94, 100 * utilisation[True]),
            Item("table 4, MFU, non-causal, %", 43.73, 100 * utilisation[False])]


def _cost(told: Prediction) -> list[Item]:
    seconds = TOKENS / told.tokens_per_second(V3)
    hours = seconds / 3600 * LAYOUT.devices
    return [Item("paper 2, table 1, pre-training, thousand GPU hours", HOURS / 1e3, hours / 1e3,
                 "14.8T tokens at the final batch; table 4's own rate gives 2,667"),
            Item("paper 2, table 1, pre-training, M$ at 2 $ an hour", 5.328, 2 * hours / 1e6),
            Item("pre-training, days on 2,048 GPUs", None, seconds / 86400, "table 4's own rate gives 54.25")]


def _if_items(options: Options, told: Prediction) -> list[Item]:
    items = [Item(f"step with {change} of hardware, s", None, seconds)
             for change, seconds in what_if(V3, LAYOUT, machine(options.kernels), imbalance=options.imbalance).items()]
    other = next(name for name in RATES if name != options.kernels)
    items.append(Item(f"step with kernels: {other}, s", None, predicted(other, options.imbalance).seconds,
                      "DeepGEMM since May 2025, FlashAttention-3 in the backward too" if other == "latest" else ""))
    return [*items, *(Item(f"step if the fullest device has {fuller} times the mean of rows, s", None,
                           predicted(options.kernels, fuller).seconds) for fuller in FULLER[1:])]


def draw(options: Options) -> Any:
    """Parts of the step beside the paper's, and the step over the unevenness of load."""
    pyplot = import_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained", width_ratios=(3, 2))
    columns = {"table 4": PRINTED, **{f"predicted,\nkernels: {name}": predicted(name, options.imbalance).components
                                      for name in RATES}}
    bottom = [0.0] * len(columns)
    for name in PRINTED:
        sizes = [parts[name] for parts in columns.values()]
        bars = left.bar(list(columns), sizes, bottom=bottom, label=name)
        left.bar_label(bars, [f"{size:.2f}" if size > 0.4 else "" for size in sizes], label_type="center", fontsize=8)
        bottom = [low + size for low, size in zip(bottom, sizes, strict=True)]
    left.set(ylabel="s", title="A step of DeepSeek-V3 on 2,048 H800")
    left.legend(fontsize=8, loc="upper right", reverse=True)
    left.set_xlim(-0.5, len(columns))
    for name in RATES:
        right.plot(FULLER, [predicted(name, fuller).seconds for fuller in FULLER], "o-", label=f"kernels: {name}")
    right.axhline(19.926, color="k", linestyle="--", label="table 4")
    right.set(xlabel="rows of the fullest device over the mean", ylabel="s", title="If load is uneven")
    right.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    run(section, __doc__, Options)
