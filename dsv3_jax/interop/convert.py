"""From any store to a new folder, in any format, a block of rows at a time."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.interop.float8 import BLOCK, E4M3, quantise
from dsv3_jax.interop.names import SCALE, TensorSpec, published_tensors
from dsv3_jax.interop.orbax_weights import ITEM, OrbaxWeights, OrbaxWriter
from dsv3_jax.interop.published_config import Format, with_format
from dsv3_jax.interop.run_checkpoint import CHECKPOINTS, RunCheckpoint
from dsv3_jax.interop.safetensors_folder import SafetensorsFolder
from dsv3_jax.interop.safetensors_writer import SHARD_BYTES, SafetensorsWriter
from dsv3_jax.interop.staging import staged
from dsv3_jax.interop.store import Store, row_blocks

Kind = Literal["published", "orbax"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Progress(NamedTuple):
    """How far a conversion is."""

    tensors: int
    of_tensors: int
    bytes: int
    of_bytes: int
    """Of the target."""


def open_store(folder: Path, step: int | None = None, ema: bool = False) -> Store:
    """The store in `folder`, whichever kind it is.

    Args:
      step: of a run folder, the checkpoint; default the latest.
      ema: of a run folder, the moving average of the weights instead of the last ones.

    Raises:
      ConfigError: nothing known is there, or what is there is incomplete; names what is wrong.
    """
    if (folder / CHECKPOINTS).is_dir():
        return RunCheckpoint(folder, step, ema)
    if step is not None or ema:
        raise ConfigError(f"--step and --ema choose among the checkpoints of a run folder, and {folder} is none")
    if (folder / ITEM).is_dir():
        return OrbaxWeights(folder)
    if folder.is_dir() and any(folder.glob("*.safetensors*")):
        return SafetensorsFolder(folder)
    raise ConfigError(f"{folder} has neither safetensors files (a published model), nor {ITEM}/ (an Orbax folder of "
                      f"weights), nor {CHECKPOINTS}/ (a run folder): give a folder of one of these kinds")


def convert(store: Store, target: Path, kind: Kind, fmt: Format | Literal["same"] = "same",
            shard_bytes: int = SHARD_BYTES, progress: Callable[[Progress], None] = lambda done: None) -> Path:
    """Writes all tensors of `store` into the new folder `target`, with config.json and the files beside it.

    Tensors whose type does not change are copied bit for bit. In memory is one block of rows (`BLOCK_ELEMENTS`), and
    one float32 matrix if the store is a training checkpoint; for TensorStore's commits and copies less than 128 MB; and
    for every tensor up to 2 kB, its names, shapes and places in the store, the target and the table between them. With
    the 91,991 tensors of V3 in float8 that was 110 MB to open an Orbax folder, and 202 MB at most in a conversion.

    Args:
      fmt: "same" copies; another format converts through float32.
      shard_bytes: largest safetensors file, unless one tensor is larger.
      progress: called after every block.

    Raises:
      ConfigError: `target` exists, or a tensor is missing, extra, misshapen, unreadable or not finite. Nothing is left
        behind then.
    """
    found, published = store.format(), store.published()
    fmt = found if fmt == "same" else fmt
    specs = _targets(store, found, fmt)
    tensors = {spec.name: (spec.shape, spec.dtype) for spec in specs}
    total = sum(spec.nbytes for spec in specs)
    with staged(target) as folder:
        writer: SafetensorsWriter | OrbaxWriter = (SafetensorsWriter(folder, tensors, shard_bytes)
                                                   if kind == "published" else OrbaxWriter(folder, tensors))
        with contextlib.closing(writer):
            done, size = 0, 0
            for spec in specs:
                if fmt == "float8" and found != "float8" and spec.scale_of:
                    continue  # comes with its weight
                for name, first, rows in _converted(store, spec):
                    writer.write(name, first, rows)
                    size += rows.nbytes
                    progress(Progress(done, len(specs), size, total))
                done += 2 if fmt == "float8" != found and spec.dtype == E4M3 else 1
            writer.finish()
        progress(Progress(len(specs), len(specs), size, total))
        values = published if fmt == found else with_format(published, fmt)
        (folder / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path in store.companions:
            shutil.copyfile(path, folder / path.name)
    return target


def _targets(store: Store, found: Format, fmt: Format) -> list[TensorSpec]:
    """What to write. In the format that is already there, whatever type each tensor has."""
    specs = published_tensors(store.config, fmt)
    return [spec._replace(dtype=store.tensors[spec.name].dtype) for spec in specs] if fmt == found else list(specs)


def _converted(store: Store, spec: TensorSpec) -> Iterator[tuple[str, int, np.ndarray]]:
    """(name, first row, rows) of the tensor and, if it is quantised here, of its scales."""
    same = store.tensors[spec.name].dtype == spec.dtype
    for rows in row_blocks(spec.shape):
        if same:
            yield spec.name, rows.start, store.read(spec.name, (rows,))
            continue
        values = store.read_float32(spec, (rows, *(slice(None),) * (len(spec.shape) - 1)))
        if spec.dtype == E4M3:
            codes, scales = quantise(values)
            yield spec.name, rows.start, codes
            yield spec.name + SCALE, rows.start // BLOCK, scales
        else:
            yield spec.name, rows.start, values.astype(spec.dtype)


def dry_run(config: Any, fmt: Format) -> list[dict[str, Any]]:
    """Name, shape and dtype of every published tensor of a `ModelConfig`, as JSON values."""
    return [{"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype.name}
            for spec in published_tensors(config, fmt)]
