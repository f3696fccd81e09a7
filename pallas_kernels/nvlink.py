"""Copies from card to card over NVLink: what the Hopper kernels of dispatch and combine share.

A peer's array is this kernel's own argument, seen on that peer (`plgpu.remote_ref`). Who may touch it when:
- XLA lets no card begin a kernel with peer references before all cards of the mesh have come to it. What a kernel reads
  is written by then, and what it writes is no longer in use.
- A block of threads that has finished with all peers tells each of them so, on that peer's semaphore. All that it
  copied has arrived before: it waits for its copies, and the word is a release. A card's first block waits for the
  words of all blocks of all cards, so no card leaves while it is still written to, or read from.
Both kinds of word have one count, known when the program is compiled, whatever the routing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.peers import device_of, ranks_of

BLOCKS = 32
"""Blocks of threads, each on a multiprocessor of its own: with some 100 KB under way each, more than 450 GB/s times the
2 us of a way there and back, so most of the card is left to others. A guess: no cards were at hand."""
RING_BYTES = 100 * 2 ** 10
LANES = 128

Ref = Any
Axes = tuple[str, ...]


def slots_of_ring(bytes_each: int) -> int:
    return max(2, min(8, RING_BYTES // bytes_each))


def on_peer(ref: Ref, axis: Axes, peer: Any) -> Ref:
    """The same place of the same array on a peer."""
    return ref if ranks_of(axis) == 1 else plgpu.remote_ref(ref, device_of(axis, peer))


def fetch(source: Ref, target: Ref, arrived: Ref) -> None:
    """A row to shared memory. With the promise that it lies inside its array it is one plain copy of any length, which
    needs no descriptor and hence may come from any of any number of peers."""
    plgpu.copy_gmem_to_smem(source, target, arrived, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def semaphores(axis: Axes) -> list[Any]:
    """Scratch for `finish`: none for one rank, since interpretation on a CPU has no semaphores."""
    return [] if ranks_of(axis) == 1 else [plgpu.SemaphoreType.REGULAR]


def finish(axis: Axes, block: Any, finished: list[Ref]) -> None:
    """Tells all peers that this block has done, and leaves only when all have done."""
    for semaphore in finished:
        @pl.loop(0, ranks_of(axis))
        def _(peer, semaphore=semaphore):
            pl.semaphore_signal(semaphore, 1, device_id=device_of(axis, peer))

        @pl.when(block == 0)
        def _(semaphore=semaphore):
            pl.semaphore_wait(semaphore, ranks_of(axis) * BLOCKS)


def kernel(name: str, body: Callable[..., None], out: Any, scratch: list[Any]) -> Callable[..., Any]:
    """`body(block, *operands, *results, *scratch)`, run by `BLOCKS` blocks."""
    def run(*refs: Ref) -> None:
        body(jax.lax.axis_index("block"), *refs)
    run.__name__ = name
    return plgpu.kernel(run, out_type=out, grid=(BLOCKS,), grid_names=("block",), scratch_types=scratch)


def div(a: Any, b: int) -> jax.Array:
    return jax.lax.div(a, jnp.int32(b))


def rem(a: Any, b: int) -> jax.Array:
    return jax.lax.rem(a, jnp.int32(b))
