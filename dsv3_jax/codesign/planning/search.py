"""Training layouts of a pod, best first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from dsv3_jax.codesign.planning.layers import Machine
from dsv3_jax.codesign.planning.layout import Layout
from dsv3_jax.codesign.planning.predict import Draft, Prediction, draft, finish
from dsv3_jax.codesign.pods import Pod
from dsv3_jax.config import ConfigError, MeshConfig, Precision, RunConfig, check_expert_layout
from dsv3_jax.pipeline.schedules import SCHEDULES

_CHOICES = {"context": (1, 2, 4, 8), "pipe": (1, 2, 4, 8, 16, 32),
            "schedule": tuple(name for name in SCHEDULES if name != "gpipe"),  # 1f1b is as fast with less memory
            "recompute": ("paper", "experts", "full"), "zero": ("zero1", "full")}
SEQUENCES = (1, 2, 4)
"""Of one device in one micro-batch, or of the devices that share one."""


@dataclass(frozen=True)
class Wanted:
    """What the user fixed; None is searched."""

    scale_out: int | None = None
    scale_up: int | None = None
    context: int | None = None
    pipe: int | None = None
    schedule: str | None = None
    micro_batches: int | None = None
    precision: Precision | None = None
    recompute: str | None = None
    zero: str | None = None

    def choices(self, name: str) -> tuple:
        value = getattr(self, name)
        return _CHOICES[name] if value is None else (value,)


@dataclass
class Found:
    """Result of a search."""

    best: list[Prediction] = field(default_factory=list)
    """Quickest first; all fit."""
    tried: int = 0
    """Layouts whose memory and least time were calculated."""
    smallest: Draft | None = None
    """That needs the least memory, whether it fits or not."""


def layouts(config: RunConfig, pod: Pod, wanted: Wanted) -> Iterator[Layout]:
    """All that divide the pod, the experts and the batch. Float8 where the hardware has it; sequences are shared by no
    more devices than must."""
    precision: Precision = wanted.precision or ("fp8" if "fp8" in pod.hardware.peak_flops else "bf16")
    for pipe in wanted.choices("pipe"):
        for context in wanted.choices("context"):
            found = [*_with_context(config, pod, wanted, pipe, context, precision)]
            yield from found
            if found:
                break


def _with_context(config: RunConfig, pod: Pod, wanted: Wanted, pipe: int, context: int,
                  precision: Precision) -> Iterator[Layout]:
    for scale_out, scale_up in _expert_axes(config, pod, wanted, pipe, context):
        data = pod.devices // (pipe * scale_out * scale_up * context)
        kinds = itertools.product(wanted.choices("schedule") if pipe > 1 else (None,), wanted.choices("recompute"),
                                  wanted.choices("zero") if pipe == 1 else ("zero1",))
        for schedule, recompute, zero in kinds:
            for pieces in _micro_batches(config, data * scale_out * scale_up, wanted):
                yield Layout(scale_out, scale_up, data, context, pipe, schedule, pieces, precision, recompute, zero)


def _expert_axes(config: RunConfig, pod: Pod, wanted: Wanted, pipe: int, context: int) -> Iterator[tuple[int, int]]:
    """(scale_out, scale_up) that experts divide over and a stage's devices have: whole domains to a stage."""
    if pod.devices % pipe or (pod.domains % pipe and pipe % pod.domains):
        return
    domains, domain = max(1, pod.domains // pipe), pod.devices_per_domain // max(1, pipe // pod.domains)
    for scale_up in _divisors(domain // context) if domain % context == 0 else ():
        for scale_out in _divisors(domains):
            # Several nodes share experts only if each shares them with all of its own devices.
            if scale_out > 1 and scale_up * context < domain:
                continue
            fixed = (wanted.scale_out in (None, scale_out)) and (wanted.scale_up in (None, scale_up))
            mesh = dataclasses.replace(config.mesh, data=None, scale_out=scale_out, scale_up=scale_up, context=context)
            if fixed and _divides(config, mesh):
                yield scale_out, scale_up


def _divides(config: RunConfig, mesh: MeshConfig) -> bool:
    try:
        check_expert_layout(config.model, mesh)
    except ConfigError:
        return False
    return True


def _micro_batches(config: RunConfig, shards: int, wanted: Wanted) -> list[int]:
    if wanted.micro_batches is not None:
        return [wanted.micro_batches] if config.batch.sequences % (wanted.micro_batches * shards) == 0 else []
    return [config.batch.sequences // (shards * each) for each in SEQUENCES if config.batch.sequences % (shards * each)
            == 0]


def _nearest(number: int, of: int) -> int:
    """The multiple that is nearest."""
    return max(1, round(number / of)) * of


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def search(config: RunConfig, pod: Pod, machine: Machine, wanted: Wanted = Wanted(), keep: int = 5,
           imbalance: float = 1.0) -> Found:
    """The quickest layouts that fit.

    Raises:
      ConfigError: what is wanted divides nothing.
    """
    found = Found()
    candidates = list(layouts(config, pod, wanted))
    if not candidates:
        fixed = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in dataclasses.asdict(wanted).items()
                          if value is not None)
        raise ConfigError(f"no layout of {pod} divides its {pod.devices} devices, {config.model.n_routed_experts} "
                          f"experts in {config.model.n_group} groups and {config.batch.sequences} sequences"
                          + (f" with {fixed}: leave some out" if fixed else
                             f": take another --pod, or --sequences {_nearest(config.batch.sequences, pod.devices)}"))
    drafts = []
    for layout in candidates:
        try:
            known = draft(config, layout, machine, imbalance=imbalance)
        except ConfigError:  # more stages than layers, or not the micro-batches that the schedule takes
            continue
        found.tried += 1
        if found.smallest is None or known.memory_bytes < found.smallest.memory_bytes:
            found.smallest = known
        if known.memory_bytes <= pod.hardware.hbm_bytes:
            drafts.append(known)
    for known in sorted(drafts, key=lambda one: one.least_seconds):
        if len(found.best) == keep and known.least_seconds >= found.best[-1].seconds:
            break  # all that follow take longer
        found.best = sorted([*found.best, finish(known)], key=lambda one: one.seconds)[:keep]
    return found
