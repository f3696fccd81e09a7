"""Copies from chip to chip over ICI: what the TPU kernels of dispatch and combine share.

Arrays are [rows, ceil(D / 128), 128] here: then a row lies in memory in one piece, and any run of rows is one DMA. (In
[rows, D] eight rows lie interleaved.) XLA changes the layout at the way in and out, fused with what comes before and
after where it can: at most one more read and write of HBM, which is an order of magnitude faster than ICI.

Who may write when, for every kernel here:
- A rank writes into a peer's result, which exists only once the peer has entered the same kernel. So each rank tells
  all others that it has entered (on the barrier semaphore) and hears as much of all before it sends anything.
- A rank that has nothing to wait for could run ahead into the next call and be counted twice there by one that still
  waits here. So each tells all once more, on a second semaphore, after it has sent, and hears that of all before it
  leaves: no rank is ever a whole call ahead, and the two semaphores cannot be mistaken for each other.
- The receiver's semaphore n counts the bytes that have come from rank n. A receiver knows how many will come
  (`Route.received_N`), and waits for them all: capacity cannot be exceeded, since each sender has its own places.
- The sender's semaphore counts the bytes that have left; only then is their source used again, or given back.

Interpretation proves the last two and not the first two: all ranks' arrays exist there before any rank begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.peers import device_of, names_of, rank_on, ranks_of

LANES = 128
SMEM_BYTES = 2 ** 19
"""What tables of slots may take of a core's scalar memory, of 1 MiB."""

Ref = Any
Axes = tuple[str, ...]

HBM, SMEM, SEMAPHORE = (pl.BlockSpec(memory_space=space) for space in (pltpu.HBM, pltpu.SMEM, pltpu.SEMAPHORE))

_groups: list[Axes] = []


def collective_id(axis: Axes) -> int:
    """A barrier semaphore for each group of ranks: a rank must not be counted by a group that it is not in. Programs
    are traced in the same order on all hosts, so all agree."""
    if names_of(axis) not in _groups:
        _groups.append(names_of(axis))
    return _groups.index(names_of(axis))


def by_lanes(x_RD: jax.Array) -> jax.Array:
    return x_RD.reshape(x_RD.shape[0], -1, LANES)


def tell_all(semaphore: Ref, axis: Axes) -> None:
    """One word to each rank, itself included, and waits for one of each."""
    ranks = ranks_of(axis)

    @pl.loop(0, ranks)
    def _(rank):
        pl.semaphore_signal(semaphore, 1, device_id=device_of(axis, rank))
    pl.semaphore_wait(semaphore, ranks)


def each_piece(count: Any, most: int, do: Callable[[Any, int], None]) -> None:
    """`do(first, size)` for pieces of 0 .. count-1, at most `most`, whose sizes are powers of two: a DMA's size is
    static."""
    for bit in reversed(range(most.bit_length())):
        size = 1 << bit

        @pl.when(count & size != 0)
        def _(size=size):
            do(count & -2 * size, size)


def wait_for(semaphore: Ref, array: Ref, count: Any, most: int) -> None:
    """Until `count` rows as those of `array` have come or gone, in whatever pieces they did."""
    def wait(_: Any, size: int) -> None:
        piece = array.at[pl.ds(0, size)]
        pltpu.make_async_copy(piece, piece, semaphore).wait()
    each_piece(count, most, wait)


def start_copies(axis: Axes, arrays: Sequence[Ref], results: Sequence[Ref], counts: Ref, sent: Ref,
                 arrived: Ref) -> None:
    """Sends the first counts[i, n] rows of chunk n of arrays[i] to rank n, whose chunk of this rank they become."""
    me, ranks = rank_on(axis), ranks_of(axis)

    @pl.loop(0, ranks)
    def _(turn):  # every rank begins with itself, so that no two start with the same receiver
        peer = jax.lax.rem(me + turn, jnp.int32(ranks))
        for i, (array, result) in enumerate(zip(arrays, results, strict=True)):
            places = array.shape[0] // ranks

            def send(first: Any, size: int, array=array, result=result, places=places) -> None:
                pltpu.make_async_remote_copy(
                    array.at[pl.ds(peer * places + first, size)], result.at[pl.ds(me * places + first, size)],
                    sent.at[peer], arrived.at[me], device_id=device_of(axis, peer)).start()
            each_piece(counts[i * ranks + peer], places, send)


def wait_copies(ranks: int, arrays: Sequence[Ref], counts: Ref, semaphores: Ref) -> None:
    """Until counts[i, n] rows as those of arrays[i] have come from rank n, or gone to it."""
    @pl.loop(0, ranks)
    def _(peer):
        for i, array in enumerate(arrays):
            wait_for(semaphores.at[peer], array, counts[i * ranks + peer], array.shape[0] // ranks)


def exchange(arrays: Sequence[jax.Array], going: jax.Array, coming: jax.Array, axis: Axes, *,
             interpret: Any = False) -> list[jax.Array]:
    """Swaps chunks with all ranks, of each no more than is used; what is not used is left as it was: anything.

    Floor: ICI carries the bytes that `going` counts, less this rank's own; HBM is read and written once for each.
    Bound by ICI: HBM of a v5p moves 2765 GB/s, its six links 600 GB/s.

    Args:
      arrays: each [N * places, ...].
      going: int32 [arrays * N], the rows of each array for each rank, which lie at the front of its chunk.
      coming: the same, of each rank.
    """
    ranks, number = ranks_of(axis), len(arrays)

    def body(going: Ref, coming: Ref, *refs: Ref) -> None:
        arrays, results, (sent, arrived, told) = refs[:number], refs[number:2 * number], refs[2 * number:]
        _start(axis, arrays, results, going, sent, arrived, told)
        _wait(ranks, arrays, results, going, coming, sent, arrived)
    return pl.pallas_call(
        body, name="ici_exchange", in_specs=[SMEM, SMEM] + [HBM] * number, out_specs=[HBM] * number,
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays], interpret=interpret,
        scratch_shapes=[*[pltpu.SemaphoreType.DMA((ranks,))] * 2, pltpu.SemaphoreType.REGULAR],
        compiler_params=_communicates(axis))(going, coming, *arrays)


class InFlight(NamedTuple):
    """An exchange that was started. Its arrays must not be used before `wait`."""

    arrays: tuple[jax.Array, ...]
    """What is being read."""
    results: tuple[jax.Array, ...]
    """What is being written."""
    sent: jax.Array
    arrived: jax.Array
    """Semaphores, of this rank's copies and of those of the others."""
    started: jax.Array
    """Exists once the copies are on their way."""
    going: jax.Array
    coming: jax.Array

    def before(self, x: Any) -> Any:
        """x, which none of its users can use before the copies are on their way. The compiler would else be free to
        start them after the compute that they shall run beside."""
        return jax.lax.optimization_barrier((x, self.started))[0]


def start(arrays: Sequence[jax.Array], going: jax.Array, coming: jax.Array, axis: Axes) -> InFlight:
    """The first half of `exchange`: returns as soon as all ranks have started their copies. The semaphores outlive the
    kernel; interpretation knows no such thing, hence it runs `exchange`, made of the same two functions."""
    ranks, number = ranks_of(axis), len(arrays)

    def body(going: Ref, *refs: Ref) -> None:
        arrays, results, (sent, arrived, started, told) = refs[:number], refs[number:2 * number], refs[2 * number:]
        _start(axis, arrays, results, going, sent, arrived, told)
        started[0] = 0
    out = pl.pallas_call(
        body, name="ici_start", in_specs=[SMEM] + [HBM] * number, out_specs=[HBM] * number + [SEMAPHORE] * 2 + [SMEM],
        out_shape=[*(pltpu.HBM(array.shape, array.dtype) for array in arrays),
                   *[pltpu.SemaphoreType.DMA((ranks,))] * 2, jax.ShapeDtypeStruct((1,), jnp.int32)],
        scratch_shapes=[pltpu.SemaphoreType.REGULAR], compiler_params=_communicates(axis))(
            going, *map(_in_hbm, arrays))
    sent, arrived, started = out[number:]
    return InFlight(tuple(arrays), tuple(out[:number]), sent, arrived, started, going, coming)


def wait(in_flight: InFlight, after: Any = None) -> list[jax.Array]:
    """The second half of `exchange`; it begins when `after` has been computed."""
    number, ranks = len(in_flight.arrays), in_flight.sent.shape[0]
    going, _ = jax.lax.optimization_barrier((in_flight.going, after))

    def body(going: Ref, coming: Ref, sent: Ref, arrived: Ref, *refs: Ref) -> None:
        _wait(ranks, refs[:number], refs[number:2 * number], going, coming, sent, arrived)
    return pl.pallas_call(
        body, name="ici_wait", in_specs=[SMEM] * 2 + [SEMAPHORE] * 2 + [HBM] * (2 * number), out_specs=[HBM] * number,
        out_shape=[pltpu.HBM(array.shape, array.dtype) for array in in_flight.results],
        input_output_aliases={4 + number + i: i for i in range(number)},
        compiler_params=pltpu.CompilerParams(has_side_effects=True))(
            going, in_flight.coming, in_flight.sent, in_flight.arrived, *map(_in_hbm, in_flight.arrays),
            *map(_in_hbm, in_flight.results))


def _in_hbm(array: jax.Array) -> jax.Array:
    """XLA would else bring what `wait` takes into VMEM as soon as it is there, which is while it is still being sent,
    and use its place in HBM for something else. Seen so in a program for v5p."""
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


def _start(axis: Axes, arrays: Sequence[Ref], results: Sequence[Ref], going: Ref, sent: Ref, arrived: Ref,
           told: Ref) -> None:
    tell_all(pltpu.get_barrier_semaphore(), axis)
    start_copies(axis, arrays, results, going, sent, arrived)
    tell_all(told, axis)


def _wait(ranks: int, arrays: Sequence[Ref], results: Sequence[Ref], going: Ref, coming: Ref, sent: Ref,
          arrived: Ref) -> None:
    wait_copies(ranks, arrays, going, sent)
    wait_copies(ranks, results, coming, arrived)


def _communicates(axis: Axes) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(collective_id=collective_id(axis), has_side_effects=True)


def smem_misfit(*integers: int) -> str:
    return f"tables of at most {SMEM_BYTES} bytes" if 4 * sum(integers) > SMEM_BYTES else ""


def rows_of_a_block(row_bytes: int, block_bytes: int, most: int) -> int:
    """A power of two."""
    return 1 << max(0, min(block_bytes // row_bytes, most).bit_length() - 1)


def blocks_of(count: Any, rows: int) -> Any:
    """How many blocks of `rows` hold `count` rows."""
    return -(-count // rows) if isinstance(count, int) else jax.lax.div(count + (rows - 1), jnp.int32(rows))
