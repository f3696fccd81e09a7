"""Which layout to train or serve a model with on a pod, what it will take, and what to change.

  python experiments/plan.py --preset deepseek_v3 --pod h800:256x8 --goal train
  python experiments/plan.py --preset deepseek_v3 --pod gb200:8x72 --goal train --precision bf16 --recompute full
  python experiments/plan.py --preset deepseek_v3 --pod h800:40x8 --goal decode --context 4096 --least 20
  python experiments/plan.py --preset kimi_k2 --pod mine:32x8 --hardware mine.toml --goal prefill --explain

Training searches expert, data and pipeline parallelism, schedules, micro-batches and recomputation (what is given is
kept), predicts a step as paper 1's table 4 splits it, and prints the options that train.py and compile_for_pod.py take.
Serving searches over how many devices experts are spread and how many tokens a device takes at once.

Predictions rest on published rates of kernels on Hopper and of its networks, never on the papers' own times
(dsv3_jax/codesign/planning/rates.py); on other hardware kernels are taken to reach the same share of the peaks. Load is
even, nothing fails and nothing is launched late, so take them for what good code could reach. How near they come to
what DeepSeek measured: experiments/paper/training_step.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from dsv3_jax.codesign.hardware_file import load_hardware
from dsv3_jax.codesign.planning.layers import LayerTime, Machine
from dsv3_jax.codesign.planning.predict import Prediction, what_if
from dsv3_jax.codesign.planning.rates import RATES, kernel_rates
from dsv3_jax.codesign.planning.search import Wanted, search
from dsv3_jax.codesign.planning.serving import Serving, ServingFound, decode_plans, prefill_plans
from dsv3_jax.codesign.pods import Pod, parse_pod
from dsv3_jax.config import ConfigError, Precision, Recompute, RunConfig, named
from dsv3_jax.presets import RUNS
from experiments.command_line import finish, say_line, standard_output_for_json

GIB = 2 ** 30


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to plan. Settings of a layout that are not given are searched."""

    preset: Annotated[str, tyro.conf.arg(help=f"Model and batch: {', '.join(RUNS)}.")] = "deepseek_v3"
    pod: str = "h800:256x8"
    """Hardware and shape, such as h800:256x8 (nodes x GPUs) or v5p:8x8x8 (chips)."""
    goal: Literal["train", "prefill", "decode"] = "train"
    hardware: Path | None = None
    """A TOML file of your own hardware, whose name --pod may then use (dsv3_jax/codesign/hardware_file.py)."""
    kernels: Annotated[str, tyro.conf.arg(help=f"Rates of kernels: {', '.join(RATES)} (of the papers' time).")] = (
        "latest")
    imbalance: float = 1.0
    """Rows of the fullest device over the mean, for which all others wait; training."""
    sequences: int | None = None
    """Of a training step; default the preset's."""
    scale_out: int | None = None
    """Nodes that experts are spread over."""
    scale_up: int | None = None
    """Devices of a node that experts are spread over."""
    context_parallel: int | None = None
    """Devices that share a sequence."""
    pipe: int | None = None
    """Pipeline stages."""
    schedule: str | None = None
    """Of the pipeline."""
    micro_batches: int | None = None
    precision: Precision | None = None
    recompute: Recompute | None = None
    zero: Literal["zero1", "full"] | None = None
    tokens_to_train: float = 14.8e12
    dollars: float = 2.0
    """Of one device's hour (paper 2, table 1)."""
    context: int = 4096
    """Serving: tokens of a prompt, or in the cache."""
    least: float = 20.0
    """Decode: tokens a second that every user must have."""
    expert_devices: int | None = None
    """Serving: devices that experts are spread over."""
    tokens: int | None = None
    """Serving: of one device in one micro-batch."""
    explain: bool = False
    """Tell of every operation its FLOPs or bytes, its rate and where that is from."""
    json: bool = False
    """Print one JSON object to standard output, everything else to standard error."""


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    jax.config.update("jax_platforms", "cpu")  # calculated: no accelerator is touched
    own = None if arguments.hardware is None else load_hardware(arguments.hardware)
    pod = parse_pod(arguments.pod, own)
    machine = Machine(pod.hardware, kernel_rates(arguments.kernels), pod.devices_per_domain)
    with standard_output_for_json(arguments.json) as write_json:
        if remark := machine.rates.taken_over(pod.hardware):
            say_line(f"note: {remark}")
        write_json((train if arguments.goal == "train" else serve)(arguments, pod, machine))


def train(arguments: Arguments, pod: Pod, machine: Machine) -> dict[str, Any]:
    """The best layouts for training."""
    config = named(RUNS, arguments.preset, "--preset")
    if arguments.sequences is not None:
        config = dataclasses.replace(config, batch=dataclasses.replace(
            config.batch, sequences=arguments.sequences, micro_batches=1, ramp_from=None))
    if not arguments.imbalance >= 1:
        raise ConfigError(f"--imbalance ({arguments.imbalance}) must be at least 1: the fullest device has the mean")
    names = [field.name for field in dataclasses.fields(Wanted) if field.name != "context"]
    wanted = Wanted(context=arguments.context_parallel, **{name: getattr(arguments, name) for name in names})
    found = search(config, pod, machine, wanted, imbalance=arguments.imbalance)
    if not found.best:
        least = found.smallest
        raise ConfigError(f"none of {found.tried} layouts fits {pod.hardware.hbm_bytes / GIB:.1f} GiB a device"
                          + (f"; the smallest needs {least.memory_bytes / GIB:.1f}: {' '.join(least.layout.options())}"
                             if least else "") + ". Take more devices, or leave settings out that were given")
    best = found.best[0]
    doubled = what_if(config, best.layout, machine, imbalance=arguments.imbalance)
    told = as_json(best, config, pod, arguments, doubled)
    say_line(f"{found.tried} layouts of {pod} tried; the quickest that fit:")
    for one in found.best:
        say_line(line_of(one, config, pod))
    for line in summary(best, told, pod):
        say_line(line)
    if arguments.explain:
        for line in explanation(best.times):
            say_line(line)
    return told


def line_of(one: Prediction, config: RunConfig, pod: Pod) -> str:
    """One greppable line."""
    layout = one.layout
    return (f"step_seconds {one.seconds:.3f} mfu_causal {one.flops_utilisation(config, pod.hardware):.4f} gib "
            f"{one.memory_bytes / GIB:.1f} pipe {layout.pipe} schedule {layout.schedule or 'none'} data {layout.data} "
            f"scale_out {layout.scale_out} scale_up {layout.scale_up} context {layout.context} micro_batches "
            f"{layout.micro_batches} precision {layout.precision} recompute {layout.recompute} zero {layout.zero}")


def as_json(one: Prediction, config: RunConfig, pod: Pod, arguments: Arguments,
            doubled: dict[str, float]) -> dict[str, Any]:
    """All that is predicted; seconds, bytes, dollars."""
    tokens = one.tokens_per_second(config)
    seconds = arguments.tokens_to_train / tokens
    hours = seconds / 3600 * pod.devices
    best_change = min(doubled, key=lambda change: doubled[change])
    return {"goal": "train", "preset": arguments.preset, "pod": str(pod), "kernels": arguments.kernels,
            "layout": dataclasses.asdict(one.layout), "options": one.layout.options(), "runs_today": runnable(one),
            "step_seconds": one.seconds, "components": one.components, "seconds_by_resource": one.resources,
            "mfu_causal": one.flops_utilisation(config, pod.hardware),
            "mfu_non_causal": one.flops_utilisation(config, pod.hardware, causal=False),
            "tokens_per_second_per_device": tokens / pod.devices, "memory_bytes": one.memory_bytes,
            "memory_by_kind": one.memory, "hbm_bytes": pod.hardware.hbm_bytes, "bytes_per_axis": one.bytes_per_axis,
            "binding_resource": max(one.resources, key=lambda name: one.resources[name]), "what_if_seconds": doubled,
            "change_first": best_change, "tokens": arguments.tokens_to_train, "days": seconds / 86400,
            "device_hours": hours, "dollars": hours * arguments.dollars}


def runnable(one: Prediction) -> bool:
    """Whether the configuration takes the layout."""
    try:
        dataclasses.replace(RUNS["tiny"].mesh, pipe=one.layout.pipe, context=one.layout.context,
                            zero="full" if one.layout.zero == "full" else "zero1")
    except ConfigError:
        return False
    return True


def summary(one: Prediction, told: dict[str, Any], pod: Pod) -> list[str]:
    """What the first layout takes, and why."""
    def shares(parts: dict[str, float], total: float, unit: str, size: float = 1.0) -> str:
        return ", ".join(f"{name} {value / size:.3g} {unit} ({value / total:.0%})" for name, value in
                         sorted(parts.items(), key=lambda item: -item[1]) if value > 0.001 * total)
    lines = ["", f"options: {' '.join(told['options'])}"]
    if not told["runs_today"]:
        lines.append("train.py takes no pipeline whose devices share sequences or gather layer by layer: give --pipe 1 "
                     "for the best layout that it takes")
    lines += [
        f"step: {shares(one.components, one.seconds, 's')}",
        f"waits for: {shares(one.resources, one.seconds, 's')}",
        f"memory: {shares(one.memory, one.memory_bytes, 'GiB', GIB)} of {pod.hardware.hbm_bytes / GIB:.1f}",
        "sent by a device: " + ", ".join(f"{axis} {size / 1e9:.4g} GB" for axis, size in one.bytes_per_axis.items()),
        f"{told['tokens_per_second_per_device']:,.0f} tokens/s a device; {told['tokens'] / 1e12:g}T tokens in "
        f"{told['days']:.1f} days, {told['device_hours'] / 1e3:,.0f}K device hours, {told['dollars'] / 1e6:.2f} M$",
        f"binds: {told['binding_resource']}. What would help: " + ", ".join(
            f"{change} {seconds - one.seconds:+.2f} s" for change, seconds in
            sorted(told["what_if_seconds"].items(), key=lambda item: item[1]))]
    return lines


def explanation(times: dict[Any, LayerTime]) -> list[str]:
    """Every operation of every kind of layer, one micro-batch."""
    lines = []
    for layer, time in times.items():
        lines.append(f"\none layer ({layer}), one micro-batch, one device")
        lines += [f"  {timed.operation.phase:8s} {timed.seconds * 1e3:8.3f} ms  {timed.operation.name}: {timed.why}"
                  for timed in time.operations]
        if time.exchange:
            lines.append(f"  exchange {time.exchange.forward * 1e3:.3f} ms forward, {time.exchange.backward * 1e3:.3f} "
                         f"backward, {time.exchange.bytes_out / 1e6:.1f} MB between nodes and "
                         f"{time.exchange.bytes_up / 1e6:.1f} inside; waits for {time.exchange.resource}")
    return lines


def serve(arguments: Arguments, pod: Pod, machine: Machine) -> dict[str, Any]:
    """The best ways to prefill or decode."""
    model = named(RUNS, arguments.preset, "--preset").model
    plans, least = (decode_plans, arguments.least) if arguments.goal == "decode" else (prefill_plans, 0.0)
    found = plans(model, pod, machine, arguments.context, least, expert_devices=arguments.expert_devices,
                  tokens=arguments.tokens)
    if not found.best:
        raise ConfigError(_why_none(found, pod, arguments))
    say_line(f"{found.tried} ways on {pod} tried; the most tokens of a device:")
    for one in found.best:
        say_line(line_of_serving(one, pod))
    best = found.best[0]
    if found.quickest is not None and arguments.goal == "decode":
        say_line(f"quickest for one user: {line_of_serving(found.quickest, pod)}")
    say_line("one layer with experts, one micro-batch: "
             + ", ".join(f"{name} {seconds * 1e6:.1f} us" for name, seconds in best.components.items())
             + f"; waits for {best.bound}")
    domain = pod.devices_per_domain
    told = best._asdict()
    return {"goal": arguments.goal, "preset": arguments.preset, "pod": str(pod), "kernels": arguments.kernels,
            "layout": {"expert_devices": told.pop("expert_devices"), "tokens": told.pop("tokens"),
                       "drafts": told.pop("drafts")},
            "step_seconds": told.pop("seconds"), "components": told.pop("components"),
            "binding_resource": told.pop("bound"), "memory_bytes": best.memory_bytes,
            "memory_by_kind": told.pop("memory"), "hbm_bytes": pod.hardware.hbm_bytes, "mfu_causal": None,
            "tokens_per_second_per_device": told.pop("tokens_per_second_device"),
            "tokens_per_second_per_node": best.tokens_per_second_device * domain, **told}


def _why_none(found: ServingFound, pod: Pod, arguments: Arguments) -> str:
    if found.quickest is None:
        needed = f"; the smallest needs {found.smallest.memory_bytes / GIB:.1f}" if found.smallest else ""
        return (f"--pod {pod}: none of {found.tried} ways fits {pod.hardware.hbm_bytes / GIB:.1f} GiB a device"
                f"{needed}: take more devices, or a shorter --context")
    return (f"--least ({arguments.least:g}) tokens a second for every user: the most is "
            f"{found.quickest.tokens_per_second_user:.1f}; ask for less")


def line_of_serving(one: Serving, pod: Pod) -> str:
    """One greppable line."""
    return (f"tokens_per_second_device {one.tokens_per_second_device:,.0f} node "
            f"{one.tokens_per_second_device * pod.devices_per_domain:,.0f} user {one.tokens_per_second_user:,.1f} "
            f"pass_ms {one.seconds * 1e3:.2f} expert_devices {one.expert_devices} tokens {one.tokens} drafts "
            f"{one.drafts} gib {one.memory_bytes / GIB:.1f}")


if __name__ == "__main__":
    finish(main)
