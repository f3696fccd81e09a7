"""Compile a training step for a pod that is not there, with the pod's own compiler, and report what came out.

  python experiments/compile_for_pod.py --preset deepseek_v3_h800
  python experiments/compile_for_pod.py --preset deepseek_v3 --pod v5p:8x8x8 --mesh.scale-up 64 --recompute full
  python experiments/compile_for_pod.py --preset moonlight_16b --pod v6e:8x8 --search

Pods: h800:256x8 (nodes x GPUs; also h100, h200, b200), gb200:8x72 (racks x GPUs), v5p:8x8x8 (chips of a slice; also
v5e, v6e, tpu7x), v5p:4x4x4,slices=4 (several slices). Needs the extra `aot`, two CPU cores and a few GiB of memory; no
accelerator.

It tells whether the step fits, by kind of memory; the matrix FLOPs and what they are for; for every collective and
mesh axis its bytes and how many of them have matrix products between start and done; and a floor under the step's time.
If it does not fit, it tries what would make it fit. Without expert axes in the mesh, they come from the pod.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from dsv3_jax.codesign.aot import DoesNotFit, PodReport, checked_mesh, compile_for_pod
from dsv3_jax.codesign.fitting import GIB, first_that_fits, search
from dsv3_jax.codesign.hardware_file import load_hardware
from dsv3_jax.codesign.pods import Pod, default_mesh, parse_pod
from dsv3_jax.config import ConfigError, RunConfig, named
from dsv3_jax.presets import LAYOUTS, RUNS
from experiments.command_line import finish, say_line, standard_output_for_json, take_option


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to compile, and for what."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    preset: Annotated[str, tyro.conf.arg(help=f"Model, recipe and layout: {', '.join(RUNS)}.")] = "deepseek_v3_h800"
    pod: str | None = None
    """Hardware and shape, such as h800:256x8 or v5p:4x4x4,slices=4; None: the preset's own pod."""
    hardware: Path | None = None
    """A TOML file of your own hardware (see dsv3_jax/codesign/hardware_file.py), whose name --pod may then use."""
    search: bool = False
    """Find the largest micro-batch that fits for each level of recomputation."""
    remedies: bool = True
    """When it does not fit, try what would make it fit."""
    program_text: Path | None = None
    """Also write the compiled program's text to this file."""
    json: bool = False
    """Print one JSON object to standard output, everything else to standard error."""


def parse(arguments: list[str]) -> Arguments:
    """Arguments over the chosen preset's defaults."""
    preset, rest = take_option(arguments, "--preset", "deepseek_v3_h800")
    default = Arguments(config=named(RUNS, preset, "--preset"), preset=preset)
    return tyro.cli(Arguments, args=rest, default=default, description=__doc__,
                    config=(tyro.conf.AvoidSubcommands,))


def main() -> None:
    """Entry point."""
    arguments = parse(sys.argv[1:])
    jax.config.update("jax_platforms", "cpu")  # compiled for the pod; nothing runs, and no accelerator is touched
    if arguments.pod is None and arguments.preset not in LAYOUTS:
        raise ConfigError(f"--preset {arguments.preset} has no pod of its own: name one, such as --pod h800:256x8")
    own = None if arguments.hardware is None else load_hardware(arguments.hardware)
    pod = parse_pod(arguments.pod or LAYOUTS[arguments.preset].pod, own)
    config = dataclasses.replace(arguments.config,
                                 mesh=default_mesh(arguments.config.model, pod, arguments.config.mesh))
    with standard_output_for_json(arguments.json) as write_json:
        if arguments.search:
            write_json(search_report(config, pod))
        else:
            write_json(single_report(arguments, config, pod))


def single_report(arguments: Arguments, config: RunConfig, pod: Pod) -> dict[str, Any]:
    """Compiles once; if that does not fit, tries remedies."""
    mesh = config.mesh
    checked_mesh(config, pod)  # a layout that does not divide is told before anything else
    say_line(f"compiling {arguments.preset} for {pod}: {pod.devices} devices, scale_up {mesh.scale_up}, scale_out "
             f"{mesh.scale_out}, zero {mesh.zero}, recompute {config.recompute}, {config.batch.sequences} sequences x "
             f"{config.batch.sequence_length} in {config.batch.micro_batches} micro-batches")
    told: dict[str, Any]
    try:
        report = compile_for_pod(config, pod, arguments.preset, arguments.program_text)
    except DoesNotFit as error:
        excess = "" if error.needed is None else f" by {(error.needed - pod.hardware.hbm_bytes) / GIB:.2f} GiB"
        say_line(f"does not fit{excess}: the compiler refused it ({error})")
        told = {"pod": str(pod), "preset": arguments.preset, "fits": False, "peak_bytes": error.needed,
                "hbm_bytes": pod.hardware.hbm_bytes}
    else:
        for line in table(report):
            say_line(line)
        told = dataclasses.asdict(report)
        if not report.fits:
            say_line(f"does not fit by {(report.peak_bytes - report.hbm_bytes) / GIB:.2f} GiB")
    if not told["fits"] and arguments.remedies:
        tried = first_that_fits(config, pod, say_line)
        fitting = [attempt for attempt in tried if attempt.fits]
        say_line(f"fits with {fitting[0].change}" if fitting else
                 "nothing tried makes it fit: use more devices, or spread experts over more of them")
        told["tried"] = [{"change": attempt.change, "peak_bytes": attempt.peak_bytes, "fits": attempt.fits}
                         for attempt in tried]
    return told


def search_report(config: RunConfig, pod: Pod) -> dict[str, Any]:
    """The largest micro-batch of each level of recomputation."""
    best = [(attempt.change, attempt.report) for attempt in search(config, pod, say_line) if attempt.report]
    for change, report in best:
        say_line(f"fits {change}: {(report.hbm_bytes - report.peak_bytes) / GIB:.2f} GiB left, scheduled "
                 f"{report.scheduled_seconds:.2f} s a step")
    if not best:
        say_line("nothing fits: use more devices, or --mesh.zero full")
    return {"pod": str(pod), "fits": bool(best),
            "best": [{"change": change, **dataclasses.asdict(report)} for change, report in best]}


def table(report: PodReport) -> list[str]:
    """The report for people."""
    def gib(size: float) -> str:
        return f"{size / GIB:10.3f} GiB"
    axes = " ".join(f"{axis}={size}" for axis, size in report.mesh.items())
    lines = [f"devices {report.devices} ({axes}), {report.sequences_per_device:g} sequences a device in a micro-batch",
             f"compile_seconds {report.compile_seconds:.1f} host_peak_gib {report.host_peak_bytes / GIB:.2f}",
             "memory of one device",
             f"  arguments    {gib(report.argument_bytes)}", f"  temporaries  {gib(report.temporary_bytes)}",
             f"  peak         {gib(report.peak_bytes)} of {report.hbm_bytes / GIB:.2f}: "
             + ("fits" if report.fits else "DOES NOT FIT"), "  of these"]
    lines += [f"    {name:24s} {gib(size)}" for name, size in report.memory_by_kind.items()]
    lines += ["  largest single buffers"]
    lines += [f"    {gib(entry['bytes'])} {entry['shape']:28s} {_short(entry['from'])}"
              for entry in report.largest_buffers[:5]]
    lines += [f"matrix FLOPs of one device in a step {report.flops_per_device:.4g}; for one token "
              f"{report.flops_per_token / 1e9:.1f} GFLOP, of which"]
    lines += [f"    {name:24s} {value / 1e9:10.2f} GFLOP" for name, value in report.flops_per_token_by_cause.items()]
    lines += [f"  room in expert buffers beyond an even load, skipped by the kernels: "
              f"{report.expert_padding_flops_per_token / 1e9:.1f} GFLOP a token",
              "collectives, sent by one device in a step",
              f"  {'kind':20s} {'axis':28s} {'count':>8s} {'GB':>10s} {'slow GB':>9s} {'overlap':>8s} {'s':>8s} "
              f"{'hidden s':>9s}"]
    lines += [f"  {c.kind:20s} {c.axis:28s} {c.count:8.0f} {c.bytes / 1e9:10.3f} {c.slow_bytes / 1e9:9.3f} "
              f"{c.overlapped_bytes / c.bytes if c.bytes else 0:8.1%} {c.seconds:8.3f} {c.hidden_seconds:9.3f}"
              for c in report.collectives]
    lines += [f"overlapped_share {report.overlapped_share:.3f}",
              f"floor_seconds {report.floor_seconds:.3f} = largest of compute {report.compute_seconds:.3f}, "
              f"fast network {report.fast_seconds:.3f}, slow network {report.slow_seconds:.3f}; "
              f"mfu_floor {report.mfu_floor:.1%}",
              f"scheduled_seconds {report.scheduled_seconds:.3f} with what the schedule leaves in the open; "
              f"mfu {report.mfu_scheduled:.1%}"]
    return lines + [f"warning: loop of unknown length counted once: {loop}" for loop in report.counted_once]


def _short(op_name: str) -> str:
    plumbing = ("while", "body", "eval_jaxpr", "closed_call", "jit(step)")
    parts = [part for part in op_name.split("/") if part not in plumbing]
    return "/".join(parts[-4:])


if __name__ == "__main__":
    finish(main)
