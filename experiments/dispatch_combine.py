"""What dispatch and combine send over each network, compiled for pods, beside the least that any exchange must send.

  python experiments/dispatch_combine.py --out experiments/results/dispatch_combine
  python experiments/dispatch_combine.py --pods h800:8x8 --transports ragged --combine logfmt10
  python experiments/dispatch_combine.py --measure --mesh.scale-out 2 --mesh.scale-up 4

A MoE layer's exchange at paper size: 4096 tokens a device of 7168 channels, 8 of 256 experts in at most 4 of 8 nodes,
chosen at random; there in E4M3, back in bf16. Plan, dispatch and combine are compiled for each pod and transport.
Padded exchanges send whole buffers, whose bytes the program tells; ragged ones and kernels the rows in them, whose
number is counted from the choices. The least is one copy of a token for each other node that has an expert of it, and
one for each other device of the node. Times are bytes over the links' nominal rates. DeepEP's measured rates (on H800)
count a token's own node too, so its times here are those bytes over its rates.

With --measure the exchange also runs, on the devices at hand: checked (with experts that return what they get, a token
comes home times the sum of its weights), timed, and told as rates by DeepEP's count. Compiling needs the extra `aot`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding

from dsv3_jax.codesign.exchange import ON_ALL, Case, compile_legs, legs, sent
from dsv3_jax.codesign.pods import Pod, parse_pod, pod_devices
from dsv3_jax.codesign.traffic import RowsAToken, random_choices, rounds_needed, rows_a_token
from dsv3_jax.config import Combine, ConfigError, MeshConfig, ModelConfig, Transport, named
from dsv3_jax.expert_parallel.exchange import Wire, row_bytes
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import make_mesh
from dsv3_jax.precision.quantised import Quantised
from dsv3_jax.presets import MODELS
from dsv3_jax.training import runtime
from experiments.command_line import finish, provenance, say_line, standard_output_for_json, write_report

DEEPEP_TOKENS = 4096
DEEPEP = {16: (43.05e9, 42.47e9), 32: (58.02e9, 56.96e9), 64: (50.58e9, 48.54e9), 128: (45.34e9, 41.6e9)}
"""Bytes/s of dispatch in E4M3 and combine in bf16 by GPUs, 8 a node, H800, so many tokens each of DeepSeek-V3's
shape (paper 1, figure 7)."""
REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to exchange, and for which machines."""

    pods: tuple[str, ...] = ("h100:8x8", "v5p:4x4x4")
    """Compiled for all devices of each (compile_for_pod.py tells what there is); experts over all of them. Several
    slices, such as v5p:2x2x2,slices=8, take the compiler many minutes."""
    transports: tuple[Transport, ...] = ("padded", "ragged", "pallas")
    preset: str = "deepseek_v3"
    """The model: its width, experts, groups and limit."""
    tokens: int = 4096
    """Of one device."""
    combine: Combine = "plain"
    """How outputs travel home."""
    capacity_factor: float | None = None
    """Room in buffers over the balanced load, which padded exchanges pay for; None: the least, in steps of a
    twentieth, with which these choices travel in one round."""
    seed: int = 0
    measure: bool = False
    """Run on the devices at hand, on --mesh, instead of compiling for --pods."""
    mesh: MeshConfig = MeshConfig()
    out: Path | None = None
    """Write OUT.json and OUT.md."""
    json: bool = False
    """Print one JSON object."""

    @property
    def model(self) -> ModelConfig:
        return named(MODELS, self.preset, "--preset")


def case_of(arguments: Arguments, scale_out: int, scale_up: int, transport: Transport = "padded") -> Case:
    """The exchange on so many nodes and devices of each, without room beyond the balanced load."""
    experts, devices = arguments.model.n_routed_experts, scale_out * scale_up
    if experts % devices:
        raise ConfigError(f"{devices} devices do not divide the {experts} experts of --preset {arguments.preset}: take "
                          f"a pod or mesh with {math.gcd(experts, devices)}")
    wire = Wire(dispatch="float8", combine=arguments.combine, transport=transport)
    return Case(arguments.model, arguments.tokens, Topology(experts, scale_out, scale_up), wire, 1.0)


def choices_for(arguments: Arguments, case: Case) -> tuple[np.ndarray, RowsAToken, float]:
    """Choices of all devices' tokens, one device after another; their rows; and the room that they take or are given.
    """
    experts_TK = random_choices(case.model, case.tokens * case.topology.devices, arguments.seed)
    by_home = experts_TK.reshape(case.topology.devices, case.tokens, -1).swapaxes(0, 1)
    counted = rows_a_token(by_home.reshape(experts_TK.shape), case.topology)
    for twentieths in itertools.count(20):
        factor = arguments.capacity_factor or twentieths / 20
        rounds = rounds_needed(experts_TK, case.topology, case._replace(capacity_factor=factor).quota)
        if rounds == 1:
            return experts_TK, counted, factor
        if arguments.capacity_factor:
            raise ConfigError(f"--capacity-factor {factor}: these choices take {rounds} rounds, of which one would be "
                              "told: raise it, or leave it out")
    raise AssertionError


def compiled_for(arguments: Arguments, pod: Pod) -> list[dict[str, Any]]:
    """A row for each transport and leg."""
    told, (_, counted, factor) = [], choices_for(arguments, case_of(arguments, pod.domains, pod.devices_per_domain))
    for transport in arguments.transports:
        case = case_of(arguments, pod.domains, pod.devices_per_domain, transport)._replace(capacity_factor=factor)
        start = time.perf_counter()
        compiled = compile_legs(case, pod)
        say_line(f"compiled {pod} {transport} in {time.perf_counter() - start:.0f} s")
        kind = pod.hardware
        for leg in sent(case, compiled, counted):
            told.append({"pod": str(pod), "transport": transport, "capacity_factor": factor, **leg._asdict(),
                         "slow_ratio": leg.slow / leg.least_slow if leg.least_slow else None,
                         "fast_ratio": leg.fast / leg.least_fast if leg.least_fast else None,
                         "slow_ms": 1e3 * leg.slow / kind.scale_out.bandwidth,
                         "fast_ms": 1e3 * leg.fast * compiled.hops / kind.scale_up.bandwidth})
    return told


def deepep(seed: int) -> list[dict[str, Any]]:
    """The time that DeepEP's measured rates mean, by GPUs."""
    v3 = MODELS["deepseek_v3"]
    bytes_ = row_bytes(v3.hidden_size, 2, Wire(dispatch="float8"))
    told = []
    for gpus, (out, home) in DEEPEP.items():
        nodes = gpus // 8
        # Its benchmark has as many groups as nodes, and at most 4 of them for a token.
        model = dataclasses.replace(v3, n_group=nodes, topk_group=min(4, nodes))
        experts_TK = random_choices(model, 65_536, seed)
        reached = DEEPEP_TOKENS * rows_a_token(experts_TK, Topology(model.n_routed_experts, nodes, 8)).nodes
        told.append({"gpus": gpus, "dispatch_gb_s": out / 1e9, "combine_gb_s": home / 1e9,
                     "dispatch_ms": 1e3 * reached * bytes_.dispatch / out,
                     "combine_ms": 1e3 * reached * bytes_.combine / home})
    return told


def measured(arguments: Arguments) -> list[dict[str, Any]]:
    """A row for each transport: medians on the devices at hand."""
    mesh = make_mesh(arguments.mesh)
    if arguments.mesh.expert_parallel == 1 or mesh.size != arguments.mesh.expert_parallel:
        raise ConfigError(f"--measure needs all {mesh.size} devices in one expert-parallel group of at least 2: set "
                          "--mesh.scale-out and --mesh.scale-up so that their product is the number of devices")
    return [one_measured(arguments, mesh, transport) for transport in arguments.transports]


def one_measured(arguments: Arguments, mesh: jax.sharding.Mesh, transport: Transport) -> dict[str, Any]:
    """Runs and checks one exchange."""
    case = case_of(arguments, arguments.mesh.scale_out, arguments.mesh.scale_up * arguments.mesh.context, transport)
    experts_TK, counted, factor = choices_for(arguments, case)
    case, rng = case._replace(capacity_factor=factor), np.random.default_rng(arguments.seed)
    hidden_TD = rng.normal(size=(len(experts_TK), case.model.hidden_size)).astype(np.float32)
    weights_TK = rng.uniform(size=experts_TK.shape).astype(np.float32)
    place = NamedSharding(mesh, ON_ALL)
    run = legs(case, mesh)
    with jax.set_mesh(mesh):
        hidden, experts, weights = (jax.device_put(x, place) for x in (
            hidden_TD.astype(jnp.bfloat16), experts_TK, weights_TK))
        plan = run.plan(experts, weights)
        rows = run.dispatch(hidden, plan)
        outputs = weighted(rows, plan.weights_P)
        home_TD = np.asarray(run.combine(outputs, plan), np.float32)
        seconds = [median_seconds(step) for step in (
            lambda: run.plan(experts, weights), lambda: run.dispatch(hidden, plan), lambda: run.combine(outputs, plan))]
    expected_TD = hidden_TD * weights_TK.sum(axis=1, keepdims=True)
    error = float(np.linalg.norm(home_TD - expected_TD) / np.linalg.norm(expected_TD))
    if not error < 0.05:  # E4M3 rounds by up to 1/16, 2.6% in the mean square; a lost or foreign row costs far more
        raise RuntimeError(f"what came home differs from what was sent by {error:.1%}: the exchange is wrong")
    bytes_ = row_bytes(case.model.hidden_size, 2, case.wire)
    return {"transport": transport, "mesh": dict(mesh.shape), "capacity_factor": factor, "error": error,
            "plan_ms": 1e3 * seconds[0], "dispatch_ms": 1e3 * seconds[1], "combine_ms": 1e3 * seconds[2],
            "dispatch_gb_s": case.tokens * counted.nodes * bytes_.dispatch / seconds[1] / 1e9,
            "combine_gb_s": case.tokens * counted.nodes * bytes_.combine / seconds[2] / 1e9}


@jax.jit
def weighted(rows_PD: jax.Array | Quantised, weights_P: jax.Array) -> jax.Array:
    """bf16 [P, D]: outputs of experts that return their input."""
    wide_PD = rows_PD.dequantise() if isinstance(rows_PD, Quantised) else rows_PD.astype(jnp.float32)
    return (wide_PD * weights_P[:, None]).astype(jnp.bfloat16)


def median_seconds(step: Callable[[], Any]) -> float:
    """Of a call and its end on all devices, after two to warm up."""
    taken = []
    for _ in range(2 + REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(step())
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def as_markdown(result: dict[str, Any]) -> str:
    """Tables a person reads."""
    about = result["about"]
    lines = ["# Dispatch and combine", "", f"`{about['command']}`", "",
             f"{about['device']}; jax {about['jax']}, Python {about['python']}, {about['date']}.", ""]
    if "measured" in result:
        lines += ["| transport | plan ms | dispatch ms | combine ms | dispatch GB/s | combine GB/s | error |",
                  "|---|---:|---:|---:|---:|---:|---:|"]
        lines += [f"| {row['transport']} | {row['plan_ms']:.2f} | {row['dispatch_ms']:.2f} | {row['combine_ms']:.2f} | "
                  f"{row['dispatch_gb_s']:.2f} | {row['combine_gb_s']:.2f} | {row['error']:.1%} |"
                  for row in result["measured"]]
        return "\n".join(lines) + "\n"
    lines += [f"{about['tokens']} tokens a device, {about['preset']}, random choices that travel in one round. Room in "
              "buffers over the balanced load; MB (1e6 bytes) one device sends over each network, over the least that "
              "any exchange must; milliseconds at nominal rates, one network after the other.", "",
              "| pod | transport | room | leg | slow MB | over least | fast MB | over least | slow ms | fast ms |",
              "|---|---|---:|---|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {row['pod']} | {row['transport']} | {row['capacity_factor']:.2f} | {row['leg']} | "
              f"{row['slow'] / 1e6:.2f} | "
              f"{as_ratio(row['slow_ratio'])} | {row['fast'] / 1e6:.2f} | {as_ratio(row['fast_ratio'])} | "
              f"{row['slow_ms']:.3f} | {row['fast_ms']:.3f} |" for row in result["compiled"]]
    lines += ["", f"DeepEP on H800, {DEEPEP_TOKENS} tokens of DeepSeek-V3's shape (paper 1, figure 7), and the time "
              "its rates mean:", "",
              "| GPUs | dispatch GB/s | combine GB/s | dispatch ms | combine ms |", "|---:|---:|---:|---:|---:|"]
    lines += [f"| {row['gpus']} | {row['dispatch_gb_s']:.2f} | {row['combine_gb_s']:.2f} | {row['dispatch_ms']:.2f} | "
              f"{row['combine_ms']:.2f} |" for row in result["deepep"]]
    return "\n".join(lines) + "\n"


def as_ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    with standard_output_for_json(arguments.json) as write_json:
        pods = [] if arguments.measure else [parse_pod(name) for name in arguments.pods]
        if arguments.measure:
            runtime.start(arguments.mesh)
        else:
            jax.config.update("jax_platforms", "cpu")  # compiled for pods; no accelerator is touched
        for pod in pods:  # what is not installed or does not divide is told before anything compiles
            case_of(arguments, pod.domains, pod.devices_per_domain)
            pod_devices(pod)
        result: dict[str, Any] = {"about": {**provenance(), "preset": arguments.preset, "tokens": arguments.tokens}}
        if arguments.measure:
            result["measured"] = measured(arguments)
        else:
            result["compiled"] = [row for pod in pods for row in compiled_for(arguments, pod)]
            result["deepep"] = deepep(arguments.seed)
        write_report(arguments.out, result, as_markdown(result))
        write_json(result)
    if not arguments.json:
        print(as_markdown(result), end="")


if __name__ == "__main__":
    finish(main)
