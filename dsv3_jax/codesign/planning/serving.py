"""How many devices to spread experts over, and how many tokens at once, in prefill and in decode.

Both run two micro-batches that cover each other's exchanges (paper 1, section 2.3.1; paper 2, section 3.4). Decode is
`codesign.decode_limits` with what kernels and networks reach in place of nominal rates; there exchanges go by RDMA and
take no SMs (paper 1, section 4.4.1). In prefill they take SMs as in training. Attention is data parallel: paper 2's
tensor parallelism of 4 is not modelled, and no expert is replicated.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dsv3_jax.codesign.decode_limits import MICRO_BATCHES, Workload, decode_step
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.links import Link
from dsv3_jax.codesign.memory import serving_memory
from dsv3_jax.codesign.planning.layers import Machine, layer_time
from dsv3_jax.codesign.planning.operations import Layer, Work
from dsv3_jax.codesign.planning.pipelined import COMMUNICATING
from dsv3_jax.codesign.pods import Pod
from dsv3_jax.codesign.traffic import random_choices, rows_a_token
from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.expert_parallel.exchange import Wire, row_bytes
from dsv3_jax.expert_parallel.topology import Topology

DECODE_TOKENS = (8, 16, 32, 64, 128, 256, 512)
"""Of one device in one micro-batch. In prefill they are whole prompts."""
_AT_HOME = 1e30
"""Bytes/s at which no byte takes any time."""
ROUTED_TOKENS = 8192
"""Of the random router whose choices are counted."""


class Serving(NamedTuple):
    """One way to serve, and what it gives."""

    expert_devices: int
    tokens: int
    """Of one device in one micro-batch."""
    drafts: int
    seconds: float
    """Of a pass over both micro-batches: the time per output token, or to the first for prompts that fill them."""
    tokens_per_second_user: float
    tokens_per_second_device: float
    components: dict[str, float]
    """Seconds of one layer with experts, one micro-batch."""
    memory: dict[str, float]
    bytes_per_axis: dict[str, float]
    """Sent by one device in a pass."""
    bound: str

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())


@dataclass
class ServingFound:
    """Best for a device's throughput first; all fit."""

    best: list[Serving] = field(default_factory=list)
    tried: int = 0
    smallest: Serving | None = None
    quickest: Serving | None = None
    """Fits, and is the quickest for one user."""


def reached(machine: Machine) -> Hardware:
    """The hardware with the rates that kernels reach in place of its peaks: HBM's, and for products those of the widest
    measured one."""
    hardware, rates = machine.hardware, machine.rates
    peaks = {kind: rates.product(hardware, kind == "fp8", 4096, 7168, False).value
             for kind in ("bf16", "fp8") if kind in hardware.peak_flops}
    return dataclasses.replace(hardware, hbm_bandwidth=rates.bytes_per_second(hardware).value, peak_flops=peaks)


def group_sizes(model: ModelConfig, pod: Pod) -> list[int]:
    """Numbers of devices that experts can be spread over: parts of a fast domain, or whole domains."""
    domain = pod.devices_per_domain
    inside = [size for size in range(1, domain + 1) if domain % size == 0]
    across = [domain * count for count in range(2, pod.domains + 1) if pod.domains % count == 0]
    return [size for size in (*inside, *across) if size <= model.n_routed_experts + model.n_shared_experts]


def decode_plans(model: ModelConfig, pod: Pod, machine: Machine, context: int, least: float = 0.0, keep: int = 5,
                 expert_devices: int | None = None, tokens: int | None = None) -> ServingFound:
    """Of all group sizes and batches.

    Args:
      context: tokens in the cache of a sequence.
      least: tokens a second that each user must have.

    Raises:
      ConfigError: a group that the pod does not have.
    """
    hardware = reached(machine)
    found = ServingFound()
    weight_bytes = 1 if "fp8" in hardware.peak_flops else 2
    for devices in _wanted_groups(model, pod, expert_devices):
        link = hardware.scale_up if devices <= machine.domain else hardware.scale_out
        for batch in DECODE_TOKENS if tokens is None else (tokens,):
            for drafts in range(model.num_nextn_predict_layers + 1):
                if drafts < batch:
                    work = Workload(model, batch, context, dispatch_bytes=weight_bytes, expert_devices=devices,
                                    weight_bytes=weight_bytes, drafts=drafts)
                    _take(found, _decode(work, hardware, link, devices), pod, least, keep)
    return found


def _decode(work: Workload, hardware: Hardware, link: Link, devices: int) -> Serving:
    if devices == 1:  # nothing is sent
        link = dataclasses.replace(link, bandwidth=_AT_HOME, effective=_AT_HOME, latency=None)
    step = decode_step(work, hardware, link, reached=True)
    held = serving_memory(work.model, devices, round(MICRO_BATCHES * work.sequences), work.context, work.weight_bytes)
    sent = 0.0
    if devices > 1:
        away = (devices - 1) / devices
        layers = work.model.num_moe_layers + work.drafts
        sent = MICRO_BATCHES * layers * away * work.rows * work.model.hidden_size * (
            work.dispatch_bytes + work.combine_bytes)
    axis = "scale_up" if link is hardware.scale_up or devices == 1 else "scale_out"
    return Serving(devices, work.tokens, work.drafts, step.token, step.tokens_per_second, step.device_tokens_per_second,
                   {"attention": step.attention, "experts": step.experts, "exchange": step.exchange},
                   held._asdict(), {axis: sent}, link.name if step.bound == "network" else "HBM and tensor cores")


def prefill_plans(model: ModelConfig, pod: Pod, machine: Machine, context: int, least: float = 0.0, keep: int = 5,
                  expert_devices: int | None = None, tokens: int | None = None) -> ServingFound:
    """Of all group sizes and batches of prompts of `context` tokens.

    Args:
      least: prompts' tokens a second that one user must have: `context` over the time to the first token.

    Raises:
      ConfigError: a group that the pod does not have.
    """
    found = ServingFound()
    if tokens is not None and tokens % context:
        raise ConfigError(f"--tokens ({tokens}) must be whole prompts of --context ({context}) in prefill")
    groups = [devices for devices in _wanted_groups(model, pod, expert_devices) if model.n_routed_experts % devices == 0
              and (model.n_group == 1 or model.n_group % max(1, devices // machine.domain) == 0)]
    if not groups:
        raise ConfigError(f"--expert-devices ({expert_devices}) must divide the {model.n_routed_experts} experts, and "
                          f"its nodes the {model.n_group} groups of the router, in prefill")
    for devices in groups:
        for batch in (context, 2 * context, 4 * context) if tokens is None else (tokens,):
            _take(found, _prefill(model, machine, devices, batch, context), pod, least, keep)
    return found


def _prefill(model: ModelConfig, machine: Machine, devices: int, tokens: int, context: int) -> Serving:
    fp8 = "fp8" in machine.hardware.peak_flops
    nodes = max(1, devices // machine.domain)
    rows = rows_a_token(_choices(model), Topology(model.n_routed_experts, nodes, devices // nodes))
    work = Work(model, tokens, context, fp8, "none", rows, fast_devices=devices // nodes)
    wire = row_bytes(model.hidden_size, 2, Wire(dispatch="float8" if fp8 else "plain")) if devices > 1 else None
    counts: dict[Layer, int] = {"dense": model.first_k_dense_replace, "experts": model.num_moe_layers}
    slowdown = COMMUNICATING.slowdown if machine.hardware.kind == "gpu" and wire else 1.0
    seconds, components, sent, bound = 0.0, {}, {}, ""
    for layer, number in counts.items():
        time = layer_time(work, layer, machine, wire)
        computing = time.computing("forward") * (slowdown if time.exchange else 1.0)
        exchanging = time.exchange.forward if time.exchange else 0.0
        seconds += MICRO_BATCHES * number * max(computing, exchanging)
        if layer == "experts":
            components = {"computing": computing, "exchange": exchanging}
            bound = time.exchange.resource if time.exchange and exchanging > computing else "tensor cores and HBM"
            if time.exchange:
                share = (wire.dispatch + wire.combine) / sum(wire) if wire else 0.0
                sent = {"scale_out": time.exchange.bytes_out * share * number * MICRO_BATCHES,
                        "scale_up": time.exchange.bytes_up * share * number * MICRO_BATCHES}
    held = serving_memory(model, devices, MICRO_BATCHES * max(1, tokens // context), max(context, tokens),
                          1 if fp8 else 2)
    return Serving(devices, tokens, 0, seconds, context / seconds, MICRO_BATCHES * tokens / seconds, components,
                   held._asdict(), sent, bound)


@functools.lru_cache(maxsize=4)
def _choices(model: ModelConfig) -> np.ndarray:
    return random_choices(model, ROUTED_TOKENS, seed=0)


def _wanted_groups(model: ModelConfig, pod: Pod, wanted: int | None) -> list[int]:
    sizes = group_sizes(model, pod)
    if wanted is None:
        return sizes
    if wanted not in sizes:
        raise ConfigError(f"--expert-devices ({wanted}) must be a part of the {pod.devices_per_domain} devices of a "
                          f"fast domain of {pod}, or whole domains: one of {', '.join(map(str, sizes))}")
    return [wanted]


def _take(found: ServingFound, plan: Serving, pod: Pod, least: float, keep: int) -> None:
    found.tried += 1
    if found.smallest is None or plan.memory_bytes < found.smallest.memory_bytes:
        found.smallest = plan
    if plan.memory_bytes > pod.hardware.hbm_bytes:
        return
    if found.quickest is None or plan.tokens_per_second_user > found.quickest.tokens_per_second_user:
        found.quickest = plan
    if plan.tokens_per_second_user >= least:
        found.best = sorted([*found.best, plan], key=lambda one: -one.tokens_per_second_device)[:keep]
