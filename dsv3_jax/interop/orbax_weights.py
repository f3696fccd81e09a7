"""Folders that hold the published tensors as an Orbax checkpoint, under their names and in their own dtypes.

    FOLDER/config.json        as published, with tokenizer.json and the like beside it
    FOLDER/weights/           an Orbax checkpoint; `orbax.checkpoint.StandardCheckpointer().restore` gives a flat dict

Orbax 0.12 saves a tree that is in memory as a whole (its partial saving merges metadata in time quadratic in the number
of arrays), so the files are written here, with the library that Orbax writes them with.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore

from dsv3_jax.config import ConfigError
from dsv3_jax.interop.orbax_files import OrbaxArrays, context, database
from dsv3_jax.interop.published_config import model_from_published, read_json
from dsv3_jax.interop.store import Bounds, Store, block_rows, companions_of

ITEM = "weights"
_COMMIT_BYTES = 16 << 20
"""Bytes that wait in memory for a commit; each commit writes the database's index again."""
_PENDING_BYTES = 16 << 10
"""What TensorStore holds for a write beside its rows."""
# Small nodes, since every commit writes those on its path. The database itself says so to its readers.
_LAYOUT = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 1 << 18}


class OrbaxWeights(Store):
    """The published tensors in an Orbax checkpoint; see `Store`."""

    def __init__(self, folder: Path):
        """Raises `ConfigError` if config.json or the checkpoint is missing or damaged."""
        self.where = folder
        self._published = read_json(folder / "config.json")
        self.config = model_from_published(self._published, folder / "config.json")
        self.companions = companions_of(folder)
        if not (folder / ITEM / "_METADATA").is_file():
            raise ConfigError(f"{folder / ITEM / '_METADATA'} is missing: the checkpoint is not complete; write or "
                              "fetch it again")
        self._arrays = OrbaxArrays(folder / ITEM)
        self.tensors = self._arrays.arrays

    def published(self) -> dict[str, Any]:
        return self._published

    def _read(self, name: str, bounds: Bounds) -> np.ndarray:
        return self._arrays.read(name, bounds)


class OrbaxWriter:
    """Tensors in any order, their rows in any order, each once; `finish` when all are written."""

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]):
        """Begins the checkpoint.

        Args:
          tensors: shape and dtype of every tensor that will be written.
        """
        self._folder, self._tensors = folder / ITEM, tensors
        self._folder.mkdir()
        self._began = time.time_ns()
        self._context = context()
        self._database = {**database(self._folder, new=True), "config": _LAYOUT}
        self._transaction, self._waiting = tensorstore.Transaction(), 0
        self._left = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for shape, dtype in tensors.values())

    def write(self, name: str, first_row: int, rows: np.ndarray) -> None:
        """Writes `rows`, of the tensor's dtype, from row `first_row` on."""
        shape, dtype = self._tensors[name]
        # No compression: weights hardly shrink, and it would take most of the time.
        spec = {"driver": "zarr", "kvstore": {**self._database, "path": f"{name}/"},
                "store_data_equal_to_fill_value": True,
                "metadata": {"shape": list(shape), "chunks": [block_rows(shape), *shape[1:]], "compressor": None,
                             "dtype": dtype.name if dtype.kind == "V" or dtype.itemsize == 1 else dtype.str}}
        array = tensorstore.open(spec, open=True, create=True, context=self._context,
                                 transaction=self._transaction).result()
        array[first_row:first_row + len(rows)].write(rows).result()
        self._waiting += rows.nbytes + _PENDING_BYTES
        self._left -= rows.nbytes
        if self._waiting >= _COMMIT_BYTES:
            self._commit()

    def _commit(self) -> None:
        self._transaction.commit_sync()
        self._transaction, self._waiting = tensorstore.Transaction(), 0

    def finish(self) -> None:
        """Commits, and writes Orbax's own description of the tree.

        Raises:
          RuntimeError: fewer bytes were written than the tensors have.
        """
        self._commit()
        if self._left:
            raise RuntimeError(f"{self._left} bytes of the tensors were not written")
        self._describe()
        handler = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
        (self._folder / "_CHECKPOINT_METADATA").write_text(json.dumps({
            "item_handlers": handler, "metrics": {}, "performance_metrics": {}, "custom_metadata": {},
            "init_timestamp_nsecs": self._began, "commit_timestamp_nsecs": time.time_ns()}))

    def _describe(self) -> None:
        """Writes the tree's description, tensor by tensor: of many tensors it would be large in memory."""
        about = {"use_ocdbt": True, "use_zarr3": False, "store_array_data_equal_to_fill_value": True,
                 "custom_metadata": None}
        with (self._folder / "_METADATA").open("w") as file:
            file.write(json.dumps(about)[:-1] + ', "tree_metadata": {')
            for number, name in enumerate(self._tensors):
                entry = {"key_metadata": [{"key": name, "key_type": 2}],
                         "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False}}
                file.write(f'{", " if number else ""}{json.dumps(str((name,)))}: {json.dumps(entry)}')
            file.write("}}")

    def close(self) -> None:
        """Drops what was not committed; also after an error."""
        self._transaction.abort()
