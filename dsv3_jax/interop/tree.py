"""Published tensors out of our own parameter tree: training checkpoints and live parameters."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np

from dsv3_jax.interop.names import TensorSpec, published_tensors
from dsv3_jax.interop.published_config import Format, published_from_model
from dsv3_jax.interop.store import Bounds, Store, Stored


class TreeStore(Store):
    """A store that holds our stacked, transposed and fused float32 arrays, and offers them as published."""

    bos: int | None = None
    """Id that opens a document."""
    eos: int | None = None

    def published(self) -> dict[str, Any]:
        return published_from_model(self.config, "float32", self.bos, self.eos)

    def format(self) -> Format:
        return "float32"

    def _offer(self) -> None:
        """Fills `tensors` from `config` and `where`."""
        self._specs = {spec.name: spec for spec in published_tensors(self.config, "float32")}
        self.tensors = {name: Stored(spec.shape, spec.dtype, self.where) for name, spec in self._specs.items()}

    @abc.abstractmethod
    def _leaf(self, spec: TensorSpec, bounds: Bounds) -> np.ndarray:
        """A slice of the array at `spec.place`, with all its dimensions."""

    def _read(self, name: str, bounds: Bounds) -> np.ndarray:
        spec = self._specs[name]
        inner = bounds[::-1] if spec.place.transposed else bounds
        if spec.place.half is not None:
            offset = spec.place.half * spec.shape[0]
            inner = (*inner[:-1], (inner[-1][0] + offset, inner[-1][1] + offset))
        values = self._leaf(spec, (*((i, i + 1) for i in spec.place.at), *inner))
        values = values.reshape(values.shape[len(spec.place.at):])
        return values.T if spec.place.transposed else values
