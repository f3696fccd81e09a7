"""The TPU backend: one read of x, one write of codes and ends; and the reverse.

A step takes whole rows, 32 of them at a time, and walks over tiles of 128 columns, each a few registers. What the codes
of a tile need to know of it is computed for all tiles of a row together: one tile's alone would fill registers with
copies of itself. Bytes of planes of fewer than 8 bits are put together in three rotations of the lanes at most, which
is less work than the logarithm: by 64, and the lanes there are shifted over these, then by 32, then by 16. As many
tiles as fill a register's 128 lanes are one store.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.logfmt.reference import (
    SMALLEST,
    TILE,
    Ends,
    Plane,
    codes_of,
    ends_of,
    ladder_of,
    planes,
    step_of,
    values_of,
)

CHUNK = 32
"""Rows at a time: those of 8-bit numbers in one register."""
BLOCK_BYTES = 2 ** 21
"""Of x in one step: enough for the copies to run at full speed."""
LARGEST_BLOCK_BYTES = 2 ** 23
VMEM_BYTES = 48 * 2 ** 20
"""What a kernel may use: two blocks of x, and two of the codes and ends."""

Ref = Any


def misfit(rows: int, width: int, bits: int, dtype: jnp.dtype) -> str:
    """What the kernels need and x [..., rows, width] is not; empty if it is served."""
    group = TILE * planes(bits)[-1].parts
    if not rows or width % group or not width:
        return f"some rows, and columns divisible by {group}, so that each plane's tiles fill registers"
    if min(rows, CHUNK) * width * dtype.itemsize > LARGEST_BLOCK_BYTES:
        return f"a block of rows in {LARGEST_BLOCK_BYTES} bytes"
    return ""


def encode(x: jax.Array, bits: int, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """See `api.encode`."""
    x_MK = x.reshape(-1, x.shape[-1])
    rows, width = x_MK.shape
    end = jax.ShapeDtypeStruct((rows, width // TILE), jnp.float32)
    packed, smallest, largest = _call(functools.partial(_encode, bits=bits), "logfmt_encode", x_MK, [x_MK],
                                      [jax.ShapeDtypeStruct((rows, width // 8 * bits), jnp.uint8), end, end], interpret)
    ends = jnp.concatenate([smallest, largest], axis=1).astype(x.dtype)
    return packed.reshape(*x.shape[:-1], -1), ends.reshape(*x.shape[:-1], -1)


def decode(codes: jax.Array, ends: jax.Array, bits: int, width: int, dtype: jnp.dtype, *,
           interpret: Any = False) -> jax.Array:
    """See `api.decode`."""
    packed = codes.reshape(-1, codes.shape[-1])
    smallest, largest = jnp.split(ends.reshape(len(packed), -1).astype(jnp.float32), 2, axis=1)
    out = jax.ShapeDtypeStruct((len(packed), width), dtype)
    x_MK, = _call(functools.partial(_decode, bits=bits), "logfmt_decode", out, [packed, smallest, largest], [out],
                  interpret)
    return x_MK.reshape(*codes.shape[:-1], width)


def _call(body: Callable, name: str, x_MK: Any, arrays: list[jax.Array], results: list[jax.ShapeDtypeStruct],
          interpret: Any) -> list:
    rows, width = x_MK.shape
    fitting = BLOCK_BYTES // (width * x_MK.dtype.itemsize) // CHUNK * CHUNK
    block = min(rows, max(fitting, CHUNK))

    def spec(array: Any) -> pl.BlockSpec:
        return pl.BlockSpec((block, array.shape[1]), lambda i: (i, 0))
    return pl.pallas_call(
        body, name=name, grid=(pl.cdiv(rows, block),), in_specs=[spec(array) for array in arrays],
        out_specs=[spec(result) for result in results], out_shape=results, interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES))(*arrays)


def _encode(x: Ref, packed: Ref, smallest: Ref, largest: Ref, *, bits: int) -> None:
    def chunk(rows: Any) -> None:
        def measure(i: jax.Array, carry: Ends) -> Ends:
            square = x[rows, _columns(i)].astype(jnp.float32)
            # A maximum of float32, which these cores can take across lanes, may lose NaN.
            magnitude = jnp.where(square == square, jnp.abs(square), jnp.inf)
            high = jnp.max(magnitude, axis=1, keepdims=True)
            low = jnp.min(jnp.where(magnitude >= SMALLEST, magnitude, jnp.inf), axis=1, keepdims=True)
            return Ends(*(jnp.where(tile == i, new, old) for new, old in zip((low, high), carry, strict=True)))
        tile = jax.lax.broadcasted_iota(jnp.int32, (rows.size, x.shape[1] // TILE), 1)
        none = jnp.zeros(tile.shape, jnp.float32)
        low, high = jax.lax.fori_loop(0, x.shape[1] // TILE, measure, Ends(none, none))
        ends = ends_of(high, low)
        smallest[rows], largest[rows] = ends
        ladder = ladder_of(ends, bits)

        def codes(i: jax.Array) -> jax.Array:
            return codes_of(x[rows, _columns(i)].astype(jnp.float32), _of_tile(ladder, tile == i), bits)
        _each_group(x.shape[1], bits, lambda first, tiles: _write_group(
            packed, rows, first, [codes(first + b) for b in range(tiles)], bits))
    _each_chunk(x.shape[0], chunk)


def _decode(packed: Ref, smallest: Ref, largest: Ref, x: Ref, *, bits: int) -> None:
    def chunk(rows: Any) -> None:
        ends = Ends(smallest[rows], largest[rows])
        known = (ends, step_of(ends, bits))
        tile = jax.lax.broadcasted_iota(jnp.int32, ends.largest.shape, 1)

        def group(first: Any, tiles: int) -> None:
            for b, codes in enumerate(_read_group(packed, rows, first, tiles, bits)):
                mine, step = _of_tile(known, tile == first + b)
                x[rows, _columns(first + b)] = values_of(codes, mine, bits, step).astype(x.dtype)
        _each_group(x.shape[1], bits, group)
    _each_chunk(x.shape[0], chunk)


def _each_chunk(rows: int, step: Callable[[Any], None]) -> None:
    """`step(rows)` for 32 rows after the other; the last may be fewer."""
    full = rows // CHUNK

    @pl.loop(0, full)
    def _(i):
        step(pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK))
    if rows % CHUNK:
        step(pl.ds(full * CHUNK, rows % CHUNK))


def _each_group(width: int, bits: int, step: Callable[[Any, int], None]) -> None:
    """`step(first tile, tiles)` for as many tiles as fill registers with each plane's bytes, one group after the
    other."""
    tiles = planes(bits)[-1].parts

    @pl.loop(0, width // (TILE * tiles))
    def _(i):
        step(i * tiles, tiles)


def _columns(i: Any, first: int = 0) -> Any:
    return pl.ds(pl.multiple_of(first + i * TILE, TILE), TILE)


def _of_tile(per_tile: Any, here: jax.Array) -> Any:
    """Of float32 [rows, tiles] the tile that is `here`, [rows, 1]. NaN may not be multiplied with zero."""
    return jax.tree.map(lambda x: jnp.sum(jnp.where(here, x, 0), axis=1, keepdims=True), per_tile)


def _write_group(packed: Ref, rows: Any, first: Any, codes: list[jax.Array], bits: int) -> None:
    """Bytes of these tiles' codes, to each plane."""
    width = packed.shape[1] * 8 // bits
    for plane in planes(bits):
        for start in range(0, len(codes), plane.parts):
            bytes_ = _join([plane.part(x) for x in codes[start:start + plane.parts]], plane)
            at = _columns(jax.lax.div(first + start, jnp.int32(plane.parts)), plane.place(width))
            packed[rows, at] = bytes_.astype(jnp.uint8)


def _join(parts: list[jax.Array], plane: Plane) -> jax.Array:
    """Numbers of `plane.bits` bits, [rows, 128] of each tile -> bytes [rows, 128], the first tile's first."""
    block = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 1), jnp.int32(plane.tile_bytes))
    joined = parts[0]
    for i, part in enumerate(parts):
        lanes = TILE // 2
        while lanes >= plane.tile_bytes:  # those a distance away are shifted over these
            part |= pltpu.roll(part, TILE - lanes, 1) << lanes // 16
            lanes //= 2
        joined = part if i == 0 else jnp.where(block == i, pltpu.roll(part, i * plane.tile_bytes, 1), joined)
    return joined


def _read_group(packed: Ref, rows: Any, first: Any, tiles: int, bits: int) -> list[jax.Array]:
    """Codes of these tiles, [rows, 128] each."""
    width = packed.shape[1] * 8 // bits
    codes = [jnp.zeros((rows.size, TILE), jnp.int32)] * tiles
    for plane in planes(bits):
        for start in range(0, tiles, plane.parts):
            at = _columns(jax.lax.div(first + start, jnp.int32(plane.parts)), plane.place(width))
            parts = _split(packed[rows, at].astype(jnp.int32), plane)
            for b, part in enumerate(parts, start):
                codes[b] |= part << plane.shift
    return codes


def _split(bytes_: jax.Array, plane: Plane) -> list[jax.Array]:
    """The reverse of `_join`."""
    lane = jax.lax.broadcasted_iota(jnp.int32, bytes_.shape, 1)
    parts = []
    for i in range(plane.parts):
        part = pltpu.roll(bytes_, TILE - i * plane.tile_bytes, 1) if i else bytes_
        lanes = plane.tile_bytes
        while lanes < TILE:
            part = jnp.where(lane & lanes != 0, pltpu.roll(part, lanes, 1) >> lanes // 16, part)
            lanes *= 2
        parts.append(part & (1 << plane.bits) - 1)
    return parts
