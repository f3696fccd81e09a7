"""Pipeline schedules: how long ranks wait and what they keep, beside the papers' formulas; as text and as pictures.

  python experiments/pipeline_schedules.py
  python experiments/pipeline_schedules.py --ranks 4 --micro-batches 8 --schedule 1f1b dualpipe --text
  python experiments/pipeline_schedules.py --out experiments/results/pipeline_schedules

Without sizes, those of paper 2's figure 5, 8 ranks and 20 micro-batches, and of DeepSeek-V3's training, 16 ranks and
120 micro-batches. Durations are those of a rank's share of the layers (a PP-th of the model) for one micro-batch, in
any unit; all four, or those that paper 1's table 4 tells. Schedules with two stages a rank have stages half as long.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import mean
from typing import Any

import tyro

from dsv3_jax.config import ConfigError
from dsv3_jax.pipeline.account import UNIT, Durations, bubbles, parameter_copies, slot_counts
from dsv3_jax.pipeline.formulas import FORMULAS
from dsv3_jax.pipeline.schedule import Schedule, peak_activations, run
from dsv3_jax.pipeline.schedules import SCHEDULES, fitting_sizes, make
from dsv3_jax.pipeline.text import LEGEND, as_text
from experiments.command_line import finish, provenance, standard_output_for_json, write_report
from experiments.pipeline_picture import Panel, draw, save

FIGURE_5, TRAINING = (8, 20), (16, 120)
"""(ranks, micro-batches). Paper 2, figure 5; and section 3.2: 16-way pipeline, 2,048 GPUs, so that 15,360 sequences
are 120 for each of the 128 GPUs of a stage, taken one at a time (the size of a micro-batch isn't printed)."""
TABLE_4 = {"1F": 1.13, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "bubble": 2.06, "opt": 0.29, "step": 19.926}
"""Seconds (paper 1, table 4, multi-plane network)."""
DURATIONS = [field.name for field in dataclasses.fields(Durations)]
TITLES = {"gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved 1F1B", "zb1p": "ZB1P", "dualpipe": "DualPipe",
          "dualpipev": "DualPipeV"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to lay out."""

    ranks: int | None = None
    """Devices in the pipeline."""
    micro_batches: int | None = None
    """In a step."""
    schedule: tuple[str, ...] = ("all",)
    """gpipe, 1f1b, interleaved, zb1p, dualpipe, dualpipev, or all."""
    chunks: int = 2
    """Of layers on a rank, for interleaved."""
    forward: float | None = None
    """F."""
    input_backward: float | None = None
    """I: the part of a backward that the stage before waits for."""
    weight_backward: float | None = None
    """W: the other part. B = I + W."""
    pair: float | None = None
    """F&B: a forward and a backward that cover each other's communication."""
    text: bool = False
    """Print the schedules too: a row for each rank."""
    out: Path | None = None
    """Write OUT.json, OUT.md, OUT.png (all on one time axis) and OUT_SCHEDULE.png."""
    json: bool = False
    """Print one JSON object."""


def table_4_durations(rank: int | None = None) -> Durations:
    """Seconds of a rank's share of the layers for one micro-batch, from table 4's totals.

    On a rank, DualPipe does n forwards and n backwards, p of each in pairs. "1F1B" is taken as the p pairs; "1F" as the
    n - p forwards alone; "1B" and "1W" as the two parts of the n - p backwards outside pairs, put off or not. How many
    pairs there are depends on the rank, and the table doesn't say whose times it has.

    Args:
      rank: whose times they are; without it, the mean of ranks.
    """
    ranks, micro_batches = TRAINING
    pairs = [count["FB"] for count in slot_counts(make("dualpipe", ranks, micro_batches))]
    paired = mean(pairs) if rank is None else pairs[rank]
    alone = micro_batches - paired
    return Durations(TABLE_4["1F"] / alone, TABLE_4["1B"] / alone, TABLE_4["1W"] / alone, TABLE_4["1F1B"] / paired)


def durations_of(arguments: Arguments) -> Durations:
    """Those that were given, or table 4's.

    Raises:
      ConfigError: some are given and others not, or they can't be.
    """
    given = {name: getattr(arguments, name) for name in DURATIONS}
    missing = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return table_4_durations()
    if missing:
        raise ConfigError(f"durations are given without {', '.join(missing)}: give all four, or none for those of "
                          "paper 1's table 4")
    return Durations(**given).checked()


def names_of(arguments: Arguments) -> list[str]:
    """Schedules asked for."""
    return list(SCHEDULES) if "all" in arguments.schedule else list(dict.fromkeys(arguments.schedule))


def sizes_of(arguments: Arguments) -> list[tuple[int, int]]:
    """(ranks, micro-batches) asked for."""
    if arguments.ranks is None and arguments.micro_batches is None:
        return [FIGURE_5, TRAINING]
    ranks = FIGURE_5[0] if arguments.ranks is None else arguments.ranks
    return [(ranks, max(20, 2 * ranks) if arguments.micro_batches is None else arguments.micro_batches)]


def made(name: str, ranks: int, micro_batches: int, arguments: Arguments) -> Schedule:
    """The schedule. Among several, one that can't have these sizes gets the next larger that it can have, so that they
    may be compared; alone it is refused.

    Raises:
      ConfigError: as `make`.
    """
    if len(names_of(arguments)) > 1:
        ranks, micro_batches = fitting_sizes(name, ranks, micro_batches)
    return make(name, ranks, micro_batches, chunks=arguments.chunks if name == "interleaved" else None)


def row_of(schedule: Schedule, share: Durations) -> dict[str, Any]:
    """What a table of schedules tells of one. Times in the durations' unit; activations in stage inputs, and in inputs
    of a rank's share of layers."""
    durations, formula = share.times(schedule.share), FORMULAS[schedule.name]
    waits, published = bubbles(schedule, durations), formula.bubble(schedule, durations)
    peak = max(peak_activations(schedule))
    step = run(schedule, durations).seconds
    return {"schedule": schedule.name, "ranks": schedule.ranks, "micro_batches": schedule.micro_batches,
            "stages": schedule.stages, "step": step, "bubble_per_rank": waits, "bubble_least": min(waits),
            "bubble_most": max(waits), "bubble_share": mean(waits) / step, "formula": formula.text,
            "formula_source": formula.source, "formula_bubble": published,
            "table_over_formula": max(waits) / published if published else None,
            "peak_activations": peak, "formula_activations": formula.activations(schedule),
            "activations_per_rank": peak_activations(schedule), "activations_in_shares": peak * schedule.share,
            "parameters": max(parameter_copies(schedule)), "formula_parameters": formula.parameters,
            "slots_per_rank": slot_counts(schedule)}


def table_4_rows() -> list[dict[str, Any]]:
    """DualPipe at the sizes of DeepSeek-V3's training under durations read off table 4, for each reading of whose times
    they are: durations in ms, bubbles and step in seconds, and table 4's own."""
    schedule = make("dualpipe", *TRAINING)
    rows = []
    for reading, rank in {"mean of ranks": None, "first rank": 0, "middle rank": schedule.ranks // 2}.items():
        durations = table_4_durations(rank)
        row = row_of(schedule, durations)
        rows.append({"reading": reading,
                     **{name: 1e3 * seconds for name, seconds in dataclasses.asdict(durations).items()},
                     "covered": 1 - durations.pair / (durations.forward + durations.backward),
                     "bubble_least": row["bubble_least"], "bubble_most": row["bubble_most"],
                     "formula_bubble": row["formula_bubble"], "step": row["step"] + TABLE_4["opt"],
                     "paper_bubble": TABLE_4["bubble"], "paper_step": TABLE_4["step"]})
    return rows


def as_markdown(result: dict[str, Any]) -> str:
    """Tables a person reads."""
    about, given = result["about"], result["durations"]
    lines = ["# Pipeline schedules", "", f"`{about['command']}`", "",
             f"{about['date']}. Counted and timed from the schedules' tables; nothing ran on devices.", "",
             "F {forward:.4g}, I {input_backward:.4g}, W {weight_backward:.4g}, F&B {pair:.4g} for a rank's share of "
             "the layers and one micro-batch".format(**given) + (", seconds, from paper 1's table 4 (below)."
                                                             if result["table_4"] else "."), "",
             "| schedule | ranks | micro-batches | step | bubble of a rank | share | formula | by formula | "
             "kept at most | formula | in shares of a rank | parameters |",
             "|---|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|"]
    for row in result["rows"]:
        span = f"{row['bubble_most']:.3f}" if row["bubble_most"] - row["bubble_least"] < 1e-9 * row["step"] else \
            f"{row['bubble_least']:.3f} to {row['bubble_most']:.3f}"
        lines.append(f"| {TITLES[row['schedule']]} | {row['ranks']} | {row['micro_batches']} | {row['step']:.3f} | "
                     f"{span} | {row['bubble_share']:.1%} | {row['formula']} | {row['formula_bubble']:.3f} | "
                     f"{row['peak_activations']} | {row['formula_activations']} | {row['activations_in_shares']:g} | "
                     f"{row['parameters']:g}x |")
    lines += ["", "Formulas have durations of a stage, PP stages: " + "; ".join(sorted(
        {f"{TITLES[row['schedule']]}, {row['formula_source']}" for row in result["rows"]})) + ". Kept at most: stage "
        "inputs on the rank that keeps most. A stage of DualPipeV and of interleaved 1F1B is a part of a rank's share. "
        "Where micro-batches differ from those asked for, the schedule takes no others.", ""]
    lines += AGREEMENT.splitlines()
    return "\n".join(lines + (_table_4_lines(result["table_4"]) if result["table_4"] else [])) + "\n"


AGREEMENT = """\
## When table and formula agree

- GPipe, 1F1B, interleaved: always, on every rank.
- ZB1P: on every rank if W is no longer than F and I. It waits (PP-1)(F + I - min(W, F, I)).
- DualPipe, DualPipeV, with W no longer than I: exactly if F = I, on the ranks in the middle (in DualPipeV at the turn)
  and those beside them. With K = PP/2-1, the table waits there K (F&B + F - W - min(W, I)) + max(0, K (I - F) - F),
  while the formula, K (F&B + I - 2W), has I where the table has F. A rank waits for forwards at the start: F longer
  than I makes the table wait K (F - I) longer; I longer, min(F, K (I - F)) less, the chain through backwards at the end
  being one forward shorter. Each rank nearer to its end has a pair fewer and waits F + B - F&B less.

Tests hold all of this, with durations drawn at random."""


def _table_4_lines(rows: list[dict[str, Any]]) -> list[str]:
    """DualPipe beside paper 1's table 4."""
    lines = ["", "## Beside paper 1's table 4", "",
             f"DualPipe, {TRAINING[0]} ranks, {TRAINING[1]} micro-batches (one sequence for each of 128 GPUs: 15,360). "
             "Of n forwards and n backwards that a rank does, p of each are pairs. Read: 1F1B 13.95 s = p pairs; 1F "
             "1.13 s = n - p forwards; 1B 1.99 s and 1W 0.48 s = the parts for inputs and for weights of n - p "
             "backwards. p is 97 on the first rank and 103 in the middle; whose times the table has is not told. "
             "Covered: what a pair saves of F + B. Step: with 0.29 s of the optimizer. Times of slots in ms, others in "
             "s.", "",
             "| read as times of | F | I | W | F&B | covered | bubble | by formula | paper | step | paper |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {row['reading']} | {row['forward']:.1f} | {row['input_backward']:.1f} | "
              f"{row['weight_backward']:.1f} | {row['pair']:.1f} | {row['covered']:.0%} | "
              f"{row['bubble_least']:.2f} to {row['bubble_most']:.2f} | {row['formula_bubble']:.2f} | "
              f"{row['paper_bubble']:.2f} | {row['step']:.2f} | {row['paper_step']:.2f} |" for row in rows]
    return [*lines, "", "The bubble measured is longer than schedule or formula has it, under any reading. Both take "
            "all stages to be alike and transfers between them to take no time; the table doesn't tell which of these, "
            "or what else, makes up the rest."]


def pictures(schedules: list[Schedule], share: Durations, unit: str) -> dict[str, Any]:
    """Figures by the ending of their files' names: all on one time axis under the durations, and each by itself with F,
    I and W one unit long and B and a pair two, as schedules are usually drawn."""
    panels = []
    for schedule in schedules:
        row = row_of(schedule, share)
        remark = (f"waits {row['bubble_share']:.0%} of the step   ·   keeps {row['activations_in_shares']:g} "
                  f"micro-batches   ·   parameters {row['parameters']:g}x")
        if schedule.micro_batches != schedules[0].micro_batches:
            remark = f"{schedule.micro_batches} micro-batches   ·   {remark}"
        panels.append(Panel(TITLES[schedule.name], remark, schedule, share.times(schedule.share)))
    figures = {"": draw(panels, unit, row_inches=0.2, numbers=False)}
    for panel in panels:
        alone = panel._replace(durations=UNIT, remark=f"{panel.schedule.ranks} ranks, {panel.schedule.micro_batches} "
                               "micro-batches")
        figures[f"_{panel.schedule.name}"] = draw([alone], "forwards of a stage")
    return figures


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with standard_output_for_json(arguments.json) as write_json:
        share, sizes = durations_of(arguments), sizes_of(arguments)
        by_size = [[made(name, *size, arguments) for name in names_of(arguments)] for size in sizes]
        read = arguments.forward is None
        result = {"about": provenance(), "durations": dataclasses.asdict(share),
                  "rows": [row_of(schedule, share) for schedules in by_size for schedule in schedules],
                  "table_4": table_4_rows() if read and "dualpipe" in names_of(arguments) else []}
        if arguments.text:
            print(LEGEND, *(f"{TITLES[schedule.name]}\n{as_text(schedule)}" for schedule in by_size[0]), sep="\n\n")
        write_report(arguments.out, result, as_markdown(result))
        if arguments.out is not None:
            for ending, figure in pictures(by_size[0], share, "seconds" if read else "time").items():
                save(figure, arguments.out.with_name(f"{arguments.out.name}{ending}.png"))
        print(as_markdown(result), end="")
        write_json(result)


if __name__ == "__main__":
    finish(main)
