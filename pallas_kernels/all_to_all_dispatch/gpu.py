"""The Hopper backend: rows come from HBM into shared memory, are cast there if they shall be, and leave over NVLink.

The order of sending is made before, by XLA, from a few integers: all used slots, for one rank after the other, each
card beginning with itself, so that no two cards send to the same one at a time if loads are even. Blocks of 128 threads
take the rows in turn. A row that is not cast is touched by no thread: it is copied into a ring in shared memory, and
from there into the peer's result. A cast works on a square of 128 tiles of 128 columns, that is on 128 * 128 / D rows
at once: a thread has a tile, as in the standalone cast, whose code it is. Rows that such squares do not take are cast
by the standalone kernel before.

Floor: NVLink carries the used slots' bytes (D a row in float8, and 4 for each tile), less this rank's own; HBM is read
once for each, and written once for each slot, empty ones included, which are filled with zeros by their receiver. Bound
by NVLink, 450 GB/s one way of an H100.

Buffers: a ring slot's barrier says that its rows have come; it is filled again when its copies have been read, or its
rows have been cast. What protects peers, `pallas_kernels.nvlink` says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper, nvlink
from pallas_kernels.nvlink import LANES, Axes, Ref, div, rem
from pallas_kernels.peers import Route, rank_on, ranks_of
from pallas_kernels.quantise import quantise
from pallas_kernels.quantise.gpu import cast_rows, load_rows

if TYPE_CHECKING:
    from pallas_kernels.all_to_all_dispatch.api import Problem

FP8 = jnp.float8_e4m3fn
SQUARE = 128
"""Tiles that are cast at once: one a thread."""


def misfit(problem: Problem) -> str:
    """What a kernel needs and the problem is not; empty if it is served."""
    # Copies are of 16 bytes or a multiple, scales included.
    unit = 4 * LANES if problem.scales or problem.cast else LANES
    if problem.width % unit or not problem.slots * problem.rows:
        return f"a width divisible by {unit}, and some rows"
    if problem.dtype not in (jnp.bfloat16, jnp.float32, FP8):
        return "bfloat16, float32 or float8_e4m3fn"
    return ""


def _casts(width: int) -> bool:
    """Whether rows can be cast as they are sent: copies begin at the eighth row of a square, and jax 0.12 stores them
    as they lie."""
    return width % (8 * LANES) == 0 and width <= SQUARE * LANES and hasattr(plgpu, "store")


class _Send(NamedTuple):
    """The order of sending."""

    slot_S: jax.Array
    """int32 [S]: the slot of the i-th row to send."""
    row_S: jax.Array
    """int32 [S]: the row."""
    total: jax.Array
    """int32 [1]: how many there are."""


def _order(route: Route, axis: Axes) -> _Send:
    """All used slots, rank after rank, beginning with this one."""
    slots, ranks = route.source_S.shape[0], route.sent_N.shape[0]
    peer_N = (rank_on(axis) + jnp.arange(ranks)) % ranks
    ends_N = jnp.cumsum(route.sent_N[peer_N])
    i_S = jnp.arange(slots)
    turn_S = jnp.minimum(jnp.sum(i_S >= ends_N[:, None], axis=0), ranks - 1)
    place_S = i_S - (ends_N - route.sent_N[peer_N])[turn_S]
    slot_S = jnp.where(i_S < ends_N[-1], peer_N[turn_S] * (slots // ranks) + place_S, 0)
    return _Send(slot_S.astype(jnp.int32), jnp.maximum(route.source_S[slot_S], 0), ends_N[-1:].astype(jnp.int32))


def dispatch(parts: tuple[jax.Array, ...], route: Route, axis: Axes, cast: bool) -> tuple[jax.Array, ...]:
    """See `api.all_to_all_dispatch`."""
    (rows, width), slots = parts[0].shape, route.source_S.shape[0]
    if cast and not _casts(width):
        parts, cast = quantise(parts[0], (1, LANES), power_of_two=True), False
    tiles, places = width // LANES, slots // ranks_of(axis)
    kinds = [jax.ShapeDtypeStruct((slots, tiles, LANES), FP8) if cast else
             jax.ShapeDtypeStruct((slots, width), parts[0].dtype)]
    if cast or len(parts) > 1:
        kinds.append(jax.ShapeDtypeStruct((slots, tiles), jnp.float32))
    operands = (parts[0].reshape(rows, tiles, LANES),) if cast else parts
    send = _order(route, axis)
    make = _cast_kernel if cast else _copy_kernel
    scratch, each_turn = make(axis, places, operands, kinds)
    # Threads write them, so there is a multiple of 128.
    zeros = [plgpu.SMEM((*kind.shape[1:-1], pl.cdiv(kind.shape[-1], LANES) * LANES), kind.dtype) for kind in kinds]

    def body(block: jax.Array, slot_S: Ref, row_S: Ref, total: Ref, received_N: Ref, *refs: Ref) -> None:
        sources, results = refs[:len(operands)], refs[len(operands):len(operands) + len(kinds)]
        rest = refs[len(operands) + len(kinds):]
        own, zeros, finished = rest[:len(scratch)], rest[len(scratch):len(scratch) + len(kinds)], rest[
            len(scratch) + len(kinds):]
        each_turn(block, slot_S, row_S, total[0], sources, results, own)
        _fill_empty(block, places, received_N, results, zeros)
        plgpu.wait_smem_to_gmem(0)
        nvlink.finish(axis, block, list(finished))
    run = nvlink.kernel("dispatch", body, kinds, [*scratch, *zeros, *nvlink.semaphores(axis)])
    return tuple(part.reshape(slots, -1) for part in run(*send, route.received_N, *operands))


Turns = tuple[list[Any], Any]
"""Scratch, and the function (block, slot_S, row_S, total, sources, results, scratch) that sends this block's rows."""


def _fill_empty(block: jax.Array, places: int, received_N: Ref, results: tuple[Ref, ...],
                zeros: tuple[Ref, ...]) -> None:
    """Writes zeros into this card's own slots that nobody fills."""
    for zero in zeros:
        zero[...] = jnp.zeros(zero.shape, zero.dtype)
    plgpu.commit_smem()
    slots = results[0].shape[0]

    @pl.loop(0, div(slots - block + (nvlink.BLOCKS - 1), nvlink.BLOCKS))
    def _(i):
        slot = block + i * nvlink.BLOCKS

        @pl.when(rem(slot, places) >= received_N[div(slot, places)])
        def _():
            for zero, result in zip(zeros, results, strict=True):
                row = pl.ds(0, result.shape[-1])
                plgpu.copy_smem_to_gmem(zero.at[row] if len(zero.shape) == 1 else zero, result.at[slot])


def _copy_kernel(axis: Axes, places: int, parts: tuple[jax.Array, ...], kinds: list[jax.ShapeDtypeStruct]) -> Turns:
    """Rows, with scales if they have them, through a ring of rows."""
    ring = nvlink.slots_of_ring(kinds[0].shape[1] * kinds[0].dtype.itemsize)
    scratch = [*(plgpu.SMEM((ring, kind.shape[1]), kind.dtype) for kind in kinds),
               plgpu.Barrier(num_arrivals=len(kinds), num_barriers=ring)]

    def each_turn(block: jax.Array, slot_S: Ref, row_S: Ref, total: Any, sources: tuple[Ref, ...],
                  results: tuple[Ref, ...], own: tuple[Ref, ...]) -> None:
        *buffers, arrived = own
        turns, me = div(total - block + (nvlink.BLOCKS - 1), nvlink.BLOCKS), rank_on(axis)

        def fetch(turn: Any) -> None:
            row, at = row_S[block + turn * nvlink.BLOCKS], rem(turn, ring)
            for source, buffer in zip(sources, buffers, strict=True):
                nvlink.fetch(source.at[row], buffer.at[at], arrived.at[at])
        jax.lax.fori_loop(0, jnp.minimum(turns, ring), lambda turn, _: fetch(turn), None)

        @pl.loop(0, turns)
        def _(turn):
            slot, at = slot_S[block + turn * nvlink.BLOCKS], rem(turn, ring)
            plgpu.barrier_wait(arrived.at[at])
            for i, (buffer, result) in enumerate(zip(buffers, results, strict=True)):
                target = nvlink.on_peer(result.at[me * places + rem(slot, places)], axis, div(slot, places))
                plgpu.copy_smem_to_gmem(buffer.at[at], target, commit_group=i == len(results) - 1)

            # This row's copy is left running; the one before has been read, so its slot takes a further row.
            @pl.when((turn > 0) & (turn - 1 + ring < turns))
            def _():
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                fetch(turn - 1 + ring)
    return scratch, each_turn


def _cast_kernel(axis: Axes, places: int, parts: tuple[jax.Array, ...], kinds: list[jax.ShapeDtypeStruct]) -> Turns:
    """Squares of `group` rows each, two on their way in and two on their way out."""
    tiles = kinds[1].shape[1]
    group, dtype = SQUARE // tiles, parts[0].dtype
    scratch = [hopper.swizzled((2, SQUARE, LANES), dtype), plgpu.SMEM((2, SQUARE, LANES), FP8),
               plgpu.SMEM((2, SQUARE), jnp.float32), plgpu.Barrier(num_arrivals=group, num_barriers=2)]

    def each_turn(block: jax.Array, slot_S: Ref, row_S: Ref, total: Any, sources: tuple[Ref, ...],
                  results: tuple[Ref, ...], own: tuple[Ref, ...]) -> None:
        squares, values, scales, arrived = own
        groups, me = div(total + (group - 1), group), rank_on(axis)
        turns = div(groups - block + (nvlink.BLOCKS - 1), nvlink.BLOCKS)

        def first_of(turn: Any) -> Any:
            return (block + turn * nvlink.BLOCKS) * group

        def fetch(turn: Any) -> None:
            at = rem(turn, 2)
            for g in range(group):  # the last square may hold a row twice
                row = row_S[jnp.minimum(first_of(turn) + g, total - 1)]
                plgpu.copy_gmem_to_smem(sources[0].at[row], squares.at[at, pl.ds(g * tiles, tiles)], arrived.at[at])
        jax.lax.fori_loop(0, jnp.minimum(turns, 2), lambda turn, _: fetch(turn), None)
        # Written once in this layout, so that the compiler lets rows lie as they are sent, not swizzled: copies of
        # swizzled rows need a descriptor for each peer, and there are no more than 8.
        flat = plgpu.Layout.WG_STRIDED((SQUARE, LANES), vec_size=16)
        for i in range(2):
            values[i] = plgpu.layout_cast(jnp.zeros((SQUARE, LANES), FP8), flat)
        plgpu.commit_smem()

        @pl.loop(0, turns)
        def _(turn):
            at = rem(turn, 2)
            plgpu.barrier_wait(arrived.at[at])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            codes, scales[at] = cast_rows(load_rows(squares.at[at]), True)
            plgpu.store(values.at[at], codes, optimized=False)
            plgpu.commit_smem()
            for g in range(group):
                @pl.when(first_of(turn) + g < total)
                def _(g=g):
                    slot, here = slot_S[first_of(turn) + g], pl.ds(g * tiles, tiles)
                    for source, result in zip((values.at[at, here], scales.at[at, here]), results, strict=True):
                        target = nvlink.on_peer(result.at[me * places + rem(slot, places)], axis, div(slot, places))
                        plgpu.copy_smem_to_gmem(source, target, commit_group=False)
            plgpu.commit_smem_to_gmem_group()

            @pl.when(turn + 2 < turns)
            def _():
                fetch(turn + 2)
    return scratch, each_turn
