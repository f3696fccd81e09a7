"""The TPU backend: one read of x, one write of the values and scales.

A step takes whole rows: 128 of them where tiles or the transposed result need as many, else as many as fill a block.
It walks over squares of 128 columns, which stay in registers. The scales of a row's tiles are computed together, after
all magnitudes are known, since one tile's alone would fill registers with copies of itself. Rows past the edge are
masked where they would count in a scale; elsewhere they are computed and not written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantise.reference import TILE, Tile, scale_and_inverse, silu_times

BLOCK_BYTES = 2 ** 21
"""Of x in one step, where rows can be chosen: enough for the copies to run at full speed."""
LARGEST_BLOCK_BYTES = 2 ** 23
VMEM_BYTES = 48 * 2 ** 20
"""What a kernel may use: two of the largest blocks of x, and two of each result."""
FP8 = jnp.float8_e4m3fn

Ref = Any


def misfit(operation: str, shape: tuple[int, ...], dtype: jnp.dtype, tile: Tile) -> str:
    """What `operation` needs and x [..., M, K] of this shape is not; empty if it is served."""
    matrices, rows, width = math.prod(shape[:-2]), *shape[-2:]
    if tile is None or not matrices * rows * width:
        return "tiles, and some rows"
    if matrices > 1 and operation in ("quantise_transposed", "quantise_both"):
        return "one matrix"
    if matrices > 1 and rows % tile[0]:  # they are stacked to one
        return f"matrices of rows divisible by {tile[0]}"
    if operation == "swiglu_quantise" and width % (2 * TILE):  # the halves must begin where registers do
        return "F divisible by 128"
    if min(matrices * rows, TILE if tile[0] > 1 else 32) * width * dtype.itemsize > LARGEST_BLOCK_BYTES:
        return f"a block of rows in {LARGEST_BLOCK_BYTES} bytes"
    return ""


def quantise(x: jax.Array, tile: tuple[int, int], power_of_two: bool, *, interpret: Any = False) -> tuple:
    """See `api.quantise`."""
    x_MK = x.reshape(-1, x.shape[-1])
    (rows, width), block = x_MK.shape, _block_rows(x_MK, tile[0])
    across = pl.cdiv(width, tile[1])
    if tile == (TILE, 1):
        body = functools.partial(_by_columns, rows=rows, power_of_two=power_of_two)
    else:
        body = functools.partial(_by_squares, axis=1 if tile[0] == 1 else None, rows=rows, power_of_two=power_of_two)
    scales_of_rows = _by_row(rows, across, block, jnp.float32) if tile[0] == 1 else _by_step(rows, across)
    values, scales = _call(body, "quantise", pl.cdiv(rows, block), [_by_row(rows, width, block, x.dtype)], [x_MK],
                           [_by_row(rows, width, block, FP8), scales_of_rows], interpret)
    return values.reshape(x.shape), scales.reshape(*x.shape[:-2], -1, across)


def quantise_transposed(x: jax.Array, power_of_two: bool, *, interpret: Any = False) -> tuple:
    """See `api.quantise_transposed`."""
    return _transposing(x, power_of_two, False, interpret)[-1]


def quantise_both(x: jax.Array, power_of_two: bool, *, interpret: Any = False) -> tuple:
    """See `api.quantise_both`."""
    return _transposing(x, power_of_two, True, interpret)


def swiglu_quantise(gate_up: jax.Array, power_of_two: bool, *, interpret: Any = False) -> tuple:
    """See `api.swiglu_quantise`."""
    x_PF2 = gate_up.reshape(-1, gate_up.shape[-1])
    rows, width = x_PF2.shape[0], x_PF2.shape[1] // 2
    block, across = _block_rows(x_PF2, 1), width // TILE
    halves = [_Operand((rows, width), x_PF2.dtype, pl.BlockSpec((block, width), lambda i, half=half: (i, half)))
              for half in range(2)]
    values, scales = _call(functools.partial(_swiglu, rows=rows, power_of_two=power_of_two), "swiglu_quantise",
                           pl.cdiv(rows, block), halves, [x_PF2, x_PF2],
                           [_by_row(rows, width, block, FP8), _by_row(rows, across, block, jnp.float32)], interpret,
                           scratch_shapes=[pltpu.VMEM((block, width), x_PF2.dtype)])
    return values.reshape(*gate_up.shape[:-1], width), scales.reshape(*gate_up.shape[:-1], across)


def _transposing(x: jax.Array, power_of_two: bool, by_rows: bool, interpret: Any) -> tuple:
    x_MK = x.reshape(x.shape[-2:])
    (rows, width), block = x_MK.shape, min(x_MK.shape[0], TILE)
    results = [_Operand((width, rows), FP8, pl.BlockSpec((width, block), lambda i: (0, i))), _by_step(rows, width)]
    if by_rows:
        results += [_by_row(rows, width, block, FP8), _by_row(rows, pl.cdiv(width, TILE), block, jnp.float32)]
        body: Callable = _both
    else:
        body = functools.partial(_by_columns, transpose=True)
    values_T, scales_T, *both = _call(
        functools.partial(body, rows=rows, power_of_two=power_of_two),
        "quantise_both" if by_rows else "quantise_transposed", pl.cdiv(rows, block),
        [_by_row(rows, width, block, x.dtype)], [x_MK], results, interpret)
    # XLA transposes these: a step has one column of the result, and blocks have 128.
    scales_T = scales_T.reshape(-1, width).T
    pairs = ((values_T, scales_T),) if not both else (tuple(both), (values_T, scales_T))
    return tuple(tuple(a.reshape(*x.shape[:-2], *a.shape) for a in pair) for pair in pairs)


class _Operand(NamedTuple):
    """An array and how the steps of the kernel share it."""

    shape: tuple[int, ...]
    dtype: Any
    spec: pl.BlockSpec


def _by_row(rows: int, width: int, block: int, dtype: Any) -> _Operand:
    """`block` whole rows a step."""
    return _Operand((rows, width), dtype, pl.BlockSpec((block, width), lambda i: (i, 0)))


def _by_step(rows: int, width: int) -> _Operand:
    """The scales of tiles of 128 rows: a row a step, in a dimension of its own, since blocks have 8 rows or all."""
    return _Operand((pl.cdiv(rows, TILE), 1, width), jnp.float32, pl.BlockSpec((1, 1, width), lambda i: (i, 0, 0)))


def _call(body: Callable, name: str, steps: int, operands: list[_Operand], arrays: list[jax.Array],
          results: list[_Operand], interpret: Any, **more: Any) -> list:
    return pl.pallas_call(
        body, name=name, grid=(steps,), in_specs=[operand.spec for operand in operands],
        out_specs=[result.spec for result in results],
        out_shape=[jax.ShapeDtypeStruct(result.shape, result.dtype) for result in results], interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES),
        **more)(*arrays)


def _block_rows(x_MK: jax.Array, tile_rows: int) -> int:
    """A multiple of 32, the rows of float8 in one register, or all rows."""
    fitting = BLOCK_BYTES // (x_MK.shape[1] * x_MK.dtype.itemsize) // 32 * 32
    return min(x_MK.shape[0], TILE if tile_rows > 1 else max(fitting, 32))


def _each_square(width: int, step: Callable[[Any, Any, Any], Any], carry: Any = None) -> Any:
    """`carry = step(i, columns, carry)` for 128 columns after the other; the last may be fewer."""
    def columns(i: jax.Array, carry: Any) -> Any:
        return step(i, pl.ds(pl.multiple_of(i * TILE, TILE), TILE), carry)
    full = width // TILE
    carry = jax.lax.fori_loop(0, full, columns, carry)
    return carry if width % TILE == 0 else step(full, pl.ds(full * TILE, width % TILE), carry)


def _rows_here(x: Ref, rows: int) -> Any:
    """How many rows of the block are rows of the array; None if all are, whichever the step."""
    return None if rows % x.shape[0] == 0 else rows - pl.program_id(0) * x.shape[0]


def _square(x: Ref, at: Any, rows: Any = None) -> jax.Array:
    """float32 of up to 128 columns, with zeros after the first `rows`."""
    square = x[:, at].astype(jnp.float32)
    return square if rows is None else jnp.where(jax.lax.broadcasted_iota(jnp.int32, square.shape, 0) < rows, square, 0)


def _largest(x: jax.Array, axis: int | None) -> jax.Array:
    """The largest magnitude, infinite for NaN: a maximum of float32, which these cores can take across lanes, may lose
    NaN."""
    return jnp.max(jnp.where(x == x, jnp.abs(x), jnp.inf), axis=axis, keepdims=True)


def _scales(largest: jax.Array, power_of_two: bool) -> tuple[jax.Array, jax.Array]:
    return scale_and_inverse(jax.lax.bitcast_convert_type(largest, jnp.int32), power_of_two)


def _by_columns(x: Ref, values: Ref, scales: Ref, *, rows: int, power_of_two: bool, transpose: bool = False) -> None:
    """Tiles of 128x1, or as many rows as there are."""
    here = _rows_here(x, rows)

    def step(i: jax.Array, at: Any, _: None) -> None:
        square = _square(x, at, here)
        scales[0, :, at], inverse = _scales(_largest(square, 0), power_of_two)
        if transpose:
            values[at, :] = (square * inverse).T.astype(FP8)
        else:
            values[:, at] = (square * inverse).astype(FP8)
    _each_square(x.shape[1], step)


def _by_squares(x: Ref, values: Ref, scales: Ref, *, axis: int | None, rows: int, power_of_two: bool) -> None:
    """Tiles of 128 columns: of each row where `axis` is 1, of all rows where it is None."""
    here = _rows_here(x, rows) if axis is None else None
    tile = jax.lax.broadcasted_iota(jnp.int32, scales.shape[-2:], 1)

    def measure(i: jax.Array, at: Any, largest: jax.Array) -> jax.Array:
        return jnp.where(tile == i, _largest(_square(x, at, here), axis), largest)
    scale, inverse = _scales(_each_square(x.shape[1], measure, jnp.zeros(tile.shape, jnp.float32)), power_of_two)
    scales[...] = scale.reshape(scales.shape)

    def write(i: jax.Array, at: Any, _: None) -> None:
        mine = jnp.sum(jnp.where(tile == i, inverse, 0), axis=1, keepdims=True)
        values[:, at] = (_square(x, at) * mine).astype(FP8)
    _each_square(x.shape[1], write)


def _both(x: Ref, values_T: Ref, scales_T: Ref, values: Ref, scales: Ref, *, rows: int, power_of_two: bool) -> None:
    _by_columns(x, values_T, scales_T, rows=rows, power_of_two=power_of_two, transpose=True)
    _by_squares(x, values, scales, axis=1, rows=rows, power_of_two=power_of_two)


def _swiglu(gate: Ref, up: Ref, values: Ref, scales: Ref, product: Ref, *, rows: int, power_of_two: bool) -> None:
    def multiply(i: jax.Array, at: Any, _: None) -> None:
        product[:, at] = silu_times(_square(gate, at), _square(up, at)).astype(product.dtype)
    _each_square(gate.shape[1], multiply)
    _by_squares(product, values, scales, axis=1, rows=rows, power_of_two=power_of_two)
