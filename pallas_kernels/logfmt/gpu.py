"""The Hopper backend: tiles of 128 rows at a time through shared memory, each read from device memory once.

Blocks of 128 threads stay on their multiprocessor and walk over squares of 128 rows by 128 columns, with the copies of
the next on their way by TMA, which fills with zeros what lies past the edge of x and does not write there. A thread has
one row of the square, so one tile: it finds the tile's ends alone, without a word to other threads, and holds all its
codes, so packing is shifts in its own registers: of 16 columns at a time, since a byte of a 4-bit plane has codes of
every fourth such piece, of a 2-bit plane of every second, and of a 1-bit plane of all eight.

Logarithms and powers are the card's own, lg2.approx and ex2.approx. A number costs one of each to encode and one power
to decode. Ends travel as [tiles, rows], contiguous for the threads that hold them, and XLA transposes that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.logfmt.reference import (
    TILE,
    Ends,
    codes_of,
    ends_of,
    ladder_of,
    largest_and_smallest,
    planes,
    step_of,
    values_of,
)

SHARED_BYTES = 227 * 1024
"""Of one multiprocessor, for all its blocks of threads."""
RESIDENT = 2
"""Blocks of threads on a multiprocessor: one computes while the other waits."""
PIECE = 16
"""Columns at a time: 16 bytes of codes are one access to shared memory."""
ORDER = (0, 4, 2, 6, 1, 5, 3, 7)
"""Of the pieces of a tile: bytes fill up early, and registers are free again."""

Ref = Any


def misfit(rows: int, width: int, bits: int, dtype: jnp.dtype) -> str:
    """What the kernels need and x [..., rows, width] is not; empty if it is served."""
    del dtype
    # TMA cuts memory into 8 rows by 32 bytes or more, and copies ends by 16 bytes.
    if not rows * width or rows % 8 or width % 32:
        return "rows divisible by 8 and columns by 32"
    return "an even number of tiles for an odd number of bits" if pl.cdiv(width, TILE) * bits % 2 else ""


def encode(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """See `api.encode`."""
    x_MK = x.reshape(-1, x.shape[-1])
    rows, width = x_MK.shape
    tiles = pl.cdiv(width, TILE)
    results = [jax.ShapeDtypeStruct((rows, tiles * TILE // 8 * bits), jnp.uint8),
               *[jax.ShapeDtypeStruct((tiles, rows), jnp.float32)] * 2]
    packed, smallest, largest = _call(
        "logfmt_encode", functools.partial(_encode, bits=bits), [x_MK], [_square_of(0, width, x.dtype)], results,
        [*_planes_of(1, tiles, bits), *_ends_at(2)], (pl.cdiv(rows, TILE), tiles))
    ends = jnp.concatenate([smallest, largest]).T.astype(x.dtype)
    return packed.reshape(*x.shape[:-1], -1), ends.reshape(*x.shape[:-1], -1)


def decode(codes: jax.Array, ends: jax.Array, bits: int, width: int, dtype: jnp.dtype) -> jax.Array:
    """See `api.decode`."""
    lead, tiles = codes.shape[:-1], pl.cdiv(width, TILE)
    packed = codes.reshape(-1, codes.shape[-1])
    smallest, largest = jnp.split(ends.reshape(-1, 2 * tiles).astype(jnp.float32).T, 2)
    x_MK, = _call(
        "logfmt_decode", functools.partial(_decode, bits=bits), [packed, smallest, largest],
        [*_planes_of(0, tiles, bits), *_ends_at(1)], [jax.ShapeDtypeStruct((len(packed), width), dtype)],
        [_square_of(3, width, dtype)], (pl.cdiv(len(packed), TILE), tiles))
    return x_MK.reshape(*lead, width)


def _vectors(dtype: Any) -> Any:
    """A thread for each row, and 16 bytes of it at once."""
    return plgpu.Layout.TCGEN05_TMEM_NATIVE(16 // jnp.dtype(dtype).itemsize)


def _load(source: Ref, piece: int) -> jax.Array:
    """16 columns; of the swizzled 128 bytes around them what is not used is not loaded."""
    columns = min(128 // jnp.dtype(source.dtype).itemsize, source.shape[1])
    start, offset = divmod(piece * PIECE, columns)
    around = plgpu.load(source.at[:, pl.ds(start * columns, columns)], layout=_vectors(source.dtype))
    return around[:, offset:offset + PIECE]


def _store(target: Ref, pieces: list[jax.Array]) -> None:
    """All columns."""
    columns = min(128 // jnp.dtype(target.dtype).itemsize, target.shape[1])
    for start in range(0, target.shape[1], columns):
        part = pieces[start // PIECE:(start + columns) // PIECE]
        target[:, pl.ds(start, columns)] = jnp.concatenate(part, axis=1)


def _cast(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return plgpu.layout_cast(x, _vectors(dtype)).astype(dtype)


def _spread(per_row: Any) -> Any:
    """Each row's numbers -> beside all columns of a piece."""
    return jax.tree.map(lambda x: jax.lax.broadcast_in_dim(x, (TILE, PIECE), (0,)), per_row)


def _encode(sources: list[Ref], results: list[Ref], bits: int) -> None:
    source, *targets, smallest, largest = *sources, *results
    ends = _find_ends(source)
    smallest[...], largest[...] = ends
    ladder = _spread(ladder_of(ends, bits))
    filling: dict[tuple[int, int], jax.Array] = {}
    for piece in ORDER:
        codes = codes_of(_load(source, piece).astype(jnp.float32), ladder, bits)
        for plane in planes(bits):
            part, column = divmod(piece, plane.bits)
            key, shifted = (plane.shift, column), plane.part(codes) << plane.bits * part
            filling[key] = filling[key] | shifted if part else shifted
            if part == plane.parts - 1:
                filling[key] = _cast(filling[key], jnp.uint8)
    for plane, target in zip(planes(bits), targets, strict=True):
        _store(target, [filling[plane.shift, column] for column in range(plane.bits)])


def _find_ends(source: Ref) -> Ends:
    """Of each row."""
    found = [largest_and_smallest(_load(source, piece).astype(jnp.float32)) for piece in range(TILE // PIECE)]
    largest, smallest = zip(*found, strict=True)
    return ends_of(functools.reduce(jnp.maximum, largest), functools.reduce(jnp.minimum, smallest))


def _decode(sources: list[Ref], results: list[Ref], bits: int) -> None:
    *held, smallest, largest, target = *sources, *results
    row = _vectors(jnp.uint8).reduce(1)
    ends = Ends(*(plgpu.load(end, layout=row, optimized=False) for end in (smallest, largest)))
    step, ends = _spread(step_of(ends, bits)), _spread(ends)
    values = []
    for piece in range(TILE // PIECE):
        codes = jnp.zeros((TILE, PIECE), jnp.int32)
        for plane, source in zip(planes(bits), held, strict=True):
            part, column = divmod(piece, plane.bits)
            bytes_ = _load(source, column).astype(jnp.int32)
            codes |= (bytes_ >> plane.bits * part & (1 << plane.bits) - 1) << plane.shift
        values.append(_cast(values_of(codes, ends, bits, step), target.dtype))
    _store(target, values)


class _Part(NamedTuple):
    """A part of a square's inputs or results: of which array, its shared memory, and where it lies in the array."""

    array: int
    bytes: int
    slots: Callable[[int], Any]
    """How many -> shared memory."""
    at: Callable[[Any, Any], tuple]
    """(row, column) of the square -> index."""


def _block(i: Any) -> Any:
    return pl.ds(i * TILE, TILE)


def _square_of(array: int, width: int, dtype: jnp.dtype) -> _Part:
    return _Part(array, TILE * TILE * dtype.itemsize,
                 lambda slots: hopper.swizzled((slots, TILE, TILE), dtype, beyond=width),
                 lambda row, column: (_block(row), _block(column)))


def _planes_of(array: int, tiles: int, bits: int) -> list[_Part]:
    """Of packed codes [rows, tiles * 16 n]."""
    parts, total = [], tiles * TILE // 8 * bits
    for plane in planes(bits):
        size, first = plane.tile_bytes, plane.place(tiles * TILE)
        parts.append(_Part(
            array, TILE * size, functools.partial(_plane_slots, size=size, common=math.gcd(total, first)),
            functools.partial(_plane_at, size=size, first=first)))
    return parts


def _plane_at(row: Any, column: Any, size: int, first: int) -> tuple:
    return _block(row), pl.ds(first + column * size, size)


def _plane_slots(slots: int, size: int, common: int) -> Any:
    """Swizzled in pieces that divide where the plane begins and where codes end. No swizzle is as narrow as 1-bit
    planes."""
    if size == PIECE:
        return plgpu.SMEM((slots, TILE, size), jnp.uint8)
    piece = math.gcd(size, common)
    # mypy takes a method of jax's base class for an abstract one.
    tiling = plgpu.TilingTransform((8, piece))  # type: ignore[abstract]
    swizzle = plgpu.SwizzleTransform(piece)  # type: ignore[abstract]
    return plgpu.SMEM((slots, TILE, size), jnp.uint8, transforms=(tiling, swizzle))


def _ends_at(array: int) -> list[_Part]:
    """Smallest and largest, float32 [tiles, rows] each."""
    return [_Part(array + i, 4 * TILE, lambda slots: plgpu.SMEM((slots, TILE), jnp.float32),
                  lambda row, column: (column, _block(row))) for i in range(2)]


def _residence(in_bytes: int, out_bytes: int) -> tuple[int, int]:
    """(slots for inputs, slots for results): the most that let RESIDENT blocks of threads share a multiprocessor."""
    rest = 4096  # barriers, the compiler's own, and 1 KiB that the system takes
    for slots in ((2, 2), (2, 1)):
        if RESIDENT * (slots[0] * in_bytes + slots[1] * out_bytes + rest) <= SHARED_BYTES:
            return slots
    return 1, 1


def _call(name: str, compute: Callable[[list[Ref], list[Ref]], None], arrays: Sequence[jax.Array],
          inputs: Sequence[_Part], results: Sequence[jax.ShapeDtypeStruct], outputs: Sequence[_Part],
          squares: tuple[int, int]) -> Sequence[jax.Array]:
    """Runs `compute(inputs of a square, its outputs)` over so many squares down and across."""
    down, across = squares
    in_slots, out_slots = _residence(*(sum(part.bytes for part in parts) for parts in (inputs, outputs)))
    blocks = min(down * across, RESIDENT * hopper.MULTIPROCESSORS)

    def body(*refs: Ref) -> None:
        gmem, buffers, full = refs[:len(arrays) + len(results)], refs[len(arrays) + len(results):-1], refs[-1]
        first = jax.lax.axis_index("block")
        steps = jax.lax.div(down * across - first + (blocks - 1), jnp.int32(blocks))

        def slot_of(step: Any, slots: int) -> jax.Array:
            return jax.lax.rem(step, jnp.int32(slots))

        def place(part: _Part, step: Any) -> Ref:
            square = first + step * blocks
            where = part.at(jax.lax.div(square, jnp.int32(across)), jax.lax.rem(square, jnp.int32(across)))
            return gmem[part.array].at[where]

        def fetch(step: Any) -> None:
            slot = slot_of(step, in_slots)
            for part, buffer in zip(inputs, buffers[:len(inputs)], strict=True):
                plgpu.copy_gmem_to_smem(place(part, step), buffer.at[slot], full.at[slot])

        jax.lax.fori_loop(0, jnp.minimum(steps, in_slots), lambda step, _: fetch(step), None)

        @pl.loop(0, steps)
        def _(step):
            slot = slot_of(step, in_slots)
            out = [buffer.at[slot_of(step, out_slots)] for buffer in buffers[len(inputs):]]
            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(out_slots - 1, wait_read_only=True)
            compute([buffer.at[slot] for buffer in buffers[:len(inputs)]], out)
            plgpu.commit_smem()
            for i, part in enumerate(outputs):
                plgpu.copy_smem_to_gmem(out[i], place(part, step), commit_group=i == len(outputs) - 1)

            @pl.when(step + in_slots < steps)
            def _():
                fetch(step + in_slots)
        plgpu.wait_smem_to_gmem(0)
    body.__name__ = name
    return plgpu.kernel(
        body, out_type=list(results), grid=(blocks,), grid_names=("block",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        scratch_types=[*(part.slots(in_slots) for part in inputs), *(part.slots(out_slots) for part in outputs),
                       plgpu.Barrier(num_arrivals=len(inputs), num_barriers=in_slots)])(*arrays)
