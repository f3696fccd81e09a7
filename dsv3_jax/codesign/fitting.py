"""What makes a program fit a device's memory, found by compiling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple, get_args

from dsv3_jax.codesign.aot import DoesNotFit, PodReport, compile_for_pod
from dsv3_jax.codesign.pods import Pod, pod_mesh
from dsv3_jax.config import Recompute, RunConfig
from dsv3_jax.mesh import batch_shards

GIB = 2 ** 30
RECOMPUTE_LEVELS = get_args(Recompute)


class Attempt(NamedTuple):
    """One layout that was compiled."""

    change: str
    """What differs from the layout asked for, as command-line options."""
    config: RunConfig
    peak_bytes: int | None
    """None where the compiler gave up without saying how much it needed."""
    fits: bool
    report: PodReport | None

    def line(self, hbm_bytes: int) -> str:
        """One greppable line."""
        peak = "unknown" if self.peak_bytes is None else f"{self.peak_bytes / GIB:.2f}"
        floor = "" if self.report is None else (f" floor_seconds {self.report.floor_seconds:.3f} "
                                                f"scheduled_seconds {self.report.scheduled_seconds:.3f}")
        return f"tried {self.change} peak_gib {peak} of {hbm_bytes / GIB:.2f} fits {str(self.fits).lower()}{floor}"


def attempt(change: str, config: RunConfig, pod: Pod) -> Attempt:
    """Compiles `config` and says whether it fits."""
    try:
        report = compile_for_pod(config, pod)
    except DoesNotFit as error:
        return Attempt(change, config, error.needed, False, None)
    return Attempt(change, config, report.peak_bytes, report.fits, report)


def with_micro_batches(config: RunConfig, micro_batches: int) -> RunConfig:
    """`config` with its batch cut into that many pieces."""
    return dataclasses.replace(config, batch=dataclasses.replace(config.batch, micro_batches=micro_batches))


def micro_batch_counts(config: RunConfig, pod: Pod) -> list[int]:
    """Numbers of micro-batches that the batch and the devices divide into, fewest (largest micro-batch) first."""
    shards, batch = batch_shards(pod_mesh(pod, config.mesh)), config.batch
    ramp = batch.ramp_from or batch.sequences
    return [count for count in range(1, batch.sequences // shards + 1)
            if batch.sequences % (count * shards) == 0 and ramp % (batch.sequences // count) == 0]


def remedies(config: RunConfig, pod: Pod) -> Iterator[tuple[str, RunConfig]]:
    """Changes that save memory, mildest first: each alone, then all together with ever smaller micro-batches."""
    stronger = RECOMPUTE_LEVELS[RECOMPUTE_LEVELS.index(config.recompute) + 1:]
    counts = [count for count in micro_batch_counts(config, pod) if count > config.batch.micro_batches]
    sharded = dataclasses.replace(config.mesh, zero="full")
    for level in stronger:
        yield f"--recompute {level}", dataclasses.replace(config, recompute=level)
    if config.mesh.zero != "full":
        yield "--mesh.zero full", dataclasses.replace(config, mesh=sharded)
    if counts:
        yield f"--batch.micro-batches {counts[0]}", with_micro_batches(config, counts[0])
    most = dataclasses.replace(config, mesh=sharded, recompute=RECOMPUTE_LEVELS[-1])
    if stronger and config.mesh.zero != "full":
        yield f"--recompute {most.recompute} --mesh.zero full", most
    for count in counts:
        yield (f"--recompute {most.recompute} --mesh.zero full --batch.micro-batches {count}",
               with_micro_batches(most, count))


def first_that_fits(config: RunConfig, pod: Pod, say: Callable[[str], None]) -> list[Attempt]:
    """Tries `remedies` until one fits; the last attempt is that one, if any is."""
    tried: list[Attempt] = []
    for change, changed in remedies(config, pod):
        tried.append(attempt(change, changed, pod))
        say(tried[-1].line(pod.hardware.hbm_bytes))
        if tried[-1].fits:
            break
    return tried


def search(config: RunConfig, pod: Pod, say: Callable[[str], None]) -> list[Attempt]:
    """For each level of recomputation, least first, the largest micro-batch that fits, by bisection.

    Memory grows with the micro-batch and shrinks with recomputation, so a level's search begins where the last ended.
    The attempts that fit, one a level at most; those of a level that saves nothing over the one before are left out.
    """
    counts = micro_batch_counts(config, pod)
    best: list[Attempt] = []
    high = len(counts)
    for level in RECOMPUTE_LEVELS:
        low, found = 0, None
        while low < high:
            middle = (low + high) // 2
            changed = with_micro_batches(dataclasses.replace(config, recompute=level), counts[middle])
            tried = attempt(f"--recompute {level} --batch.micro-batches {counts[middle]}", changed, pod)
            say(tried.line(pod.hardware.hbm_bytes))
            if tried.fits:
                high, found = middle, tried
            else:
                low = middle + 1
        if found is not None:
            best.append(found)
    return best
