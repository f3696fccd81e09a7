"""Writes a folder of safetensors files, a block of rows at a time.

The headers follow from names, shapes and types alone, so every byte's place is known before the first value; the
`safetensors` library would want whole files in memory. `safetensors_folder` describes the format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv3_jax.interop.names import SCALE
from dsv3_jax.interop.safetensors_folder import DTYPES, INDEX

SHARD_BYTES = 5 * 10**9
"""Largest shard, unless one tensor is larger."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class _Slot(NamedTuple):
    file: Path
    start: int
    row_bytes: int


class SafetensorsWriter:
    """Tensors in any order, their rows in any order, each once; `finish` when all are written."""

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
                 shard_bytes: int = SHARD_BYTES):
        """Writes headers and index.

        Args:
          tensors: shape and dtype of every tensor that will be written, in the order of the shards.
        """
        shards = _split(tensors, shard_bytes)
        names = ([folder / "model.safetensors"] if len(shards) == 1 else
                 [folder / f"model-{i + 1:05d}-of-{len(shards):06d}.safetensors" for i in range(len(shards))])
        self._slots: dict[str, _Slot] = {}
        for path, members in zip(names, shards, strict=True):
            self._slots |= _write_header(path, {name: tensors[name] for name in members})
        self._open: tuple[Path, int] | None = None
        total = self._left = sum(_nbytes(*tensor) for tensor in tensors.values())
        if len(shards) > 1:
            index = {"metadata": {"total_size": total},
                     "weight_map": {name: self._slots[name].file.name for name in sorted(self._slots)}}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, first_row: int, rows: np.ndarray) -> None:
        """Writes `rows`, of the tensor's dtype, from row `first_row` on."""
        slot = self._slots[name]
        if self._open is None or self._open[0] != slot.file:
            self.close()
            self._open = (slot.file, os.open(slot.file, os.O_WRONLY))
        left = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        position = slot.start + first_row * slot.row_bytes
        while left:
            count = os.pwrite(self._open[1], left, position)
            left, position = left[count:], position + count
        self._left -= rows.nbytes

    def finish(self) -> None:
        """Waits until all is on disk.

        Raises:
          RuntimeError: fewer bytes were written than the tensors have.
        """
        self.close()
        if self._left:
            raise RuntimeError(f"{self._left} bytes of the tensors were not written")

    def close(self) -> None:
        """Closes the shard at work; also after an error."""
        if self._open is not None:
            os.fsync(self._open[1])
            os.close(self._open[1])
            self._open = None


def _nbytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _split(tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], shard_bytes: int) -> list[list[str]]:
    """Names by shard; a weight and its scales stay together."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors:
        if name.endswith(SCALE) and name.removesuffix(SCALE) in tensors:
            continue
        group = [name, *([name + SCALE] if name + SCALE in tensors else [])]
        size = sum(_nbytes(*tensors[member]) for member in group)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    return shards


def _write_header(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, _Slot]:
    """Makes the file at its full length and returns where each tensor goes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends: dict[str, tuple[int, int]] = {}
    position = 0
    # Widest types first, so that every tensor begins at a multiple of its element's size.
    for name, (shape, dtype) in sorted(tensors.items(), key=lambda item: -item[1][1].itemsize):
        size = _nbytes(shape, dtype)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + size]}
        ends[name] = (position, size)
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    return {name: _Slot(path, 8 + len(text) + start, size // max(1, tensors[name][0][0]))
            for name, (start, size) in ends.items()}
