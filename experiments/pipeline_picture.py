"""Pipeline schedules as pictures, in the manner of paper 2's figure 5: a row for each rank, time to the right."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.pipeline.account import Durations
from dsv3_jax.pipeline.schedule import Kind, Schedule, Timed, Work, run
from experiments.command_line import import_pyplot

COLOURS = {"F": ("#f7b538", "#fbd990"), "B": ("#2f9e63", "#97d3b0"), "I": ("#23a6b8", "#8fd6df"),
           "W": ("#3b62b5", "#a3b8e4")}
"""Of a kind at the stage that is the rank's own number, and at another."""
WAITS = "#e6e6e9"
MEANING: dict[Kind, str] = {"F": "forward", "B": "backward", "I": "backward for inputs", "W": "backward for weights"}
WIDTH = 15.0
"""Inches."""
DIGIT = 0.6
"""Of a digit's height: its width."""


class Panel(NamedTuple):
    """A schedule to draw."""

    title: str
    remark: str
    schedule: Schedule
    durations: Durations
    """Of one of its stages."""


class Scale(NamedTuple):
    """Of a figure."""

    time: float
    """Inches of a unit of time."""
    row: float
    """Inches of a rank."""
    numbers: bool


def draw(panels: Sequence[Panel], unit: str, row_inches: float = 0.36, numbers: bool = True) -> Any:
    """A matplotlib figure: one panel under the other on one time axis. Where two pieces of work run at once, the
    forward is the upper half of a box with an edge, the backward the lower. With `numbers`, micro-batches are numbered
    where a number fits."""
    pyplot = import_pyplot()
    rows = [panel.schedule.ranks for panel in panels]
    figure, axes = pyplot.subplots(len(panels), 1, sharex=True, squeeze=False, layout="constrained",
                                   figsize=(WIDTH, sum(rows) * row_inches + 0.42 * len(panels) + 0.9),
                                   gridspec_kw={"height_ratios": rows})
    ends = [run(panel.schedule, panel.durations).seconds for panel in panels]
    scale = Scale(0.93 * WIDTH / max(ends), row_inches, numbers)
    for axis, panel, end in zip(axes[:, 0], panels, ends, strict=True):
        _draw_panel(axis, panel, end, scale)
        axis.set_xlim(0, max(ends))
    axes[-1, 0].spines["bottom"].set_visible(True)
    axes[-1, 0].tick_params(bottom=True, labelbottom=True, labelsize=9)
    axes[-1, 0].set_xlabel(unit)
    figure.legend(handles=_legend(panels), loc="outside lower center", ncols=7, frameon=False, fontsize=10)
    return figure


def save(figure: Any, path: Path) -> None:
    """Writes a PNG of 128 colours, a third as large as one of all colours, and frees the figure."""
    from PIL import Image
    memory = io.BytesIO()
    figure.savefig(memory, dpi=110)
    Image.open(memory).convert("RGB").quantize(128).save(path, optimize=True)
    import_pyplot().close(figure)


def _draw_panel(axis: Any, panel: Panel, end: float, scale: Scale) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    ranks = panel.schedule.ranks
    boxes = [Rectangle((0, rank + 0.04), end, 0.92, facecolor=WAITS, linewidth=0) for rank in range(ranks)]
    for rank, row in enumerate(run(panel.schedule, panel.durations).ranks):
        for timed in row:
            boxes += _boxes(axis, rank, timed, scale)
    axis.add_collection(PatchCollection(boxes, match_original=True))
    axis.set_ylim(ranks, 0)
    axis.set_yticks([rank + 0.5 for rank in range(ranks)], [f"rank {rank}" for rank in range(ranks)], fontsize=8)
    axis.tick_params(left=False, bottom=False, labelbottom=False)
    axis.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axis.set_title(panel.title, loc="left", fontsize=13, fontweight="bold", pad=4)
    axis.set_title(panel.remark, loc="right", fontsize=11, color="#444444", pad=4)


def _boxes(axis: Any, rank: int, timed: Timed, scale: Scale) -> list[Any]:
    """Of one slot; writes its numbers too."""
    from matplotlib.patches import Rectangle
    long, height = timed.end - timed.start, 0.92 / len(timed.slot)
    boxes = []
    for place, work in enumerate(timed.slot):
        low = rank + 0.04 + place * height
        boxes.append(Rectangle((timed.start, low), long, height, facecolor=_colour(work, rank), edgecolor="white",
                               linewidth=0.5))
        size = min(9.0, 72 * scale.row * height * 0.82)
        number = str(work.micro_batch)
        if scale.numbers and len(number) * DIGIT * size <= 72 * scale.time * long:
            axis.text(timed.start + long / 2, low + height / 2, number, fontsize=size, ha="center",
                      va="center_baseline", color="white" if work.kind in "BIW" and work.stage == rank else "#222222")
    if len(timed.slot) > 1:
        boxes.append(Rectangle((timed.start, rank + 0.04), long, 0.92, fill=False, edgecolor="#222222", linewidth=0.7))
    return boxes


def _colour(work: Work, rank: int) -> str:
    return COLOURS[work.kind][int(work.stage != rank)]


def _legend(panels: Sequence[Panel]) -> list[Any]:
    """Of what there is to see."""
    from matplotlib.patches import Patch
    slots = [(rank, slot) for panel in panels for rank, row in enumerate(panel.schedule.slots) for slot in row]
    kinds = {work.kind for _, slot in slots for work in slot}
    handles = [Patch(facecolor=COLOURS[kind][0], label=text) for kind, text in MEANING.items() if kind in kinds]
    if any(len(slot) > 1 for _, slot in slots):
        handles.append(Patch(facecolor="white", edgecolor="#222222", label="two that cover each other"))
    if any(work.stage != rank for rank, slot in slots for work in slot):
        handles.append(Patch(facecolor=COLOURS["F"][1], label="pale: the rank's other stage"))
    return [*handles, Patch(facecolor=WAITS, label="waits")]
