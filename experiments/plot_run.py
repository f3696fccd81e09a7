"""Plot a training run into one PNG: losses, learning rate and gradient norm, and the load of every expert.

  python experiments/plot_run.py runs/quickstart
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from dsv3_jax.config import ConfigError
from experiments.command_line import finish, import_pyplot, print_json


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Which run, and where the picture goes."""

    run_dir: tyro.conf.Positional[Path]
    """A run folder of experiments/train.py."""
    out: Path | None = None
    """Default: plot.png in the run folder."""
    json: bool = False
    """Print one JSON object with the picture's path and the last numbers."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    if not path.exists() or not path.read_text().strip():
        raise ConfigError(f"{path} is missing or empty: give the folder of a run that has taken steps")
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], loads: list[dict[str, Any]],
         title: str) -> Any:
    """The figure. Each row of the heat map is one expert, layers stacked from top to bottom."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 8), layout="constrained")
    figure.suptitle(title)
    x = [record["step"] for record in steps]
    losses, rates, balance, heat = axes.flat
    losses.plot(x, [record["loss"] for record in steps], label="next token", linewidth=1)
    losses.plot(x, [record["mtp_loss"] for record in steps], label="multi-token prediction", linewidth=1)
    if evaluations:
        losses.plot([e["step"] for e in evaluations], [e["validation_loss"] for e in evaluations], "ko",
                    label="held-out text", markersize=5)
        for e in evaluations:
            if "validation_bits_per_byte" in e:
                losses.annotate(f"{e['validation_bits_per_byte']:.3f} bits/byte", (e["step"], e["validation_loss"]),
                                textcoords="offset points", xytext=(0, 8), ha="right", fontsize=8)
    losses.set(title="loss", xlabel="step", ylabel="nats per token")
    losses.legend()
    rates.semilogy(x, [record["learning_rate"] for record in steps], label="learning rate")
    rates.semilogy(x, [record["grad_norm"] for record in steps], label="gradient norm", linewidth=1)
    rates.set(title="optimizer", xlabel="step")
    rates.legend()
    balance.plot(x, [record["load_max_over_mean"] for record in steps], linewidth=1)
    balance.set(title="busiest expert's load over the mean (average of layers)", xlabel="step", ylim=(1, None))
    _draw_loads(figure, heat, loads)
    return figure


def _draw_loads(figure: Any, heat: Any, loads: list[dict[str, Any]]) -> None:
    share = np.array([record["share"] for record in loads])  # [snapshots, layers, experts]
    layers, experts = share.shape[1:]
    image = heat.imshow(share.reshape(len(loads), -1).T * experts, aspect="auto", cmap="viridis", vmin=0, vmax=3,
                        interpolation="nearest", extent=(loads[0]["step"], loads[-1]["step"] + 1, layers, 0))
    heat.set(title="expert load over the mean", xlabel="step", ylabel="MoE layer (the last are prediction modules)",
             yticks=range(layers))
    figure.colorbar(image, ax=heat)


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    records = read_lines(arguments.run_dir / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "validation_loss" in record]
    loads = read_lines(arguments.run_dir / "expert_load.jsonl")
    out = arguments.out or arguments.run_dir / "plot.png"
    draw(steps, evaluations, loads, str(arguments.run_dir)).savefig(out, dpi=110)
    if arguments.json:
        print_json({"plot": str(out), **steps[-1], **(evaluations[-1] if evaluations else {})})
    else:
        print(out)


if __name__ == "__main__":
    finish(main)
