"""What a combine in LogFMT does to training: the same small model, text and seeds, loss by loss.

  python experiments/logfmt_training.py --out experiments/results/logfmt_training
  python experiments/logfmt_training.py --seeds 0 --combines logfmt4 --steps 100 --runs runs/logfmt_100_steps
  python experiments/logfmt_training.py --mesh.scale-up 4 --mesh.simulate-devices None --runs runs/logfmt_8_gpus

Paper 1 tried LogFMT for the combine on what the residual branches of dense models of 7B parameters give: in training
8 bits were better than E4M3 and E5M2, 10 bits like bf16 (section 3.2; no losses given). Here it is the combine itself.
On one device nothing travels and nothing is rounded, so experts are spread over several, by default two nodes of two
that the CPU simulates: sums of experts' outputs are rounded on each device for their way through the node, and their
sums for the way between nodes; so are gradients of what was dispatched. Rounding counts as the identity in the
backward. Tokens go to 4 experts instead of the preset's 2: of two outputs there is one sum, and where it is rounded to
bf16 makes no difference, so that the plain combine and that in float32 would be the same. Every cast to bf16 is kept:
left to itself XLA on CPU stays in float32 between operations.

Trains a preset once for each format and seed, in folders below --runs where finished runs are not trained again; the
defaults are 15 runs of 600 steps, about an hour on two cores. The relative loss error of a run is |loss - loss with the
plain combine| / loss with the plain combine, both as moving averages with decay 0.9. A small model at a high learning
rate is chaotic: read a difference beside that of float32, which rounds less than the plain combine does and tells how
far rounding alone drives two runs apart. What formats do to a loss without chaos tells the second table: weights
trained with the plain combine read held-out text with every other. Errors of numbers and the cost of coding: logfmt.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from dsv3_jax.config import Combine, ConfigError, MeshConfig, Precision, RunConfig
from dsv3_jax.training import runtime
from experiments.command_line import finish, provenance, standard_output_for_json, write_report
from experiments.loss_study import Study, draw, run_of, table_of_errors, table_of_same_weights


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to train, and how often."""

    preset: str = "quickstart"
    combines: tuple[Combine, ...] = ("logfmt10", "logfmt8", "logfmt6", "float32")
    """What to compare with --mesh.combine."""
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 600
    """The learning rate's schedule follows."""
    experts_per_token: int = 4
    """Routed experts a token goes to, instead of the preset's."""
    precision: Precision = "bf16"
    """Of all else; the plain combine is in its compute type."""
    mesh: MeshConfig = MeshConfig(scale_out=2, scale_up=2, simulate_devices=4)
    """Of all runs; --mesh.simulate-devices None takes the devices that are there."""
    runs: Path = Path("runs/logfmt_training")
    """Where run folders go."""
    out: Path | None = None
    """Write OUT.json, OUT.md and OUT.png."""
    json: bool = False
    """Print one JSON object."""


def study_of(arguments: Arguments) -> Study:
    """The preset with every combine."""
    mesh = arguments.mesh
    if mesh.expert_parallel == 1:
        raise ConfigError(f"mesh.scale_out*mesh.scale_up*mesh.context ({mesh.scale_out}*{mesh.scale_up}*{mesh.context}"
                          "=1) must be above 1: where each device has all experts, nothing is combined over a network")
    base = run_of(arguments.preset, arguments.steps, precision=arguments.precision)
    base = dataclasses.replace(base, model=dataclasses.replace(base.model,
                                                               num_experts_per_tok=arguments.experts_per_token))
    configs: dict[str, RunConfig] = {
        combine: dataclasses.replace(base, mesh=dataclasses.replace(mesh, combine=combine))
        for combine in (mesh.combine, *arguments.combines)}
    return Study("combine", mesh.combine, configs, arguments.seeds, arguments.runs)


def as_markdown(study: Study, result: dict[str, Any]) -> str:
    """Tables a person reads."""
    about, mesh = result["about"], result["about"]["mesh"]
    return "\n".join([
        f"# Combine in LogFMT against {study.baseline}: {about['preset']}, {about['steps']} steps", "",
        f"`{about['command']}`", "",
        f"{about['device']}; jax {about['jax']}, Python {about['python']}, {about['date']}.", "",
        f"Trained in {about['precision']}, {about['experts_per_token']} experts a token, experts over "
        f"{mesh['scale_out']} nodes of {mesh['scale_up'] * mesh['context']} devices. Relative to the loss with combine "
        f"{study.baseline} of the same seed, moving averages with decay 0.9, after the first tenth of the run.", "",
        *table_of_errors(study, result), "",
        f"The same weights, trained with combine {study.baseline}, on held-out text:", "",
        *table_of_same_weights(study, result)]) + "\n"


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with standard_output_for_json(arguments.json) as write_json:
        study = study_of(arguments)
        runtime.start(arguments.mesh, keep_casts=True)
        curves = study.losses()
        about = {**provenance(), "preset": arguments.preset, "steps": arguments.steps,
                 "experts_per_token": arguments.experts_per_token, "precision": arguments.precision,
                 "mesh": dataclasses.asdict(arguments.mesh)}
        result = {"about": about, **study.result(curves)}
        write_report(arguments.out, result, as_markdown(study, result), lambda: draw(study, curves))
        write_json(result)
    if not arguments.json:
        print(as_markdown(study, result), end="")


if __name__ == "__main__":
    finish(main)
