"""How far training in float8 departs from training in bf16: the same small model, text and seeds, loss by loss.

  python experiments/fp8_vs_bf16.py --out experiments/results/fp8_vs_bf16
  python experiments/fp8_vs_bf16.py --seeds 0 --precisions fp8 --steps 200 --runs runs/fp8_200_steps

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
from pathlib import Path
from typing import Any

import tyro

from dsv3_jax.config import MeshConfig, Precision, RunConfig
from dsv3_jax.training import runtime
from experiments.command_line import finish, provenance, standard_output_for_json, write_report
from experiments.loss_study import Study, draw, run_of, table_of_errors, table_of_same_weights

BASELINE: Precision = "bf16"


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
    keep_casts: bool = False
    """Round to bf16 after every single operation, as no accelerator does: XLA stays in float32 inside a fusion, and on
    CPU in most places."""
    out: Path | None = None
    """Write OUT.json, OUT.md and OUT.png."""
    json: bool = False
    """Print one JSON object."""


def study_of(arguments: Arguments) -> Study:
    """The preset in every precision."""
    configs: dict[str, RunConfig] = {
        precision: run_of(arguments.preset, arguments.steps, precision=precision)
        for precision in (BASELINE, *arguments.precisions)}
    return Study("precision", BASELINE, configs, arguments.seeds, arguments.runs)


def as_markdown(study: Study, result: dict[str, Any]) -> str:
    """Tables a person reads."""
    about = result["about"]
    return "\n".join([
        f"# float8 against bf16: {about['preset']}, {about['steps']} steps", "", f"`{about['command']}`", "",
        f"{about['device']}; jax {about['jax']}, Python {about['python']}, {about['date']}.", "",
        "Relative to the loss in bf16 of the same seed, moving averages with decay 0.9, after the first tenth of "
        "the run. Paper 2, appendix B.1: below 0.25%.", "",
        *table_of_errors(study, result), "", "The same weights, trained in bf16, on held-out text:", "",
        *table_of_same_weights(study, result)]) + "\n"


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with standard_output_for_json(arguments.json) as write_json:
        study = study_of(arguments)
        runtime.start(MeshConfig(data=1), keep_casts=arguments.keep_casts)
        curves = study.losses()
        about = {**provenance(), "preset": arguments.preset, "steps": study.configs[BASELINE].steps}
        result = {"about": about, **study.result(curves)}
        write_report(arguments.out, result, as_markdown(study, result), lambda: draw(study, curves, limit=0.25))
        write_json(result)
    if not arguments.json:
        print(as_markdown(study, result), end="")


if __name__ == "__main__":
    finish(main)
