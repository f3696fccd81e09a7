"""How far training in float8 departs from training in bf16: the same small model, text and seeds, loss by loss.

  python experiments/fp8_vs_bf16.py --out experiments/results/fp8_vs_bf16
  python experiments/fp8_vs_bf16.py --seeds 0 --precisions fp8 --steps 200

Trains a preset once for each precision and seed, in folders below --runs where finished runs are not trained again. The
relative loss error of a run is |loss - loss in bf16| / loss in bf16, both as moving averages with decay 0.9, as paper
2's figure 10 draws them; there it stays below 0.25% for 16B and 230B models. float32 tells how far rounding alone
drives two runs apart: a small model at a high learning rate is chaotic, so a difference must be read beside that of
runs that only round otherwise. What precision does to a loss without chaos tells the second table: weights trained in
bf16 read held-out text in every precision. The other precisions are what the paper warns of (`--precision` of
train.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from dsv3_jax.config import MeshConfig, Precision, RunConfig, named
from dsv3_jax.interop.convert import open_store
from dsv3_jax.interop.load import load
from dsv3_jax.mesh import make_mesh
from dsv3_jax.presets import RUNS
from dsv3_jax.training import runtime
from dsv3_jax.training.evaluate import Evaluator
from dsv3_jax.training.loop import train
from dsv3_jax.training.tokens import prepare
from experiments.command_line import finish, import_pyplot, provenance, say_line, standard_output_for_json, write_report

BASELINE: Precision = "bf16"
DECAY = 0.9
"""Of the moving averages of losses (paper 2, appendix B.1)."""
FROM = 0.1
"""Share of a run after which its error counts: before, losses fall too fast for an average to mean much."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to train, and how often."""

    preset: str = "quickstart"
    precisions: tuple[Precision, ...] = ("fp8", "float32", "fp8_tensor_scales", "fp8_gradient_blocks")
    """What to compare with bf16; fp8_no_promotion too, which takes ten times as long a step."""
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    """Default: the preset's."""
    runs: Path = Path("runs/fp8_vs_bf16")
    """Where run folders go."""
    out: Path | None = None
    """Write OUT.json, OUT.md and OUT.png."""
    json: bool = False
    """Print one JSON object."""


def configured(arguments: Arguments, precision: Precision, seed: int) -> RunConfig:
    """The preset in this precision; no samples of text, and one checkpoint, at the end."""
    config = named(RUNS, arguments.preset, "--preset")
    steps = arguments.steps or config.steps
    return dataclasses.replace(config, precision=precision, seed=seed, steps=steps,
                               checkpoint=dataclasses.replace(config.checkpoint, every=steps),
                               report=dataclasses.replace(config.report, sample_every=0))


def losses_of(arguments: Arguments, precision: Precision, seed: int) -> np.ndarray:
    """float64 [steps]: training losses of the run, which is trained, or trained further, if it has to be."""
    folder, config = arguments.runs / f"{precision}-seed{seed}", configured(arguments, precision, seed)
    metrics = folder / "metrics.jsonl"
    if not metrics.exists() or len(_losses(metrics)) < config.steps:
        say_line(f"training {folder}")
        train(config, folder, say_line)
    return _losses(metrics)[:config.steps]


def _losses(metrics: Path) -> np.ndarray:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    by_step = {record["step"]: record["loss"] for record in records if "loss" in record}
    return np.array([by_step[step] for step in sorted(by_step)])


def held_out(arguments: Arguments, seed: int) -> list[dict[str, Any]]:
    """What the weights that bf16 trained lose on held-out text, read in every precision."""
    config = configured(arguments, BASELINE, seed)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    params, router_bias = load(open_store(arguments.runs / f"{BASELINE}-seed{seed}"), mesh, say=say_line)
    split = prepare(config.data, config.model.vocab_size, config.seed, say_line).validation
    losses = {}
    for precision in (BASELINE, *arguments.precisions):
        read = Evaluator(dataclasses.replace(config, precision=precision), mesh, split)(params, router_bias)
        losses[precision] = read["validation_loss"]
        say_line(f"seed {seed}: weights of {BASELINE} read in {precision}: loss {losses[precision]:.5f}")
    return [{"precision": precision, "seed": seed, "loss": loss, "difference": loss / losses[BASELINE] - 1}
            for precision, loss in losses.items() if precision != BASELINE]


def moving_average(losses: np.ndarray) -> np.ndarray:
    """The same length; starts at the first loss."""
    out = np.empty_like(losses)
    for step, loss in enumerate(losses):
        out[step] = loss if step == 0 else DECAY * out[step - 1] + (1 - DECAY) * loss
    return out


def compare(losses: np.ndarray, baseline: np.ndarray) -> dict[str, float]:
    """Relative errors over the run after its first tenth, as fractions."""
    signed = (moving_average(losses) / moving_average(baseline) - 1)[int(FROM * len(losses)):]
    last = max(1, len(losses) // 20)
    return {"mean_error": float(np.mean(np.abs(signed))), "largest_error": float(np.max(np.abs(signed))),
            "mean_difference": float(np.mean(signed)),
            "difference_at_end": float(losses[-last:].mean() / baseline[-last:].mean() - 1)}


def as_markdown(result: dict[str, Any]) -> str:
    """A table a person reads."""
    about = result["about"]
    lines = [f"# float8 against bf16: {about['preset']}, {about['steps']} steps", "", f"`{about['command']}`", "",
             f"{about['device']}; jax {about['jax']}, Python {about['python']}, {about['date']}.", "",
             "Relative to the loss in bf16 of the same seed, moving averages with decay 0.9, after the first tenth of "
             "the run. Paper 2, appendix B.1: below 0.25%.", "",
             "| precision | seed | mean error | largest error | mean difference | difference over the last 5% |",
             "|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {row['precision']} | {row['seed']} | {row['mean_error']:.3%} | {row['largest_error']:.3%} | "
              f"{row['mean_difference']:+.3%} | {row['difference_at_end']:+.3%} |" for row in result["rows"]]
    lines += ["", "The same weights, trained in bf16, on held-out text:", "",
              "| read in | seed | loss | relative to bf16 |", "|---|---:|---:|---:|"]
    lines += [f"| {row['precision']} | {row['seed']} | {row['loss']:.5f} | {row['difference']:+.4%} |"
              for row in result["same_weights"]]
    return "\n".join(lines) + "\n"


def draw(curves: dict[tuple[Precision, int], np.ndarray], precisions: Iterable[Precision]) -> Any:
    """The figure: signed relative difference to bf16 over the run, a colour for each precision."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(10, 5.5), layout="constrained")
    colours = {precision: f"C{index}" for index, precision in enumerate(precisions)}
    for (precision, seed), losses in curves.items():
        if precision != BASELINE:
            signed = moving_average(losses) / moving_average(curves[BASELINE, seed]) - 1
            axes.plot(100 * signed, color=colours[precision], linewidth=0.8, alpha=0.8)
    for precision, colour in colours.items():
        axes.plot([], [], color=colour, label=precision)
    for limit in (-0.25, 0.25):
        axes.axhline(limit, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="loss relative to bf16, %", title="dotted: the paper's 0.25%")
    axes.legend()
    return figure


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with standard_output_for_json(arguments.json) as write_json:
        runtime.start(MeshConfig(data=1))
        curves = {(precision, seed): losses_of(arguments, precision, seed)
                  for seed in arguments.seeds for precision in (BASELINE, *arguments.precisions)}
        rows = [{"precision": precision, "seed": seed, **compare(curves[precision, seed], curves[BASELINE, seed])}
                for precision in arguments.precisions for seed in arguments.seeds]
        steps = len(next(iter(curves.values())))
        result = {"about": {**provenance(), "preset": arguments.preset, "steps": steps}, "rows": rows,
                  "same_weights": [row for seed in arguments.seeds for row in held_out(arguments, seed)]}
        write_report(arguments.out, result, as_markdown(result), lambda: draw(curves, arguments.precisions))
        write_json(result)
    if not arguments.json:
        print(as_markdown(result), end="")


if __name__ == "__main__":
    finish(main)
