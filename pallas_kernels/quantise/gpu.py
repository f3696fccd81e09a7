"""The Hopper backend: squares of 128 x 128 through shared memory, each read from device memory once.

Blocks of 128 threads stay on their multiprocessor and walk over squares. The copies of the next squares are on their
way, by TMA, while one is quantised, and results leave by TMA too; it fills with zeros what lies past the edge of x, and
does not write there. In a square each thread holds one row, or one column where the result is transposed: it finds the
largest magnitude alone, without a word to other threads, has one scale, and writes 16 results at once.

A column is read from shared memory element by element (neighbouring threads have neighbouring elements) and written as
a row: that is the transpose. Scales leave as [tiles, rows], contiguous for the threads that hold them, and XLA
transposes that where a caller needs it.

XLA compiles the reference for the rest: (128, 128), since jax 0.12 lowers no maximum over threads to one number where
layouts are given by hand; (128, 1) that is not transposed, whose threads would write single bytes; and one scale for
all, which takes two reads in any case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.quantise.reference import TILE, Tile, magnitude_bits, scale_and_inverse, silu_times

SHARED_BYTES = 227 * 1024
"""Of one multiprocessor, for all its blocks of threads."""
SLOTS = 4
"""Squares of x on their way or in work, at most: more hide no latency."""
FP8 = jnp.float8_e4m3fn

Ref = Any


def misfit(operation: str, shape: tuple[int, ...], dtype: jnp.dtype, tile: Tile) -> str:
    """What `operation` needs and x [..., M, K] of this shape is not; empty if it is served."""
    del dtype
    matrices, rows, width = math.prod(shape[:-2]), *shape[-2:]
    if operation == "quantise" and tile != (1, TILE):
        return "tiles of (1, 128)"
    # TMA cuts memory into 8 rows by 32 bytes or more, of x and of float8, and copies scales by 16 bytes.
    if operation in ("quantise_transposed", "quantise_both"):
        return "" if rows * width and matrices == 1 and rows % 32 == width % 32 == 0 else "one matrix, M and K by 32"
    unit = 2 * TILE if operation == "swiglu_quantise" else 32
    if not matrices * rows * width or matrices * rows % 8 or width % unit:
        return f"rows divisible by 8 and columns by {unit}"
    return ""


def quantise(x: jax.Array, tile: Tile, power_of_two: bool) -> tuple:
    """See `api.quantise`; `tile` is (1, 128)."""
    del tile
    x_MK = x.reshape(-1, x.shape[-1])

    def compute(sources: list[Ref], results: list[Ref]) -> None:
        _by_rows(sources[0], results, power_of_two)
    values, scales = _call("quantise", compute, x_MK, [0], x_MK.shape[1], [_rows_of(*x_MK.shape)])
    return values.reshape(x.shape), scales.T.reshape(*x.shape[:-1], -1)


def quantise_transposed(x: jax.Array, power_of_two: bool) -> tuple:
    """See `api.quantise_transposed`."""
    x_MK = x.reshape(x.shape[-2:])

    def compute(sources: list[Ref], results: list[Ref]) -> None:
        _by_columns(sources[0], results, power_of_two)
    values, scales = _call("quantise_transposed", compute, x_MK, [0], x_MK.shape[1], [_columns_of(*x_MK.shape)])
    lead = x.shape[:-2]
    return values.reshape(*lead, *values.shape), scales.T.reshape(*lead, *scales.T.shape)


def quantise_both(x: jax.Array, power_of_two: bool) -> tuple:
    """See `api.quantise_both`."""
    x_MK = x.reshape(x.shape[-2:])

    def compute(sources: list[Ref], results: list[Ref]) -> None:
        _by_rows(sources[0], results[:2], power_of_two)
        _by_columns(sources[0], results[2:], power_of_two)
    values, scales, values_T, scales_T = _call("quantise_both", compute, x_MK, [0], x_MK.shape[1],
                                               [_rows_of(*x_MK.shape), _columns_of(*x_MK.shape)])
    return tuple(tuple(a.reshape(*x.shape[:-2], *a.shape) for a in pair)
                 for pair in ((values, scales.T), (values_T, scales_T.T)))


def swiglu_quantise(gate_up: jax.Array, power_of_two: bool) -> tuple:
    """See `api.swiglu_quantise`."""
    x_PF2 = gate_up.reshape(-1, gate_up.shape[-1])
    rows, width = x_PF2.shape[0], x_PF2.shape[1] // 2

    def compute(sources: list[Ref], results: list[Ref]) -> None:
        gate, up = sources
        # The product takes the gate's place: every thread writes what it alone has read. In registers both would spill.
        piece = 128 // gate.dtype.itemsize
        for start in range(0, TILE, piece):
            at = slice(None), pl.ds(start, piece)
            gate[at] = silu_times(load_rows(gate.at[at]), load_rows(up.at[at])).astype(gate.dtype)
        _by_rows(gate, results, power_of_two)
    values, scales = _call("swiglu_quantise", compute, x_PF2, [0, width], width, [_rows_of(rows, width)])
    return values.reshape(*gate_up.shape[:-1], width), scales.T.reshape(*gate_up.shape[:-1], -1)


def _vectors(dtype: Any) -> Any:
    """A thread for each row, and 16 bytes of it at once."""
    return plgpu.Layout.TCGEN05_TMEM_NATIVE(16 // jnp.dtype(dtype).itemsize)


def load_rows(source: Ref) -> jax.Array:
    return plgpu.load(source, layout=_vectors(source.dtype)).astype(jnp.float32)


def _by_rows(source: Ref, results: list[Ref], power_of_two: bool) -> None:
    _write(load_rows(source), results, power_of_two)


def _by_columns(source: Ref, results: list[Ref], power_of_two: bool) -> None:
    x = plgpu.load(source.T, layout=plgpu.Layout.TCGEN05_TMEM_NATIVE(1), optimized=False)
    _write(x.astype(jnp.float32), results, power_of_two)


def _write(x: jax.Array, results: list[Ref], power_of_two: bool) -> None:
    values, scales = results
    values[...], scales[...] = cast_rows(x, power_of_two)


def cast_rows(x: jax.Array, power_of_two: bool) -> tuple[jax.Array, jax.Array]:
    """Values and scales of x, as `load_rows` gives it; a thread has a row."""
    scale, inverse = scale_and_inverse(jnp.max(magnitude_bits(x), axis=1), power_of_two)
    scaled = x * jax.lax.broadcast_in_dim(inverse, x.shape, (0,))
    return plgpu.layout_cast(scaled, _vectors(FP8)).astype(FP8), scale


class _Result(NamedTuple):
    """Values and scales in device memory, and where those of the square at (row, column) lie."""

    values: jax.ShapeDtypeStruct
    scales: jax.ShapeDtypeStruct
    values_at: Callable[[Any, Any], tuple]
    scales_at: Callable[[Any, Any], tuple]


def _block(i: Any) -> Any:
    return pl.ds(i * TILE, TILE)


def _rows_of(rows: int, width: int) -> _Result:
    return _Result(jax.ShapeDtypeStruct((rows, width), FP8),
                   jax.ShapeDtypeStruct((pl.cdiv(width, TILE), rows), jnp.float32),
                   lambda row, column: (_block(row), _block(column)), lambda row, column: (column, _block(row)))


def _columns_of(rows: int, width: int) -> _Result:
    return _Result(jax.ShapeDtypeStruct((width, rows), FP8),
                   jax.ShapeDtypeStruct((pl.cdiv(rows, TILE), width), jnp.float32),
                   lambda row, column: (_block(column), _block(row)), lambda row, column: (row, _block(column)))


def _residence(inputs: int, outputs: int, itemsize: int) -> tuple[int, int]:
    """(slots for inputs, blocks of threads on one multiprocessor): two blocks if each has two slots, else one."""
    square = TILE * TILE
    rest = outputs * 2 * (square + 4 * TILE) + 4096  # barriers, the compiler's own, and 1 KiB that the system takes
    if 2 * (rest + 2 * inputs * square * itemsize) <= SHARED_BYTES:
        return 2, 2
    return min(SLOTS, (SHARED_BYTES - rest) // (inputs * square * itemsize)), 1


def _call(name: str, compute: Callable[[list[Ref], list[Ref]], None], x_MK: jax.Array, offsets: Sequence[int],
          width: int, results: Sequence[_Result]) -> tuple[jax.Array, ...]:
    """Runs `compute(squares of x, squares and scales of the results)` over `width` columns of x.

    A square has one part for each of the offsets, which are columns of x.
    """
    across = pl.cdiv(width, TILE)
    squares = pl.cdiv(x_MK.shape[0], TILE) * across
    slots, resident = _residence(len(offsets), len(results), x_MK.dtype.itemsize)
    blocks = min(squares, resident * hopper.MULTIPROCESSORS)

    def body(x: Ref, *refs: Ref) -> None:
        targets, (in_slots, *out_slots, full) = refs[:2 * len(results)], refs[2 * len(results):]
        first = jax.lax.axis_index("block")
        steps = jax.lax.div(squares - first + (blocks - 1), jnp.int32(blocks))

        def place(step: Any) -> tuple[jax.Array, jax.Array]:
            square = first + step * blocks
            return jax.lax.div(square, jnp.int32(across)), jax.lax.rem(square, jnp.int32(across))

        def fetch(step: Any) -> None:
            slot, (row, column) = jax.lax.rem(step, jnp.int32(slots)), place(step)
            for i, offset in enumerate(offsets):
                plgpu.copy_gmem_to_smem(x.at[_block(row), pl.ds(offset + column * TILE, TILE)],
                                        in_slots.at[slot * len(offsets) + i], full.at[slot])

        def write(step: Any, out: list[Ref]) -> None:
            wheres = [at for result in results for at in (result.values_at, result.scales_at)]
            for i, (target, at) in enumerate(zip(targets, wheres, strict=True)):
                plgpu.copy_smem_to_gmem(out[i], target.at[at(*place(step))], commit_group=i == len(wheres) - 1)

        jax.lax.fori_loop(0, jnp.minimum(steps, slots), lambda step, _: fetch(step), None)

        @pl.loop(0, steps)
        def _(step):
            slot, out = jax.lax.rem(step, jnp.int32(slots)), [o.at[jax.lax.rem(step, jnp.int32(2))] for o in out_slots]
            plgpu.barrier_wait(full.at[slot])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            compute([in_slots.at[slot * len(offsets) + i] for i in range(len(offsets))], out)
            plgpu.commit_smem()
            write(step, out)

            @pl.when(step + slots < steps)
            def _():
                fetch(step + slots)
        plgpu.wait_smem_to_gmem(0)
    body.__name__ = name
    out_slots = [slot for result in results for slot in (
        hopper.swizzled((2, TILE, TILE), FP8, beyond=result.values.shape[1]), plgpu.SMEM((2, TILE), jnp.float32))]
    run = plgpu.kernel(
        body, out_type=[shape for result in results for shape in (result.values, result.scales)], grid=(blocks,),
        grid_names=("block",), scratch_types=[
            hopper.swizzled((slots * len(offsets), TILE, TILE), x_MK.dtype, beyond=x_MK.shape[1]), *out_slots,
            plgpu.Barrier(num_arrivals=len(offsets), num_barriers=slots)])
    return run(x_MK)
