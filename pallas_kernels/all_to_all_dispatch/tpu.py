"""The TPU backend: rows are gathered into VMEM, cast there if they shall be, and leave from there over ICI.

A turn takes a block of rows for one rank. Each row comes from HBM by a DMA of its own; the block leaves in a few, for
their sizes are powers of two. Blocks for all ranks take turns, so that all links are in use. `SLOTS` blocks are on
their way while the next is gathered and cast, which is faster than ICI.

Floor of `dispatch`: ICI carries the used slots' bytes (D a row in float8, and 4 for each tile of 128), less those for
this rank itself; HBM is read once for each used slot and written once where it arrives. Bound by ICI. Rows of the next
block are not fetched while a block is cast, which costs nothing while the blocks before still leave.

With float8, scales of a block leave as [tiles, rows], since a step of the cast has the scales of one row in one lane.
They are sent for whole blocks, that is for up to `ROWS` - 1 rows too many a rank, 3% of the bytes of a row each.

Buffers: a VMEM slot is used again when its semaphore in `left` says that its bytes have gone. What protects the
receiver, `pallas_kernels.ici` says.

The halves `dispatch_start` and `dispatch_wait` leave time for compute between them. A kernel's VMEM is gone when it
ends, so the start cannot send from there: rows are packed into HBM first (once more written and read), and the start
sends whole runs of rows from there and returns at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import ici
from pallas_kernels.ici import (
    HBM,
    LANES,
    SMEM,
    Axes,
    Ref,
    blocks_of,
    by_lanes,
    collective_id,
    each_piece,
    rows_of_a_block,
    smem_misfit,
    tell_all,
    wait_copies,
    wait_for,
)
from pallas_kernels.peers import Route, device_of, rank_on, ranks_of, used_slots
from pallas_kernels.quantise.reference import scale_and_inverse

if TYPE_CHECKING:
    from pallas_kernels.all_to_all_dispatch.api import Problem

ROWS = 128
"""Of a block, at most: a lane for each one's scales."""
BLOCK_BYTES = 2 ** 21
SLOTS = 4
"""Blocks on their way at once: enough for the links of a torus, by a guess that no chip has checked."""
VMEM_BYTES = 32 * 2 ** 20
FP8 = jnp.float8_e4m3fn


def misfit(problem: Problem) -> str:
    """What a kernel needs and the problem is not; empty if it is served."""
    if problem.width % LANES or not problem.slots * problem.rows:
        return "a width divisible by 128, and some rows"
    if problem.dtype not in (jnp.bfloat16, jnp.float32, FP8):
        return "bfloat16, float32 or float8_e4m3fn"
    if problem.width * problem.dtype.itemsize > BLOCK_BYTES:
        return f"a row in {BLOCK_BYTES} bytes"
    return smem_misfit(problem.slots)


class Blocks(NamedTuple):
    """How the C slots of a destination are cut."""

    ranks: int
    places: int
    rows: int

    @property
    def each(self) -> int:
        """Blocks of a destination."""
        return blocks_of(self.places, self.rows)


def blocks_for(parts: tuple[jax.Array, ...], route: Route, axis: Axes) -> Blocks:
    ranks, row_bytes = ranks_of(axis), parts[0].shape[1] * parts[0].dtype.itemsize
    places = route.source_S.shape[0] // ranks
    return Blocks(ranks, places, rows_of_a_block(row_bytes, BLOCK_BYTES, min(ROWS, places)))


def dispatch(parts: tuple[jax.Array, ...], route: Route, axis: Axes, cast: bool, *,
             interpret: Any = False) -> tuple[jax.Array, ...]:
    """See `api.all_to_all_dispatch`."""
    blocks = blocks_for(parts, route, axis)
    arrived = _call(parts, route, axis, cast, blocks, True, interpret)
    return unpack(arrived, route, blocks)


class InFlight(NamedTuple):
    """A dispatch that was started."""

    copies: ici.InFlight
    route: Route
    blocks: Blocks

    def before(self, x: Any) -> Any:
        """See `ici.InFlight.before`."""
        return self.copies.before(x)


def dispatch_start(parts: tuple[jax.Array, ...], route: Route, axis: Axes, cast: bool) -> InFlight:
    """See `api.dispatch_start`."""
    packed, going, coming = pack(parts, route, axis, cast)
    return InFlight(ici.start(packed, going, coming, axis), route, blocks_for(parts, route, axis))


def pack(parts: tuple[jax.Array, ...], route: Route, axis: Axes, cast: bool, *,
         interpret: Any = False) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """What an `ici` exchange takes: rows as they are to be sent, and how many go and come."""
    blocks = blocks_for(parts, route, axis)
    packed = _call(parts, route, axis, cast, blocks, False, interpret)

    def counts(rows_N: jax.Array) -> jax.Array:
        return jnp.concatenate([rows_N, blocks_of(rows_N, blocks.rows)][:len(packed)])
    return packed, counts(route.sent_N), counts(route.received_N)


def dispatch_wait(in_flight: InFlight, after: Any = None) -> tuple[jax.Array, ...]:
    """See `api.dispatch_wait`."""
    return unpack(tuple(ici.wait(in_flight.copies, after)), in_flight.route, in_flight.blocks)


def unpack(arrived: tuple[jax.Array, ...], route: Route, blocks: Blocks) -> tuple[jax.Array, ...]:
    """[S, D / 128, 128] and scales of blocks, as the kernel has them, to arrays of slots; empty ones become zero."""
    slots = arrived[0].shape[0]
    used_S1 = used_slots(route.received_N, slots)[:, None]
    parts = [arrived[0].reshape(slots, -1)]
    if len(arrived) > 1:
        scales = arrived[1].swapaxes(1, 2).reshape(blocks.ranks, blocks.each * blocks.rows, -1)
        parts.append(scales[:, :blocks.places].reshape(slots, -1))
    return tuple(jnp.where(used_S1, part, jnp.zeros((), part.dtype)) for part in parts)


def _scales_in_blocks(scales_RW: jax.Array, source_S: jax.Array, blocks: Blocks) -> jax.Array:
    """Scales that rows bring with them, as blocks send them: [N * blocks, tiles, rows of a block]."""
    source_NC = jnp.maximum(source_S, 0).reshape(blocks.ranks, blocks.places)
    source_NC = jnp.pad(source_NC, ((0, 0), (0, blocks.each * blocks.rows - blocks.places)))
    return scales_RW[source_NC.reshape(-1, blocks.rows)].swapaxes(1, 2)


def _call(parts: tuple[jax.Array, ...], route: Route, axis: Axes, cast: bool, blocks: Blocks, remote: bool,
          interpret: Any) -> tuple[jax.Array, ...]:
    """Sends blocks to their ranks, or, if not `remote`, packs them in this rank's HBM, in its chunks for the ranks."""
    rows, slots = by_lanes(parts[0]), route.source_S.shape[0]
    row = rows.shape[1:]
    out = [jax.ShapeDtypeStruct((slots, *row), FP8 if cast else rows.dtype)]
    scratch = {"rows": pltpu.VMEM((SLOTS, blocks.rows, *row), rows.dtype)}
    operands = [rows]
    if cast or len(parts) > 1:
        out.append(jax.ShapeDtypeStruct((blocks.ranks * blocks.each, row[0], blocks.rows), jnp.float32))
        scratch["scales"] = pltpu.VMEM((SLOTS, row[0], blocks.rows), jnp.float32)
    if cast:
        scratch["values"] = pltpu.VMEM((SLOTS, blocks.rows, *row), FP8)
    elif len(parts) > 1:
        operands.append(_scales_in_blocks(parts[1], route.source_S, blocks))
    semaphores = {"fetched": pltpu.SemaphoreType.DMA, "left": pltpu.SemaphoreType.DMA((SLOTS,)),
                  "arrived": pltpu.SemaphoreType.DMA((blocks.ranks,)), "told": pltpu.SemaphoreType.REGULAR}
    scratch |= semaphores | {"in_flight": pltpu.SMEM((SLOTS,), jnp.int32)}

    def body(source: Ref, sent: Ref, received: Ref, *refs: Ref) -> None:
        inputs, results = refs[:len(operands)], refs[len(operands):len(operands) + len(out)]
        own = dict(zip(scratch, refs[len(operands) + len(out):], strict=True))
        _body(axis, blocks, remote, source, sent, received, inputs, results, own)
    return tuple(pl.pallas_call(
        body, name="dispatch" if remote else "pack", in_specs=[SMEM] * 3 + [HBM] * len(operands),
        out_specs=[HBM] * len(out), out_shape=out, scratch_shapes=list(scratch.values()), interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            collective_id=collective_id(axis) if remote else None, has_side_effects=remote,
            vmem_limit_bytes=VMEM_BYTES))(route.source_S, route.sent_N, route.received_N, *operands))


def _body(axis: Axes, blocks: Blocks, remote: bool, source: Ref, sent: Ref, received: Ref, inputs: tuple[Ref, ...],
          results: tuple[Ref, ...], own: dict[str, Ref]) -> None:
    ranks, most = blocks.ranks, blocks.rows
    if remote:
        tell_all(pltpu.get_barrier_semaphore(), axis)
    for slot in range(SLOTS):
        own["in_flight"][slot] = 0

    def each(step: Any, turn: Any) -> Any:
        # Every rank begins with itself, so that no two start with the same receiver.
        peer = jax.lax.rem(rank_on(axis) + step, jnp.int32(ranks))
        block = jax.lax.div(step, jnp.int32(ranks))
        count = jnp.clip(sent[peer] - block * most, 0, most)

        @pl.when(count > 0)
        def _():
            slot = jax.lax.rem(turn, SLOTS)
            _wait_until_gone(own, slot, most)
            own["in_flight"][slot] = count
            _gather(blocks, source, inputs, own, slot, peer, block, count)
            _deliver(axis, blocks, remote, results, own, slot, peer, block, count)
        return turn + (count > 0).astype(jnp.int32)
    fullest = jax.lax.fori_loop(0, ranks, lambda n, most: jnp.maximum(most, sent[n]), jnp.int32(0))
    jax.lax.fori_loop(0, blocks_of(fullest, most) * ranks, each, jnp.int32(0))
    for slot in range(SLOTS):
        _wait_until_gone(own, slot, most)
    if remote:
        tell_all(own["told"], axis)
        wait_copies(ranks, results[:1], received, own["arrived"])
        if len(results) > 1:
            _wait_for_scales(blocks, results[1], received, own["arrived"])


def _wait_until_gone(own: dict[str, Ref], slot: Any, most: int) -> None:
    """Until the block that the slot had has left it."""
    count = own["in_flight"][slot]
    wait_for(own["left"].at[slot], own["values" if "values" in own else "rows"].at[slot], count, most)
    if "scales" in own:
        wait_for(own["left"].at[slot], own["scales"], (count > 0).astype(jnp.int32), 1)


def _gather(blocks: Blocks, source: Ref, inputs: tuple[Ref, ...], own: dict[str, Ref], slot: Any, peer: Any,
            block: Any, count: Any) -> None:
    """Fetches the rows of a block into the slot, and casts them where they are to be cast."""
    first, rows = peer * blocks.places + block * blocks.rows, own["rows"].at[slot]

    @pl.loop(0, count)
    def _(i):
        pltpu.make_async_copy(inputs[0].at[source[first + i]], rows.at[i], own["fetched"]).start()
    if len(inputs) > 1:
        pltpu.make_async_copy(inputs[1].at[peer * blocks.each + block], own["scales"].at[slot], own["fetched"]).start()
        wait_for(own["fetched"], own["scales"], 1, 1)
    wait_for(own["fetched"], rows, count, blocks.rows)
    if "values" in own:
        _cast(rows, own["values"].at[slot], own["scales"].at[slot], count)


def _cast(rows: Ref, values: Ref, scales: Ref, count: Any) -> None:
    """A row's tiles lie one to a sublane, so its scales are a column, which takes the row's lane."""
    lane = jax.lax.broadcasted_iota(jnp.int32, scales.shape, 1)

    def row(i: Any, scales: jax.Array) -> jax.Array:
        x = rows[i].astype(jnp.float32)
        # Infinite for NaN: a maximum of float32 across lanes may lose it.
        largest = jnp.max(jnp.where(x == x, jnp.abs(x), jnp.inf), axis=1, keepdims=True)
        scale, inverse = scale_and_inverse(jax.lax.bitcast_convert_type(largest, jnp.int32), True)
        values[i] = (x * inverse).astype(FP8)
        return jnp.where(lane == i, scale, scales)
    scales[...] = jax.lax.fori_loop(0, count, row, jnp.zeros(scales.shape, jnp.float32))


def _deliver(axis: Axes, blocks: Blocks, remote: bool, results: tuple[Ref, ...], own: dict[str, Ref], slot: Any,
             peer: Any, block: Any, count: Any) -> None:
    """Sends a slot to the rank's chunk for us, or packs it in our chunk for that rank."""
    me = rank_on(axis)
    chunk = me if remote else peer

    def copy(source: Ref, target: Ref) -> None:
        if remote:
            pltpu.make_async_remote_copy(source, target, own["left"].at[slot], own["arrived"].at[me],
                                         device_id=device_of(axis, peer)).start()
        else:
            pltpu.make_async_copy(source, target, own["left"].at[slot]).start()
    rows, first = own["values" if "values" in own else "rows"].at[slot], chunk * blocks.places + block * blocks.rows
    each_piece(count, blocks.rows, lambda at, size: copy(rows.at[pl.ds(at, size)],
                                                         results[0].at[pl.ds(first + at, size)]))
    if "scales" in own:
        copy(own["scales"].at[slot], results[1].at[chunk * blocks.each + block])


def _wait_for_scales(blocks: Blocks, scales: Ref, received: Ref, arrived: Ref) -> None:
    @pl.loop(0, blocks.ranks)
    def _(peer):
        wait_for(arrived.at[peer], scales, blocks_of(received[peer], blocks.rows), blocks.each)
