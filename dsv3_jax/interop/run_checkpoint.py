"""A training run's checkpoint as published tensors, read slice by slice from the stacked float32 weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError, ModelConfig, model_from_dict
from dsv3_jax.interop.names import TensorSpec
from dsv3_jax.interop.orbax_files import OrbaxArrays
from dsv3_jax.interop.published_config import read_json
from dsv3_jax.interop.store import Bounds
from dsv3_jax.interop.tokenizer import Tokenizer
from dsv3_jax.interop.tree import TreeStore

CHECKPOINTS = "checkpoints"


class RunCheckpoint(TreeStore):
    """The weights, or their moving average, and the router biases of one step of a run; see `Store`."""

    def __init__(self, run_dir: Path, step: int | None = None, ema: bool = False):
        """Opens the latest checkpoint, or that of `step`.

        Raises:
          ConfigError: no such checkpoint, no moving average in it, or a damaged one.
        """
        steps = sorted(int(path.name) for path in (run_dir / CHECKPOINTS).glob("*") if path.name.isdigit())
        if not steps or (step is not None and step not in steps):
            raise ConfigError(f"no checkpoint of step {step} in {run_dir / CHECKPOINTS}; there are {steps or 'none'}")
        self.where = run_dir / CHECKPOINTS / str(steps[-1] if step is None else step)
        self.config = _model(self.where / "about" / "metadata")
        self._arrays = OrbaxArrays(self.where / "state")
        self._group = "ema" if ema else "params"
        if ema and not any(name.startswith("ema/") for name in self._arrays.arrays):
            raise ConfigError(f"{self.where} keeps no moving average: leave --ema out, or train with "
                              "--optimizer.ema-decay")
        self._matrix: tuple[Any, np.ndarray] | None = None
        tokenizer = run_dir / "tokenizer.json"
        self.companions = (tokenizer,) if tokenizer.is_file() else ()
        self.bos, self.eos = _ends(tokenizer)
        self._offer()
        for spec in self._specs.values():
            if self._name(spec) not in self._arrays.arrays:
                raise ConfigError(f"{self.where}: array {self._name(spec)} is missing, which holds tensor {spec.name}: "
                                  "take another step's checkpoint")

    def _name(self, spec: TensorSpec) -> str:
        group = "router_bias" if spec.place.router_bias else self._group
        return f"{group}/{spec.place.path}/value"

    def _leaf(self, spec: TensorSpec, bounds: Bounds) -> np.ndarray:
        name = self._name(spec)
        if not spec.place.transposed:
            return self._arrays.read(name, bounds)
        # Published rows are our columns: block by block they would read a matrix's chunks as often as it has blocks.
        # The matrix read last is kept whole, gate and up together.
        key = (name, spec.place.at)
        if self._matrix is None or self._matrix[0] != key:
            self._matrix = None
            whole = tuple((0, size) for size in self._arrays.arrays[name].shape[len(spec.place.at):])
            self._matrix = key, self._arrays.read(name, (*((i, i + 1) for i in spec.place.at), *whole))
        inner = tuple(slice(*span) for span in bounds[len(spec.place.at):])
        return self._matrix[1][(slice(None),) * len(spec.place.at) + inner]


def _model(path: Path) -> ModelConfig:
    try:
        return model_from_dict(read_json(path)["config"]["model"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is not of a training checkpoint of this program ({error})") from error


def _ends(tokenizer: Path) -> tuple[int | None, int | None]:
    """Ids that open and close a document; None without a tokenizer, or without the package that reads it."""
    if not tokenizer.is_file():
        return None, None
    try:
        loaded = Tokenizer.load(tokenizer)
    except ImportError:
        return None, None
    return loaded.bos, loaded.eos
