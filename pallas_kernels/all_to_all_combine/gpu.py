"""The Hopper backend: each card fetches the copies of its own rows from where they lie, and adds them as they come.

Nothing is sent back: a card reads peers' slots over NVLink straight into shared memory, in the order in which they are
added, so there is no buffer of returned rows and no second pass. A block of 128 threads walks over rows; a thread holds
D / 128 sums in registers. A ring of rows in shared memory is kept full: the fetches of the next rows are under way
while one is added.

Floor: NVLink carries each used slot once (less this rank's own), HBM is read once for each and written once for each
row of the result. Bound by NVLink, 450 GB/s one way of an H100.

Buffers: a ring slot's barrier says that its row has come; it is fetched into again after all threads have read it.
Peers' slots, `pallas_kernels.nvlink` protects.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import nvlink
from pallas_kernels.nvlink import LANES, Axes, Ref, div, rem
from pallas_kernels.peers import Route, rank_on, ranks_of

if TYPE_CHECKING:
    from pallas_kernels.all_to_all_combine.api import Problem

LARGEST_WIDTH = 8192
"""64 float32 sums a thread, and as many of a row that is added: more would leave the registers."""


def misfit(problem: Problem) -> str:
    """What a kernel needs and the problem is not; empty if it is served."""
    fits = problem.width % (8 * LANES) == 0 and problem.width <= LARGEST_WIDTH
    if not fits or not problem.rows * problem.copies * problem.slots:
        return f"a width divisible by {8 * LANES}, {LARGEST_WIDTH} at most, and some rows"
    if any(dtype not in (jnp.bfloat16, jnp.float32) for dtype in (problem.dtype, problem.result)):
        return "bfloat16 or float32"
    return ""


def combine(slots_SD: jax.Array, route: Route, weights_RK: jax.Array | None, axis: Axes,
            dtype: jnp.dtype) -> jax.Array:
    """See `api.all_to_all_combine`."""
    (rows, copies), width = route.slot_RK.shape, slots_SD.shape[1]
    ring = nvlink.slots_of_ring(width * slots_SD.dtype.itemsize)
    weights = [] if weights_RK is None else [weights_RK.reshape(-1)]
    run = nvlink.kernel(
        "combine", functools.partial(_body, axis, copies, bool(weights)), jax.ShapeDtypeStruct((rows, width), dtype),
        [plgpu.SMEM((ring, width), slots_SD.dtype), plgpu.Barrier(num_arrivals=1, num_barriers=ring),
         *nvlink.semaphores(axis)])
    return run(route.slot_RK.reshape(-1), *weights, slots_SD)


def _body(axis: Axes, copies: int, weighted: bool, block: jax.Array, slot_F: Ref, *refs: Ref) -> None:
    weights_F = refs[0] if weighted else None
    slots, out, buffers, arrived, *finished = refs[weighted:]
    (rows, width), ring, places = out.shape, buffers.shape[0], slots.shape[0] // ranks_of(axis)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=4)
    mine, chunk = div(rows - block + (nvlink.BLOCKS - 1), nvlink.BLOCKS), rank_on(axis) * places

    def slot_of(turn: Any) -> tuple[jax.Array, jax.Array]:
        """The copy of this turn, and the slot that carries it."""
        copy = (block + div(turn, copies) * nvlink.BLOCKS) * copies + rem(turn, copies)
        return copy, slot_F[copy]

    def fetch(turn: Any) -> None:
        slot, at = slot_of(turn)[1], rem(turn, ring)

        @pl.when(slot >= 0)
        def _():
            source = nvlink.on_peer(slots.at[chunk + rem(slot, places)], axis, div(slot, places))
            nvlink.fetch(source, buffers.at[at], arrived.at[at])
    jax.lax.fori_loop(0, jnp.minimum(mine * copies, ring), lambda turn, _: fetch(turn), None)

    @pl.loop(0, mine)
    def _(i):
        total = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
        for k in range(copies):
            turn = i * copies + k
            copy, slot = slot_of(turn)

            def add(total: jax.Array, at=rem(turn, ring), copy=copy) -> jax.Array:
                plgpu.barrier_wait(arrived.at[at])
                row = plgpu.load(buffers.at[at], layout=layout).astype(jnp.float32)
                return total + (row if weights_F is None else row * weights_F[copy])
            total = jax.lax.cond(slot >= 0, add, lambda total: total, total)
            plgpu.commit_smem()  # all threads have read the slot

            @pl.when(turn + ring < mine * copies)
            def _(turn=turn):
                fetch(turn + ring)
        out[block + i * nvlink.BLOCKS] = total.astype(out.dtype)
    nvlink.finish(axis, block, finished)
