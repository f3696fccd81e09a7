"""What one setting changes in training: runs that share all else, seeds included, compared loss by loss.

The relative loss error of a run is |loss - baseline's loss| / baseline's loss, both as moving averages. A small model
at a high learning rate is chaotic, so a difference must be read beside that of runs that only round otherwise. What the
setting does to a loss without chaos tells the second comparison: weights that the baseline trained read held-out text
with every value of it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError, RunConfig, named, run_from_dict
from dsv3_jax.interop.convert import open_store
from dsv3_jax.interop.load import load
from dsv3_jax.mesh import make_mesh
from dsv3_jax.presets import RUNS
from dsv3_jax.training.checkpoint import differing_fields
from dsv3_jax.training.evaluate import Evaluator
from dsv3_jax.training.loop import train
from dsv3_jax.training.tokens import prepare
from experiments.command_line import import_pyplot, say_line

DECAY = 0.9
"""Of the moving averages of losses (paper 2, appendix B.1)."""
FROM = 0.1
"""Share of a run after which its error counts: before, losses fall too fast for an average to mean much."""

Curves = dict[tuple[str, int], np.ndarray]
"""float64 [steps], training losses of each value and seed."""


def run_of(preset: str, steps: int | None, **settings: Any) -> RunConfig:
    """The preset, or as many steps of it, with other settings; no samples of text, one checkpoint, at the end."""
    config = named(RUNS, preset, "--preset")
    steps = steps or config.steps
    return dataclasses.replace(config, **settings, steps=steps,
                               checkpoint=dataclasses.replace(config.checkpoint, every=steps),
                               report=dataclasses.replace(config.report, sample_every=0))


@dataclasses.dataclass(frozen=True)
class Study:
    """A run with each value of a setting and each seed."""

    setting: str
    """What it is called in reports."""
    baseline: str
    """The value that the others are compared with."""
    configs: dict[str, RunConfig]
    """Of every value; the seed is replaced."""
    seeds: tuple[int, ...]
    runs: Path
    """Where run folders go."""

    @property
    def others(self) -> list[str]:
        """All values but the baseline."""
        return [value for value in self.configs if value != self.baseline]

    def folder(self, value: str, seed: int) -> Path:
        """Of one run."""
        return self.runs / f"{value}-seed{seed}"

    def losses(self) -> Curves:
        """Of all runs; what is not finished is trained first."""
        return {(value, seed): losses_of(dataclasses.replace(self.configs[value], seed=seed), self.folder(value, seed))
                for seed in self.seeds for value in (self.baseline, *self.others)}

    def result(self, curves: Curves) -> dict[str, Any]:
        """rows: errors of each run; same_weights: what the baseline's weights lose on held-out text."""
        return {"rows": self.errors(curves),
                "same_weights": [row for seed in self.seeds for row in self._held_out(seed)]}

    def errors(self, curves: Curves) -> list[dict[str, Any]]:
        """Of each run; see `compare`."""
        return [{self.setting: value, "seed": seed, **compare(curves[value, seed], curves[self.baseline, seed])}
                for value in self.others for seed in self.seeds]

    def _held_out(self, seed: int) -> list[dict[str, Any]]:
        config = dataclasses.replace(self.configs[self.baseline], seed=seed)
        mesh = make_mesh(config.mesh)
        params, router_bias = load(open_store(self.folder(self.baseline, seed)), mesh, say=say_line)
        split = prepare(config.data, config.model.vocab_size, seed, say_line).validation
        losses = {}
        for value in (self.baseline, *self.others):
            losses[value] = Evaluator(self.configs[value], mesh, split)(params, router_bias)["validation_loss"]
            say_line(f"seed {seed}: weights of {self.baseline} read in {value}: loss {losses[value]:.5f}")
        return [{self.setting: value, "seed": seed, "loss": losses[value],
                 "difference": losses[value] / losses[self.baseline] - 1} for value in self.others]


def losses_of(config: RunConfig, folder: Path) -> np.ndarray:
    """float64 [steps]: training losses of the run in the folder, which is trained, or resumed, if it has to be.

    Raises:
      ConfigError: the folder has a run that differs in more than reports and checkpoints. Steps and mesh count too,
        with which a run may be resumed: learning rates follow the one, and the other rounds in another order.
    """
    metrics, settings = folder / "metrics.jsonl", folder / "config.json"
    if settings.exists():
        saved = dataclasses.asdict(run_from_dict(json.loads(settings.read_text())))
        different = differing_fields(saved, config, free=("report.", "checkpoint.", "distributed.", "data.cache_dir"))
        if different:
            raise ConfigError(f"{folder} holds a run of another configuration: {'; '.join(different)}. Use another "
                              "--runs, or the saved values")
    if not metrics.exists() or len(_losses(metrics)) < config.steps:
        say_line(f"training {folder}")
        if not train(config, folder, say_line)["finished"]:
            raise SystemExit("stopped by a signal; the same command goes on")
    return _losses(metrics)


def _losses(metrics: Path) -> np.ndarray:
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    by_step = {record["step"]: record["loss"] for record in records if "loss" in record}
    return np.array([by_step[step] for step in sorted(by_step)])


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


def table_of_errors(study: Study, result: dict[str, Any]) -> list[str]:
    """Lines of Markdown, of `result["rows"]`."""
    return [f"| {study.setting} | seed | mean error | largest error | mean difference | difference over the last 5% |",
            "|---|---:|---:|---:|---:|---:|",
            *(f"| {row[study.setting]} | {row['seed']} | {row['mean_error']:.3%} | {row['largest_error']:.3%} | "
              f"{row['mean_difference']:+.3%} | {row['difference_at_end']:+.3%} |" for row in result["rows"])]


def table_of_same_weights(study: Study, result: dict[str, Any]) -> list[str]:
    """Lines of Markdown, of `result["same_weights"]`."""
    return [f"| read in | seed | loss | relative to {study.baseline} |", "|---|---:|---:|---:|",
            *(f"| {row[study.setting]} | {row['seed']} | {row['loss']:.5f} | {row['difference']:+.4%} |"
              for row in result["same_weights"])]


def draw(study: Study, curves: Curves, limit: float | None = None) -> Any:
    """The figure: signed relative difference to the baseline over the run, a colour for each value.

    Args:
      limit: of the paper, in percent, drawn on both sides.
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(10, 5.5), layout="constrained")
    for index, value in enumerate(study.others):
        for seed in study.seeds:
            signed = moving_average(curves[value, seed]) / moving_average(curves[study.baseline, seed]) - 1
            axes.plot(100 * signed, color=f"C{index}", linewidth=0.8, alpha=0.8)
        axes.plot([], [], color=f"C{index}", label=value)
    for edge in () if limit is None else (-limit, limit):
        axes.axhline(edge, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel=f"loss relative to {study.baseline}, %",
             title="" if limit is None else f"dotted: the paper's {limit}%")
    axes.legend()
    return figure
