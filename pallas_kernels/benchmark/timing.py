"""How long a call takes on the device, with its operands in memory and not in a cache.

A step overwrites a buffer that is larger than any cache and then makes the call. Steps are enqueued one after the other
and waited for once, so the host's part is hidden: overwriting takes the device longer than a call takes the host. The
same number of steps without the call is taken off. Nothing loops inside a program, so there is nothing that a compiler
could move out of a loop or merge; every call is made, since its result leaves its program. What a call runs beside its
kernel, such as the transpose of scales, counts.

On a GPU a step is one program. The barrier in it keeps the two parts apart and in order (the compiled schedule has the
kernel after the overwriting, on the same stream). XLA:TPU would bring the operands into VMEM while it overwrites; so
elsewhere they are two programs.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FLUSH_BYTES = 2 ** 28
"""Of the buffer: five times the L2 of an H100."""


class Timing(NamedTuple):
    """A median and what it is worth."""

    seconds: float
    """Median of what a step took longer with the call than without."""
    spread: float
    """Half of the distance between the quartiles."""
    host_bound: bool
    """Whether the host was as slow as the device, so that the time may be the host's."""

    @property
    def clear(self) -> bool:
        """Whether the time stands out of the noise."""
        return self.seconds > 3 * self.spread and not self.host_bound


def paired(without: Callable[[], Any], with_call: Callable[[], Any], wait: Callable[[Any], Any], calls: int,
           repeats: int) -> Timing:
    """Times steps of two kinds in turn, `calls` of each at once, `repeats` times after two rounds of warming up."""
    differences, hosts = [], []
    for _ in range(2 + repeats):
        _, before = _seconds(without, wait, calls)
        host, after = _seconds(with_call, wait, calls)
        differences.append((after - before) / calls)
        hosts.append(host / after)
    lower, median, upper = statistics.quantiles(differences[2:], n=4, method="inclusive")
    return Timing(median, (upper - lower) / 2, statistics.median(hosts[2:]) > 0.9)


def fastest(ways: Sequence[Callable[[], Timing]]) -> Timing:
    """The shortest of those that can be timed.

    Raises:
      RuntimeError: none can; says why not the last.
    """
    times, problem = [], "nothing to time"
    for way in ways:
        try:
            times.append(way())
        except Exception as error:  # what XLA and kernels raise has no common class
            problem = first_line(error)
    if not times:
        raise RuntimeError(problem)
    return min(times)


def first_line(error: Exception) -> str:
    """What an error is, without the pages that compilers append."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _seconds(step: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> tuple[float, float]:
    """(until all are enqueued, until all are done)."""
    began = time.perf_counter()
    for _ in range(calls):
        last = step()
    enqueued = time.perf_counter()
    wait(last)
    return enqueued - began, time.perf_counter() - began


class Timer:
    """Times calls of JAX functions."""

    def __init__(self, flush_bytes: int = FLUSH_BYTES, calls: int = 16, repeats: int = 11):
        self.calls, self.repeats = calls, repeats
        self._junk = jnp.zeros((flush_bytes // 4,), jnp.float32)

    def __call__(self, run: Callable[..., Any], *operands: jax.Array) -> Timing:
        """Of `run(*operands)`, jitted here."""
        flush, step = jax.jit(_overwrite, donate_argnums=0), _step(run)

        def without() -> jax.Array:
            self._junk = flush(self._junk)
            return self._junk

        def with_call() -> Any:
            self._junk, out = step(self._junk, *operands)
            return self._junk, out
        return paired(without, with_call, jax.block_until_ready, self.calls, self.repeats)


def _overwrite(junk: jax.Array) -> jax.Array:
    return junk + 1


def _step(run: Callable[..., Any]) -> Callable[..., tuple[jax.Array, Any]]:
    """(buffer, *operands) -> (buffer, result)."""
    if jax.default_backend() == "gpu":
        return jax.jit(lambda junk, *operands: flush_and_run(run, junk, *operands), donate_argnums=0)
    flush, call = jax.jit(_overwrite, donate_argnums=0), jax.jit(run)
    return lambda junk, *operands: (flush(junk), call(*operands))


def flush_and_run(run: Callable[..., Any], junk: jax.Array, *operands: jax.Array) -> tuple[jax.Array, Any]:
    """A step in one program."""
    junk, operands = jax.lax.optimization_barrier((_overwrite(junk), operands))
    return junk, run(*operands)


class Peaks(NamedTuple):
    """The most that this device was seen to reach."""

    fp8_flops: float
    bf16_flops: float
    bytes_per_second: float


def measured_peaks(timer: Timer, fp8: tuple[Callable[..., Any], ...], bf16: Callable[..., Any], size: int = 8192,
                   copied: int = 2 ** 30) -> Peaks:
    """From square products of `size`, by XLA, and a pass over `copied` bytes that reads and writes them all.

    `fp8` and `bf16` are functions of the two operands.
    """
    keys = jax.random.split(jax.random.key(0))
    x, y = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    narrow = x.astype(jnp.float8_e4m3fn), y.astype(jnp.float8_e4m3fn)
    flops = 2. * size ** 3
    return Peaks(flops / fastest([functools.partial(timer, run, *narrow) for run in fp8]).seconds,
                 flops / timer(bf16, x, y).seconds,
                 2 * copied / timer(_overwrite, jnp.zeros((copied // 4,), jnp.float32)).seconds)
