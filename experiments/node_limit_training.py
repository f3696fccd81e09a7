"""What the router's node limit costs in quality when models are trained with it: loss by loss, and at the end.

  python experiments/node_limit_training.py --out experiments/results/node_limit_training
  python experiments/node_limit_training.py --seeds 0 --limits 1 4 --steps 200 --runs runs/node_limit_200_steps

DeepSeek-V3 sends a token to at most 4 of 8 nodes (paper 2, section 2.1.2). What that saves, node_limited_routing.py
tells. Here small models are trained with each limit M and compared with M = 8, which is none: the preset with its
experts cut finer, 64 of a quarter of the width in 8 groups, of which 8 a token as in V3. Groups stand for nodes; on one
device nothing travels, which changes no loss. Small models at a high learning rate are chaotic: limits that hardly keep
a token from its experts, such as 7, tell how far chance alone drives two runs apart.

Finished runs below --runs are not trained again; the defaults are 14 runs of 600 steps, about an hour on two cores.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import tyro

from dsv3_jax.config import ConfigError, MeshConfig, ModelConfig, Precision, RunConfig, named
from dsv3_jax.presets import RUNS
from dsv3_jax.training import runtime
from experiments.command_line import finish, provenance, standard_output_for_json, write_report
from experiments.loss_study import Study, draw, run_of, table_of_errors

NODES = 8


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to train, and how often."""

    preset: str = "quickstart"
    limits: tuple[int, ...] = (1, 2, 3, 4, 6, 7)
    """What to compare with no limit."""
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 600
    """The learning rate's schedule follows."""
    precision: Precision = "float32"
    runs: Path = Path("runs/node_limit_training")
    """Where run folders go."""
    out: Path | None = None
    """Write OUT.json, OUT.md and OUT.png."""
    json: bool = False
    """Print one JSON object."""


def finer(model: ModelConfig) -> ModelConfig:
    """The model with four times as many experts of a quarter of the width in groups of `NODES`, as many weights for a
    token, and no limit."""
    if model.moe_intermediate_size % 4 or 4 * model.n_routed_experts % (2 * NODES):
        raise ConfigError(f"model.moe_intermediate_size ({model.moe_intermediate_size}) must be divisible by 4 and "
                          f"model.n_routed_experts ({model.n_routed_experts}) by {NODES // 2}: take another --preset")
    return dataclasses.replace(model, n_routed_experts=4 * model.n_routed_experts,
                               num_experts_per_tok=4 * model.num_experts_per_tok,
                               moe_intermediate_size=model.moe_intermediate_size // 4,
                               n_shared_experts=4 * model.n_shared_experts, n_group=NODES, topk_group=NODES)


def study_of(arguments: Arguments) -> Study:
    """The preset under every limit."""
    wrong = [limit for limit in arguments.limits if not 1 <= limit < NODES]
    if wrong:
        raise ConfigError(f"--limits {wrong[0]} must be from 1 to {NODES - 1}: {NODES} nodes are no limit, with which "
                          "the others are compared")
    model = finer(named(RUNS, arguments.preset, "--preset").model)
    configs: dict[str, RunConfig] = {
        str(limit): run_of(arguments.preset, arguments.steps, precision=arguments.precision,
                           model=dataclasses.replace(model, topk_group=limit))
        for limit in (NODES, *arguments.limits)}
    return Study("limit", str(NODES), configs, arguments.seeds, arguments.runs)


def at_the_end(study: Study) -> list[dict[str, Any]]:
    """Held-out bits per byte of every run."""
    told = []
    for limit in study.configs:
        for seed in study.seeds:
            records = map(json.loads, (study.folder(limit, seed) / "metrics.jsonl").read_text().splitlines())
            *_, last = (record for record in records if "validation_loss" in record)
            told.append({"limit": limit, "seed": seed, "validation_loss": last["validation_loss"],
                         "bits_per_byte": last["validation_bits_per_byte"]})
    return told


def as_markdown(study: Study, result: dict[str, Any]) -> str:
    """Tables a person reads."""
    about = result["about"]
    return "\n".join([
        f"# Training under a node limit: {about['preset']} with finer experts, {about['steps']} steps", "",
        f"`{about['command']}`", "",
        f"{about['device']}; jax {about['jax']}, Python {about['python']}, {about['date']}.", "",
        f"Experts in {NODES} groups. Relative to the loss without limit of the same seed, moving averages with decay "
        "0.9, after the first tenth of the run.", "", *table_of_errors(study, result), "",
        "On held-out text at the end:", "", "| limit | seed | loss | bits per byte |", "|---:|---:|---:|---:|",
        *(f"| {row['limit']} | {row['seed']} | {row['validation_loss']:.4f} | {row['bits_per_byte']:.4f} |"
          for row in result["at_the_end"])]) + "\n"


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with standard_output_for_json(arguments.json) as write_json:
        study = study_of(arguments)
        runtime.start(MeshConfig(data=1))
        curves = study.losses()
        about = {**provenance(), "preset": arguments.preset, "steps": arguments.steps,
                 "precision": arguments.precision}
        result = {"about": about, "rows": study.errors(curves), "at_the_end": at_the_end(study)}
        write_report(arguments.out, result, as_markdown(study, result), lambda: draw(study, curves))
        write_json(result)
    if not arguments.json:
        print(as_markdown(study, result), end="")


if __name__ == "__main__":
    finish(main)
