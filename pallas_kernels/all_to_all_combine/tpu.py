"""The TPU backend: slots go home as they lie, and each row's copies are added there as they are read.

The exchange needs no staging: in a chunk, used slots come first, so a rank's share is one run of rows in HBM, and a DMA
carries it from there to the other's HBM (`pallas_kernels.ici`, which also says how buffers are protected).

The sum walks over blocks of rows. The copies of the next block are fetched, a DMA each, while this block's are added.
Floor: HBM, each returned row read once and each result written once. Bound by HBM, or by the scalar core that starts a
DMA a row where rows are short; either is small beside the exchange.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import ici
from pallas_kernels.ici import HBM, LANES, Axes, Ref, by_lanes, exchange, rows_of_a_block
from pallas_kernels.peers import Route

if TYPE_CHECKING:
    from pallas_kernels.all_to_all_combine.api import Problem

ROWS = 32
"""Of a block, at most."""
COPIES_BYTES = 2 ** 22
"""Of a block, all copies together; there are two such buffers."""


def misfit(problem: Problem) -> str:
    """What a kernel needs and the problem is not; empty if it is served."""
    if problem.width % LANES or not problem.rows * problem.copies * problem.slots:
        return "a width divisible by 128, and some rows"
    if any(dtype not in (jnp.bfloat16, jnp.float32) for dtype in (problem.dtype, problem.result)):
        return "bfloat16 or float32"
    return ""


def combine(slots_SD: jax.Array, route: Route, weights_RK: jax.Array | None, axis: Axes, dtype: jnp.dtype, *,
            interpret: Any = False) -> jax.Array:
    """See `api.all_to_all_combine`."""
    returned, = exchange([by_lanes(slots_SD)], route.received_N, route.sent_N, axis, interpret=interpret)
    return sum_of_copies(returned, route.slot_RK, weights_RK, dtype, interpret=interpret)


class InFlight(NamedTuple):
    """A combine that was started."""

    copies: ici.InFlight
    route: Route
    weights_RK: jax.Array | None
    dtype: jnp.dtype

    def before(self, x: Any) -> Any:
        """See `ici.InFlight.before`."""
        return self.copies.before(x)


def combine_start(slots_SD: jax.Array, route: Route, weights_RK: jax.Array | None, axis: Axes,
                  dtype: jnp.dtype) -> InFlight:
    """See `api.combine_start`."""
    copies = ici.start([by_lanes(slots_SD)], route.received_N, route.sent_N, axis)
    return InFlight(copies, route, weights_RK, dtype)


def combine_wait(in_flight: InFlight, after: Any = None) -> jax.Array:
    """See `api.combine_wait`."""
    returned, = ici.wait(in_flight.copies, after)
    return sum_of_copies(returned, in_flight.route.slot_RK, in_flight.weights_RK, in_flight.dtype)


def sum_of_copies(returned: jax.Array, slot_RK: jax.Array, weights_RK: jax.Array | None, dtype: jnp.dtype, *,
                  interpret: Any = False) -> jax.Array:
    """[S, D / 128, 128] -> [R, D]: as the reference, to the bit, but for what weights round."""
    (rows, copies), row = slot_RK.shape, returned.shape[1:]
    row_bytes = row[0] * LANES * returned.dtype.itemsize
    block = min(rows_of_a_block(copies * row_bytes, COPIES_BYTES, ROWS), rows)
    steps = pl.cdiv(rows, block)

    def table(x_RK: jax.Array, empty: int) -> jax.Array:
        padded = jnp.pad(x_RK, ((0, steps * block - rows), (0, 0)), constant_values=empty)
        return padded.reshape(steps, 1, block * copies)
    # A step fetches the copies of the next, so it sees the slots of both.
    def table_spec(ahead: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, block * copies), lambda i: (jnp.minimum(i + ahead, steps - 1), 0, 0),
                            memory_space=pltpu.SMEM)
    here, after = table_spec(0), table_spec(1)
    slots = table(slot_RK, -1)
    weights = [] if weights_RK is None else [table(weights_RK.astype(jnp.float32), 0)]
    out = pl.pallas_call(
        functools.partial(_sum, copies, bool(weights)), name="sum_of_copies", grid=(steps,),
        in_specs=[here, after, *[here] * len(weights), HBM],
        out_specs=pl.BlockSpec((block, *row), lambda i: (i, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, *row), dtype), interpret=interpret,
        scratch_shapes=[pltpu.VMEM((2, block * copies, *row), returned.dtype), pltpu.SemaphoreType.DMA((2,))],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)))(slots, slots, *weights, returned)
    return out.reshape(rows, -1)


def _sum(copies: int, weighted: bool, slots: Ref, slots_after: Ref, *refs: Ref) -> None:
    weights = refs[0] if weighted else None
    returned, out, buffers, arrived = refs[weighted:]
    step, entries = pl.program_id(0), buffers.shape[1]

    def each_copy(slots: Ref, buffer: Any, do: str) -> None:
        @pl.loop(0, entries)
        def _(i):
            slot = slots[0, 0, i]

            @pl.when(slot >= 0)
            def _():
                copy = pltpu.make_async_copy(returned.at[slot], buffers.at[buffer, i], arrived.at[buffer])
                getattr(copy, do)()
    now = jax.lax.rem(step, 2)

    @pl.when(step == 0)
    def _():
        each_copy(slots, now, "start")

    @pl.when(step + 1 < pl.num_programs(0))
    def _():
        each_copy(slots_after, 1 - now, "start")
    each_copy(slots, now, "wait")

    @pl.loop(0, out.shape[0])
    def _(r):
        total = jnp.zeros(out.shape[1:], jnp.float32)
        for k in range(copies):
            i = r * copies + k
            row = buffers[now, i].astype(jnp.float32)
            if weights is not None:
                row *= weights[0, 0, i]
            total += jnp.where(slots[0, 0, i] >= 0, row, 0)
        out[r] = total.astype(out.dtype)
