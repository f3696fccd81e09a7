"""The committed reports of compiled training steps, each with the run that was compiled; without pipelines, for which
less is calculated."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax.config import RunConfig
from dsv3_jax.presets import RUNS


class Report(NamedTuple):
    """One of experiments/results/pods."""

    name: str
    told: dict[str, Any]

    @property
    def config(self) -> RunConfig:
        return dataclasses.replace(RUNS[self.told["preset"]], precision=self.told["precision"],
                                   attention_by=self.told.get("attention_by", "xla"))

    def __str__(self) -> str:
        return self.name


_FOLDER = Path(__file__).parents[3] / "experiments/results/pods"
_ALL = [Report(path.stem, json.loads(path.read_text())) for path in sorted(_FOLDER.glob("*.json"))]
REPORTS = [report for report in _ALL if report.config.mesh.pipe == 1]
