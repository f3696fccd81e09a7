"""Folders of safetensors files: one `model.safetensors`, or shards with `model.safetensors.index.json`.

A file is 8 bytes of header length (little endian), a JSON header that gives each tensor's dtype, shape and byte range,
and the tensors' bytes, row-major, without gaps. Slices are read with `pread`, so that only they become resident.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.interop.float8 import E4M3
from dsv3_jax.interop.names import BFLOAT16, FLOAT32
from dsv3_jax.interop.published_config import model_from_published, read_json
from dsv3_jax.interop.store import Bounds, Store, Stored, block_rows, companions_of

INDEX = "model.safetensors.index.json"
DTYPES = {"F8_E4M3": E4M3, "BF16": BFLOAT16, "F32": FLOAT32, "F16": np.dtype(np.float16), "F64": np.dtype(np.float64)}
"""By the header's name. The last two are known only to be named in errors."""
_LARGEST_HEADER = 1 << 28

# Tables of rotary angles that some files still carry; every model computes them from config.json.
_DERIVED = ".rotary_emb.inv_freq"


class SafetensorsFolder(Store):
    """A published model; see `Store`.

    Everything but the values is checked on opening: headers, byte ranges, file sizes, and the index against the shards.
    """

    def __init__(self, folder: Path):
        """Raises `ConfigError` for a missing, truncated or malformed file; names it, and the tensor if it is one's."""
        self.where = folder
        self._published = read_json(folder / "config.json")
        self.config = model_from_published(self._published, folder / "config.json")
        self.companions = companions_of(folder)
        self._starts: dict[str, int] = {}
        self._files: dict[Path, int] = {}
        weakref.finalize(self, _close, self._files)
        tensors: dict[str, Stored] = {}
        for path in _shards(folder):
            for name, stored, start in _parse(path):
                if name in tensors:
                    raise ConfigError(f"{path}: tensor {name} is also in {tensors[name].file}: remove one of the files")
                tensors[name], self._starts[name] = stored, start
        _check_index(folder, tensors)
        self.tensors = {name: stored for name, stored in tensors.items() if not name.endswith(_DERIVED)}

    def published(self) -> dict[str, Any]:
        return self._published

    def _read(self, name: str, bounds: Bounds) -> np.ndarray:
        stored = self.tensors[name]
        if len(bounds) < 2 or bounds[1:] == tuple((0, size) for size in stored.shape[1:]):
            return self._rows(name, *(bounds[0] if bounds else (0, 1))).reshape([b - a for a, b in bounds])
        # Columns are cut out of whole rows, some rows at a time.
        (first, last), columns = bounds[0], slice(*bounds[1])
        out = np.empty((last - first, columns.stop - columns.start), stored.dtype)
        step = block_rows(stored.shape)
        for start in range(first, last, step):
            stop = min(start + step, last)
            out[start - first:stop - first] = self._rows(name, start, stop)[:, columns]
        return out

    def _rows(self, name: str, first: int, last: int) -> np.ndarray:
        stored = self.tensors[name]
        out = np.empty((last - first, *stored.shape[1:]), stored.dtype)
        left = memoryview(out.reshape(-1).view(np.uint8))
        if not len(left):
            return out
        position = self._starts[name] + first * (out.nbytes // len(out))
        if stored.file not in self._files:
            self._files[stored.file] = os.open(stored.file, os.O_RDONLY)
        while left:
            count = os.preadv(self._files[stored.file], [left], position)
            if not count:
                raise ConfigError(f"{stored.file}: tensor {name} ends early; the file was cut since it was opened")
            left, position = left[count:], position + count
        return out


def _close(files: Mapping[Path, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)


def _shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    if not (folder / INDEX).exists():
        if len(found) > 1:
            raise ConfigError(f"{folder} has {len(found)} safetensors files and no {INDEX}: fetch that file too")
        if not found:
            raise ConfigError(f"{folder} has no safetensors files")
        return found
    named = {file: tensor for tensor, file in _weight_map(folder).items()}  # one tensor of each file
    for file, tensor in named.items():
        if not (folder / file).is_file():
            raise ConfigError(f"{folder / INDEX} says that tensor {tensor} is in {file}, which is missing: fetch "
                              f"{folder / file}")
    return sorted({folder / file for file in named})


def _weight_map(folder: Path) -> Mapping[str, str]:
    named = read_json(folder / INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise ConfigError(f"{folder / INDEX} has no weight_map from tensors to files: fetch it again")
    return named


def _check_index(folder: Path, tensors: Mapping[str, Stored]) -> None:
    if not (folder / INDEX).exists():
        return
    named = _weight_map(folder)
    paths = {file: folder / file for file in set(named.values())}
    for name, file in named.items():
        if name not in tensors or tensors[name].file != paths[file]:
            where = f"it is in {tensors[name].file.name}" if name in tensors else "it is missing"
            raise ConfigError(f"{folder / INDEX} says that tensor {name} is in {folder / file}, but {where}: fetch "
                              "both again")
    for name in tensors:
        if name not in named:
            raise ConfigError(f"{tensors[name].file}: tensor {name} is not in {INDEX}: fetch both again")


def _parse(path: Path) -> list[tuple[str, Stored, int]]:
    """(name, tensor, position in the file) of all tensors, after checking that they fill the file exactly."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ConfigError(f"{path} is truncated or not safetensors: {size} bytes, and a header of {length}; fetch "
                              "it again")
        try:
            header = json.loads(file.read(length))
            entries = [_entry(name, about) for name, about in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} has a malformed header ({type(error).__name__}: {error}); fetch it again"
                              ) from error
    end, out = 0, []
    for name, dtype, shape, begin, stop in sorted(entries, key=lambda entry: entry[3:]):
        if dtype not in DTYPES:
            raise ConfigError(f"{path}: tensor {name} has dtype {dtype}; dtypes read are {', '.join(DTYPES)}")
        stored = Stored(shape, DTYPES[dtype], path)
        if begin != end or stop - begin != stored.nbytes:
            raise ConfigError(f"{path}: tensor {name} has bytes {begin} to {stop}, where {dtype} {list(shape)} needs "
                              f"{stored.nbytes} from {end}: the header is damaged; fetch the file again")
        if 8 + length + stop > size:
            raise ConfigError(f"{path} is truncated: tensor {name} ends at byte {8 + length + stop} of {size}; fetch "
                              "it again")
        end = stop
        out.append((name, stored, 8 + length + begin))
    if 8 + length + end != size:
        raise ConfigError(f"{path} has {size - 8 - length - end} bytes after its last tensor: fetch it again")
    return out


def _entry(name: str, about: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...], int, int]:
    begin, stop = about["data_offsets"]
    return name, about["dtype"], tuple(int(size) for size in about["shape"]), int(begin), int(stop)
