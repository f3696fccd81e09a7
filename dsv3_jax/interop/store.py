"""What every holder of published tensors offers: their shapes and types at once, their values slice by slice.

A checkpoint is larger than memory, so nobody here holds more than a slice. Stores are folders of safetensors, Orbax
checkpoints of weights, training checkpoints, and live parameters; `convert` and `load` know only this class.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.interop.float8 import BLOCK, E4M3, dequantise
from dsv3_jax.interop.names import BFLOAT16, FLOAT32, SCALE, TensorSpec, published_tensors
from dsv3_jax.interop.published_config import Format, check_quantization

BLOCK_ELEMENTS = 1 << 22
"""About how much of a tensor is in memory at once: 16 MiB in float32."""

Bounds = tuple[tuple[int, int], ...]
"""First and one past the last index of each dimension."""


class Stored(NamedTuple):
    """A tensor that a store has."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    """Named in errors."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Store(abc.ABC):
    """Published tensors, and the configuration that goes with them.

    Attributes:
      where: folder, or what the store is called in errors.
      tensors: all tensors by published name.
      config: the model.
      companions: files that belong to the model beside weights and config.json, such as tokenizer.json.
    """

    where: Path
    tensors: Mapping[str, Stored]
    config: ModelConfig
    companions: tuple[Path, ...] = ()

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """`tensor[index]` in its stored dtype; only this slice, or little more, is ever in memory.

        Raises:
          ConfigError: there is no such tensor, the file can't be read, or the slice has NaN or infinity; names both.
        """
        if name not in self.tensors:
            raise ConfigError(f"{self.where}: tensor {name} is missing")
        stored = self.tensors[name]
        spans = tuple(part.indices(size)[:2] for part, size in
                      zip((*index, *(slice(None),) * (len(stored.shape) - len(index))), stored.shape, strict=True))
        values = self._read(name, spans)
        check_finite(values, name, stored.file)
        return values

    @abc.abstractmethod
    def published(self) -> dict[str, Any]:
        """The model's published `config.json`.

        Raises:
          ConfigError: no published architecture is like the model.
        """

    @abc.abstractmethod
    def _read(self, name: str, bounds: Bounds) -> np.ndarray:
        """The slice, in the stored dtype."""

    def read_float32(self, spec: TensorSpec, index: tuple[slice, ...] = ()) -> np.ndarray:
        """`read` as float32; float8 is multiplied by its scales."""
        values = self.read(spec.name, index)
        if values.dtype != E4M3:
            return values.astype(FLOAT32)
        first = tuple(part.indices(size)[0] for part, size in zip(index or (slice(None),) * 2, spec.shape, strict=True))
        touched = tuple(slice(start // BLOCK, -(-(start + size) // BLOCK))
                        for start, size in zip(first, values.shape, strict=True))
        return dequantise(values, self.read(spec.name + SCALE, touched), (first[0], first[1]))

    def format(self) -> Format:
        """The format of all tensors, after checking that they are exactly the published ones.

        Raises:
          ConfigError: a tensor is missing, extra, misshapen or of another type; names it and its file.
        """
        embedding = "model.embed_tokens.weight"
        quantized = check_quantization(self.published(), self.where)
        if quantized or any(stored.dtype == E4M3 for stored in self.tensors.values()):
            fmt: Format = "float8"
        elif embedding in self.tensors and self.tensors[embedding].dtype == FLOAT32:
            fmt = "float32"
        else:
            fmt = "bfloat16"
        _check_tensors(self, published_tensors(self.config, fmt), fmt)
        return fmt


def _check_tensors(store: Store, specs: tuple[TensorSpec, ...], fmt: Format) -> None:
    missing = [spec.name for spec in specs if spec.name not in store.tensors]
    if missing:
        depth = store.config.num_nextn_predict_layers
        last = f"model.layers.{store.config.num_hidden_layers}."
        remedy = "fetch the model again"
        if depth and all(int(name.split(".")[2]) >= store.config.num_hidden_layers for name in missing
                         if name.startswith("model.layers.")) and any(name.startswith(last) for name in missing):
            remedy = (f"if the model was saved without its prediction layers, set num_nextn_predict_layers ({depth}) "
                      "to 0 in config.json")
        raise ConfigError(f"{store.where}: {_several('tensor', missing)} missing, which config.json asks for: {remedy}")
    extra = sorted(store.tensors.keys() - {spec.name for spec in specs})
    if extra:
        raise ConfigError(f"{store.where}: {_several('tensor', extra)} not in a {fmt} model of this config.json (file "
                          f"{store.tensors[extra[0]].file}): correct config.json, or remove what does not belong")
    for spec in specs:
        stored = store.tensors[spec.name]
        if stored.shape != spec.shape:
            raise ConfigError(f"{stored.file}: tensor {spec.name} has shape {list(stored.shape)}, and config.json asks "
                              f"for {list(spec.shape)}: use the config.json of these weights")
        # Some bfloat16 models hold the router's bias in bfloat16 as well.
        if stored.dtype != spec.dtype and not (spec.place.router_bias and stored.dtype == BFLOAT16):
            raise ConfigError(f"{stored.file}: tensor {spec.name} is {stored.dtype.name}, and a {fmt} model holds it "
                              f"in {spec.dtype.name}: convert it first")


def _several(noun: str, names: list[str]) -> str:
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{noun} {names[0]} is" if len(names) == 1 else f"{len(names)} {noun}s ({listed}) are"


def check_finite(values: np.ndarray, name: str, file: Path) -> None:
    """Raises `ConfigError` if there is NaN or infinity in `values`."""
    if values.dtype == E4M3:
        bad = (values.view(np.uint8) & 0x7F) == 0x7F  # the two NaN codes; e4m3 has no infinity
    elif values.dtype == BFLOAT16:
        bad = (values.view(np.uint16) & 0x7F80) == 0x7F80  # exponent of ones
    else:
        bad = ~np.isfinite(values)
    if bad.any():
        raise ConfigError(f"{file}: tensor {name} has NaN or infinity ({int(bad.sum())} of {bad.size} values read): "
                          "the file is damaged or the model diverged; fetch it again, or take an earlier checkpoint")


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows of a tensor that are handled at once: whole blocks of scales, about BLOCK_ELEMENTS, or all there are."""
    if len(shape) < 2:
        return shape[0] if shape else 1
    rows = max(1, BLOCK_ELEMENTS // (shape[1] * BLOCK)) * BLOCK
    return min(rows, shape[0])


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """`shape`'s rows in blocks of `block_rows`."""
    step = block_rows(shape)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


_COMPANION_SUFFIXES = {".json", ".jinja", ".model", ".py", ".txt"}


def companions_of(folder: Path) -> tuple[Path, ...]:
    """Tokenizer, generation settings and code that lie beside a model's weights."""
    return tuple(sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _COMPANION_SUFFIXES
                        and path.name != "config.json" and not path.name.endswith(".index.json")))
