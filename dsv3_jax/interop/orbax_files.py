"""Arrays in Orbax's files, opened with TensorStore: any slice, without the rest of the array.

Orbax keeps each array as zarr under its name, all of them in one OCDBT database or, if asked, in plain folders.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from dsv3_jax.config import ConfigError
from dsv3_jax.interop.store import Bounds, Stored

# Arrays have no cache, so that memory is the slice and the chunks it touches. The nodes of a database's index have one,
# for every look-up reads those on its path. Written files are brought to disk once, at the end.
_CONTEXT = {"cache_pool": {"total_bytes_limit": 0}, "cache_pool#index": {"total_bytes_limit": 8 << 20},
            "file_io_sync": False}
_DRIVERS = {".zarray": "zarr", "zarr.json": "zarr3"}
"""TensorStore's name of an array's format, by the name of its header."""
_AT_ONCE = 256
"""Headers that are read at once; each waits for the disk or the network."""
_KEPT_OPEN = 256
"""Arrays that stay open; each takes 4 kB."""


def database(folder: Path, new: bool = False) -> dict[str, Any]:
    """The spec of the key-value store in `folder`, or of a `new` OCDBT database."""
    if new or (folder / "manifest.ocdbt").exists():
        return {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "cache_pool": "cache_pool#index"}
    return {"driver": "file", "path": f"{folder.absolute()}/"}


def context() -> tensorstore.Context:
    """The resources that all arrays of a folder share."""
    return tensorstore.Context(_CONTEXT)


class OrbaxArrays:
    """The arrays below one Orbax item, by name."""

    def __init__(self, folder: Path):
        """Lists the arrays, and checks that no chunk is missing: TensorStore would read zeros in its place.

        Raises:
          ConfigError: the folder is not an Orbax checkpoint, or a chunk is missing; names array and folder.
        """
        self.folder = folder
        self._context = context()
        self._database = database(folder)
        self._open = functools.lru_cache(_KEPT_OPEN)(self._opened)
        self._drivers: dict[str, str] = {}
        self.arrays: dict[str, Stored] = {}
        try:
            keys = tensorstore.KvStore.open(self._database, context=self._context).result()
            self._list(keys)
        except (ValueError, KeyError, OSError) as error:
            raise ConfigError(f"{folder} is no readable Orbax checkpoint: {_short(error)}; write or fetch it again"
                              ) from error

    def _list(self, keys: tensorstore.KvStore) -> None:
        chunks: dict[str, int] = {}
        for key in (raw.decode() for raw in keys.list().result()):
            name, _, last = key.rpartition("/")
            if last in _DRIVERS:
                self._drivers[name] = _DRIVERS[last]
            else:  # a chunk: NAME/0.1 in zarr, NAME/c/0/1 in zarr3
                name = key.partition("/c/")[0] if "/c/" in key else name
                chunks[name] = chunks.get(name, 0) + 1
        for name, about in self._headers(keys):
            second = self._drivers[name] == "zarr"
            shape = tuple(about["shape"])
            pieces = about["chunks"] if second else about["chunk_grid"]["configuration"]["chunk_shape"]
            dtype = np.dtype(about["dtype"] if second else about["data_type"])
            self.arrays[name] = Stored(shape, dtype, self.folder)
            needed = math.prod(-(-size // piece) for size, piece in zip(shape, pieces, strict=True))
            if chunks.get(name, 0) < needed:
                raise ConfigError(f"{self.folder}: {needed - chunks.get(name, 0)} of {needed} chunks of tensor {name} "
                                  "are missing: write or fetch the checkpoint again")

    def _headers(self, keys: tensorstore.KvStore) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, header) of every array."""
        files = {driver: file for file, driver in _DRIVERS.items()}
        for some in itertools.batched(self._drivers.items(), _AT_ONCE):
            reads = [keys.read(f"{name}/{files[driver]}") for name, driver in some]
            for (name, _), read in zip(some, reads, strict=True):
                yield name, json.loads(read.result().value)

    def read(self, name: str, bounds: Bounds) -> np.ndarray:
        """The slice, in the stored dtype.

        Raises:
          ConfigError: a file is truncated or damaged; names array, folder and file.
        """
        try:
            array = self._open(name)
            return np.asarray(array[tuple(slice(*span) for span in bounds)].read().result())
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.folder}: tensor {name} cannot be read{self._cut_file(error)}: {_short(error)}; "
                              "write or fetch the checkpoint again") from error

    def _opened(self, name: str) -> tensorstore.TensorStore:
        spec = {"driver": self._drivers[name], "kvstore": {**self._database, "path": self._prefix(name)}}
        return tensorstore.open(spec, open=True, read=True, context=self._context).result()

    def _cut_file(self, error: Exception) -> str:
        """Which file ended early, if one did. OCDBT tells its size and not its name."""
        size = re.search(r"not valid for value of size (\d+)", str(error))
        files = [path for path in self.folder.rglob("d/*") if size and path.stat().st_size == int(size[1])]
        return f", {' or '.join(map(str, files))} is truncated" if files else ""

    def _prefix(self, name: str) -> str:
        return self._database.get("path", "") + name + "/"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
