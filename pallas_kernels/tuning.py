"""Which tile of the output a Hopper float8 kernel takes: measured where it was, else by a rule.

The rule takes the tile with the least predicted time: turns of the whole card times what a tile takes. A step of 128
terms takes as long as the tensor cores need, or as its blocks take to arrive from L2; a tile also takes a while to
start and to be written. The rates of L2 and of a tile's ends are guesses: a measurement goes before the rule.

Measurements are in `tuned.json`, by device and shape; `experiments/bench_kernels.py --tune` adds to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import jax

from pallas_kernels import hopper
from pallas_kernels.hopper import Tile
from pallas_kernels.targets import device_kind

Operation = Literal["product", "gradient"]

FLOPS_PER_CLOCK, BYTES_PER_CLOCK, CLOCKS_PER_TILE = 8192, 48, 1500
"""Of a multiprocessor: float8 in its tensor cores, from L2, and outside of a tile's steps."""

_FOR_ANY = ((128, 128), (128, 64), (64, 256), (64, 128), (64, 64))
CANDIDATES: dict[Operation, tuple[tuple[int, int], ...]] = {"product": ((128, 192), *_FOR_ANY), "gradient": _FOR_ANY}
"""Rows and columns. The float32 sum and the tensor cores' accumulator share a thread's registers, so a consumer has at
most 64 rows of 192 columns, and of 128 where the columns have scales of their own."""

SHARED_BYTES = 227 * 1024 - 1024
"""Of a block of threads, without its barriers."""


@dataclasses.dataclass(frozen=True)
class Key:
    """What a measured tile was measured for."""

    operation: Operation
    rows: int
    columns: int
    terms: int
    groups: int = 1


TABLE = Path(__file__).with_name("tuned.json")
"""By device kind, as JAX names it ("NVIDIA H100 80GB HBM3"): a `Key` and the rows and columns of the tile that was
fastest there, as a list of JSON objects."""

_only: dict[Operation, tuple[int, int]] = {}


def tile_for(operation: Operation, rows: int, columns: int, terms: int, groups: int = 1, *,
             whole: bool = False) -> Tile | None:
    """The tile for a product [rows, terms] by [terms, columns], or for as many as there are groups.

    `rows` are those of all groups for a "product" and of each for a "gradient", `terms` those of all groups for the
    latter. `whole` leaves out tiles that would reach past the end; None if there is no other.
    """
    key = Key(operation, rows, columns, terms, groups)
    measured = measurements(device_kind("gpu", "NVIDIA H100 80GB HBM3")).get(key)
    candidates = candidates_for(key, whole)
    if not candidates:
        return None
    if operation in _only:
        shape = _only[operation]
    elif measured in candidates:
        shape = measured
    else:
        shape = min(candidates, key=lambda shape: predicted_clocks(operation, rows, columns, terms, groups, shape))
    return Tile(*shape, slots(operation, *shape))


def candidates_for(key: Key, whole: bool) -> list[tuple[int, int]]:
    """The tiles to choose from."""
    return [shape for shape in CANDIDATES[key.operation]
            if not whole or key.rows % shape[0] == key.columns % shape[1] == 0]


def measurements(device: str) -> Mapping[Key, tuple[int, int]]:
    """What `TABLE` has for a kind of device."""
    return _read(TABLE).get(device, {})


@functools.cache
def _read(table: Path) -> dict[str, dict[Key, tuple[int, int]]]:
    def read(entry: dict) -> tuple[Key, tuple[int, int]]:
        rows, columns = entry.pop("tile")
        return Key(**entry), (rows, columns)
    return {device: dict(map(read, entries)) for device, entries in json.loads(table.read_text()).items()}


def remember(device: str, found: Mapping[Key, tuple[int, int]]) -> None:
    """Adds measurements to `TABLE`, in place of earlier ones of the same keys."""
    tables = {**_read(TABLE), device: {**measurements(device), **found}}
    lines = [f'  {json.dumps(name)}: [\n' + ",\n".join(
        f"    {json.dumps({**dataclasses.asdict(key), 'tile': tile})}" for key, tile in entries.items()) + "\n  ]"
        for name, entries in tables.items()]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    _read.cache_clear()


@contextlib.contextmanager
def only(operation: Operation, shape: tuple[int, int]) -> Iterator[None]:
    """Inside, every kernel of `operation` takes this tile. JAX, which keeps what it has traced, forgets it on both
    sides."""
    _only[operation] = shape
    jax.clear_caches()
    try:
        yield
    finally:
        del _only[operation]
        jax.clear_caches()


def predicted_clocks(operation: Operation, rows: int, columns: int, terms: int, groups: int,
                     shape: tuple[int, int], itemsize: int = 1) -> float:
    """The rule above. bfloat16, of itemsize 2, is multiplied at half the rate of float8."""
    tiles = -(-rows // shape[0]) * -(-columns // shape[1])
    if operation == "gradient":
        tiles, terms = groups * tiles, terms // groups
    loaded = 128 * (min(rows, shape[0]) + min(columns, shape[1]))
    step = max(2 * 128 * shape[0] * shape[1] / FLOPS_PER_CLOCK, loaded / BYTES_PER_CLOCK)
    return -(-tiles // hopper.MULTIPROCESSORS) * (itemsize * terms / 128 * step + CLOCKS_PER_TILE)


def slots(operation: Operation, rows: int, columns: int) -> int:
    """As many as fit beside the two pieces of each consumer through which results leave; more than 8 help no more."""
    scales = rows + columns if operation == "gradient" else rows
    return min(8, (SHARED_BYTES - hopper.CONSUMERS * 2 * 64 * 128) // (128 * (rows + columns) + 4 * scales))
