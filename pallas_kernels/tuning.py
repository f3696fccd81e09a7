"""Which tile of the output a Hopper float8 kernel takes: measured where it was, else by a rule.

The rule takes the tile with the least predicted time: turns of the whole card times what a tile takes. A step of 128
terms takes as long as the tensor cores need, or as its blocks take to arrive from L2; a tile also takes a while to
start and to be written. The rates of L2 and of a tile's ends are guesses: a measurement goes before the rule.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

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


MEASURED: dict[str, dict[Key, tuple[int, int]]] = {}
"""By device kind, as JAX names it ("NVIDIA H100 80GB HBM3"): rows and columns of the tile that was fastest there."""


def tile_for(operation: Operation, rows: int, columns: int, terms: int, groups: int = 1, *,
             whole: bool = False) -> Tile | None:
    """The tile for a product [rows, terms] by [terms, columns], or for as many as there are groups.

    `rows` are those of all groups for a "product" and of each for a "gradient", `terms` those of all groups for the
    latter. `whole` leaves out tiles that would reach past the end; None if there is no other.
    """
    device = device_kind("gpu", "NVIDIA H100 80GB HBM3")
    measured = MEASURED.get(device, {}).get(Key(operation, rows, columns, terms, groups))
    candidates = [shape for shape in ((measured,) if measured else CANDIDATES[operation])
                  if not whole or rows % shape[0] == columns % shape[1] == 0]
    if not candidates:
        return None
    shape = min(candidates, key=lambda shape: predicted_clocks(operation, rows, columns, terms, groups, shape))
    return Tile(*shape, slots(operation, *shape))


def predicted_clocks(operation: Operation, rows: int, columns: int, terms: int, groups: int,
                     shape: tuple[int, int]) -> float:
    """The rule above."""
    tiles = -(-rows // shape[0]) * -(-columns // shape[1])
    if operation == "gradient":
        tiles, terms = groups * tiles, terms // groups
    loaded = 128 * (min(rows, shape[0]) + min(columns, shape[1]))
    step = max(2 * 128 * shape[0] * shape[1] / FLOPS_PER_CLOCK, loaded / BYTES_PER_CLOCK)
    return -(-tiles // hopper.MULTIPROCESSORS) * (terms / 128 * step + CLOCKS_PER_TILE)


def slots(operation: Operation, rows: int, columns: int) -> int:
    """As many as fit beside the two pieces of each consumer through which results leave; more than 8 help no more."""
    scales = rows + columns if operation == "gradient" else rows
    return min(8, (SHARED_BYTES - hopper.CONSUMERS * 2 * 64 * 128) // (128 * (rows + columns) + 4 * scales))
