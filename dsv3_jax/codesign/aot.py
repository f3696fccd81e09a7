"""Compiles a training step for a pod that is not there, with the pod's own compiler, and reads what came out.

What the compiler's program tells, per device: memory by kind, matrix FLOPs by pass, bytes of every collective by mesh
axis and network, and which of them have matrix products between their start and their done. From those and the
hardware's peak rates follows a floor under the step's time.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import resource
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from dsv3_jax.codesign.collectives import Collective, collectives
from dsv3_jax.codesign.counting import training_flops_per_token
from dsv3_jax.codesign.hlo import (
    Instruction,
    Walk,
    arrays,
    attention_kernel,
    grouped_shape,
    is_grouped_product,
    matrix_flops,
    parse,
    shape_bytes,
)
from dsv3_jax.codesign.memory import state_bytes
from dsv3_jax.codesign.pods import Pod, layout_of, pod_mesh
from dsv3_jax.config import RunConfig
from dsv3_jax.nn.moe import expert_tile
from dsv3_jax.pipeline.executor import FIRST_PART, LAST_PART, LOOP
from dsv3_jax.training.pipelined import check_step, cut_of, program_of
from dsv3_jax.training.step import compile_train_step

PASSES = ("forward", "recomputation", "backward", "other")


@dataclasses.dataclass(frozen=True)
class CollectiveTotal:
    """All collectives of one kind along the same mesh axes. Bytes are what one device sends in a step."""

    kind: str
    axis: str
    """Mesh axes joined by +."""
    count: float
    """Executions in a step."""
    bytes: float
    slow_bytes: float
    """Of `bytes`, those that leave the fast domain."""
    overlapped_bytes: float
    """Of `bytes`, those with matrix products between the collective's start and its done."""
    seconds: float
    """At nominal link rates."""
    hidden_seconds: float
    """Of `seconds`, what the matrix products in between take at peak rate, at most all of it."""
    compute_seconds_between: float
    """What those products take in all."""


@dataclasses.dataclass(frozen=True)
class PodReport:
    """What the compiler made of one step. Bytes and FLOPs are per device and step unless named otherwise."""

    pod: str
    preset: str
    program: str
    devices: int
    mesh: dict[str, int]
    precision: str
    recompute: str
    attention_by: str
    zero: str
    sequences: int
    sequence_length: int
    micro_batches: int
    sequences_per_device: float
    """In one micro-batch."""
    compile_seconds: float
    host_peak_bytes: int
    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    hbm_bytes: int
    fits: bool
    memory_by_kind: dict[str, int]
    largest_buffers: list[dict[str, Any]]
    flops_per_device: float
    flops_per_token: float
    """Matrix FLOPs of all devices for one token, experts evenly loaded."""
    flops_per_token_by_cause: dict[str, float]
    """Adds up to flops_per_token: what the model needs (analytic), and what the program does beyond it."""
    model_flops_per_token: float
    """Analytic, causal, multi-token prediction included."""
    expert_padding_flops_per_token: float
    """Not in flops_per_token: rows that dispatch buffers have room for beyond an even load; kernels skip them."""
    collectives: list[CollectiveTotal]
    overlapped_share: float
    """Of communicated bytes."""
    compute_seconds: float
    fast_seconds: float
    slow_seconds: float
    floor_seconds: float
    """The largest of compute, fast and slow network, each at its nominal rate and perfectly overlapped."""
    scheduled_seconds: float
    """Compute, and the communication that the compiler's schedule leaves in the open."""
    mfu_floor: float
    """Model FLOPs over peak in floor_seconds: an upper bound on MFU."""
    mfu_scheduled: float
    counted_once: list[str]
    """Loops of unknown length, counted as one execution; should be empty."""
    versions: dict[str, str]


class DoesNotFit(Exception):
    """The compiler gave up for want of memory; `needed` bytes, if it said so."""

    def __init__(self, needed: int | None, message: str):
        super().__init__(message)
        self.needed = needed


def host_peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compile_step(config: RunConfig, mesh: Mesh) -> tuple[Any, float]:
    """The compiled training step and the seconds it took, tracing included.

    Raises:
      DoesNotFit: XLA:TPU refuses a program that exceeds the chip's memory.
    """
    start = time.perf_counter()
    try:
        compiled = compile_train_step(config, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"[Uu]sed ([\d.]+)([KMGT])i? of", str(error))
        scale = {"K": 10, "M": 20, "G": 30, "T": 40}
        raise DoesNotFit(int(float(used.group(1)) * 2 ** scale[used.group(2)]) if used else None,
                         str(error).splitlines()[0]) from error
    return compiled, time.perf_counter() - start


def compile_for_pod(config: RunConfig, pod: Pod, preset: str = "", text_to: Path | None = None) -> PodReport:
    """Compiles the training step of `config` for `pod` and reports on it; writes the program's text to `text_to`.

    Raises:
      ConfigError: a layout that the model or the pod does not divide into; before anything compiles.
      DoesNotFit: see `compile_step`.
    """
    mesh = checked_mesh(config, pod)
    compiled, seconds = compile_step(config, mesh)
    text = compiled.as_text()
    if text_to is not None:
        text_to.write_text(text)
    return report(compiled.memory_analysis(), text, seconds, config, pod, mesh, preset)


def checked_mesh(config: RunConfig, pod: Pod) -> Mesh:
    """The mesh, if a micro-batch divides over its devices, and a pipeline has a schedule; `ConfigError` otherwise."""
    mesh = pod_mesh(pod, config.mesh)
    check_step(config, mesh)
    return mesh


def report(memory: Any, text: str, seconds: float, config: RunConfig, pod: Pod, mesh: Mesh,
           preset: str) -> PodReport:
    """What the compiled program says; `memory` is its memory analysis."""
    kind, batch = pod.hardware, config.batch
    tokens = batch.sequences * batch.sequence_length / mesh.size
    # Loops whose length is known at run time only: with experts evenly loaded there is one round of dispatch, and the
    # grouped products that no kernel serves go through their rows tile by tile.
    # Ranks of a pipeline each see all tokens, in their own layers; figures are means over ranks.
    at_once = tokens / batch.micro_batches * config.mesh.pipe
    rows = _rows_of_experts(config, at_once)
    tile = expert_tile(rows * config.mesh.expert_parallel / config.model.n_routed_experts)
    walk = Walk(parse(text), {"micro_batches": batch.micro_batches, "further_rounds": 0, "grouped_matmul": rows / tile,
                              LOOP: _ticks(config)}, _choices(config))
    flops = _flops(walk, config, at_once)
    peak_rate = {form: kind.peak_flops.get(form, kind.peak_flops["bf16"]) for form in ("bf16", "fp8")}
    compute = sum(flops.by_format[form] / peak_rate[form] for form in flops.by_format)
    found = collectives(walk, layout_of(pod, mesh))
    totals = _totals(found, pod, peak_rate["bf16"])
    fast = sum(c.times * c.hop_bytes for c in found) / kind.scale_up.bandwidth
    slow = sum(c.times * c.slow_bytes for c in found) / kind.scale_out.bandwidth
    floor = max(compute, fast, slow)
    scheduled = compute + sum(total.seconds - total.hidden_seconds for total in totals)
    model = training_flops_per_token(config.model, batch.sequence_length)
    sent = sum(total.bytes for total in totals)
    needed = max(memory.peak_memory_in_bytes, memory.argument_size_in_bytes + memory.temp_size_in_bytes
                 + memory.output_size_in_bytes - memory.alias_size_in_bytes)
    return PodReport(
        pod=str(pod), preset=preset, program="train_step", devices=mesh.size, mesh=dict(mesh.shape),
        precision=config.precision, recompute=config.recompute, attention_by=config.attention_by,
        zero=config.mesh.zero, sequences=batch.sequences,
        sequence_length=batch.sequence_length, micro_batches=batch.micro_batches,
        sequences_per_device=batch.micro_batch / mesh.size, compile_seconds=seconds,
        host_peak_bytes=host_peak_bytes(), argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes, peak_bytes=needed, hbm_bytes=kind.hbm_bytes,
        fits=needed <= kind.hbm_bytes, memory_by_kind=memory_by_kind(config, mesh, memory.temp_size_in_bytes),
        largest_buffers=_largest_buffers(walk), flops_per_device=flops.total,
        flops_per_token=flops.total / tokens,
        flops_per_token_by_cause=flops.by_cause(model, tokens, config), model_flops_per_token=model,
        expert_padding_flops_per_token=flops.padding / tokens, collectives=totals,
        overlapped_share=sum(total.overlapped_bytes for total in totals) / sent if sent else 1.0,
        compute_seconds=compute, fast_seconds=fast, slow_seconds=slow, floor_seconds=floor,
        scheduled_seconds=scheduled, mfu_floor=model * tokens / peak_rate["bf16"] / floor,
        mfu_scheduled=model * tokens / peak_rate["bf16"] / scheduled, counted_once=walk.unknown,
        versions=_versions(pod))


def _ticks(config: RunConfig) -> int:
    """Of a pipeline, with the whole batch."""
    return 1 if config.mesh.pipe == 1 else program_of(cut_of(config)).ticks[0]


def _choices(config: RunConfig) -> dict[str, list[float]]:
    """How often the parts of a pipeline's tick take which branch."""
    if config.mesh.pipe == 1:
        return {}
    first, last = program_of(cut_of(config)).shares()
    return {FIRST_PART: first, LAST_PART: last}


def _versions(pod: Pod) -> dict[str, str]:
    compiler = "libtpu" if pod.hardware.kind == "tpu" else "jax-cuda13-plugin"
    return {"jax": jax.__version__, compiler: importlib.metadata.version(compiler)}


class _Flops(NamedTuple):
    """Matrix FLOPs of one device in a step, experts evenly loaded."""

    by_pass: dict[str, float]
    by_format: dict[str, float]
    attention_core: float
    """Scores and values, forward and backward, without recomputation."""
    running_sums: float
    """Cumulative sums that XLA:TPU computes as matrix products, without recomputation."""
    compiler_recomputation: float
    """What XLA computes twice of its own accord, in programs that are far from fitting."""
    scores_again: float
    """Of attention's kernels, whose backward makes scores and the gradients of weights twice."""
    padding: float
    """Left out of the others: rows of the grouped products beyond an even load."""

    @property
    def total(self) -> float:
        return sum(self.by_pass.values())

    def by_cause(self, model: float, tokens: float, config: RunConfig) -> dict[str, float]:
        """FLOPs per token by what they are for; adds up to the total."""
        m = config.model
        layers = m.num_hidden_layers + m.num_nextn_predict_layers
        up_projection = (6.0 * m.kv_lora_rank * m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim) * layers
                         if m.attention == "mla" else 0.0)
        causes = {"model": model, "recomputation": self.by_pass["recomputation"] / tokens,
                  # The analytic count has the lower triangle; the program computes the square and masks it.
                  "masked_attention": self.attention_core / 2 / tokens, "running_sums": self.running_sums / tokens,
                  "compiler_recomputation": self.compiler_recomputation / tokens,
                  # Devices that share a sequence each make all its keys and values from the latents.
                  "context_up_projection": (config.mesh.context - 1) * up_projection}
        if self.scores_again:
            causes["scores_again"] = self.scores_again / tokens
        return {**causes, "other": self.total / tokens - sum(causes.values())}


def _flops(walk: Walk, config: RunConfig, tokens: float) -> _Flops:
    """Counts the program's products; `tokens` is those of one device in one micro-batch."""
    by_pass, by_format = dict.fromkeys(PASSES, 0.0), {"bf16": 0.0, "fp8": 0.0}
    core = sums = again = padding = scores_again = 0.0
    seen: set[str] = set()
    even = _rows_of_experts(config, tokens)
    for computation, line, times in walk.instructions():
        flops = times * matrix_flops(computation, line)
        if not flops:
            continue
        operands = [array for name in line.operands for array in arrays(computation[name].shape)]
        if is_grouped_product(line):
            rows = grouped_shape(computation, line)[0]
            padding += flops * max(0.0, 1 - even / rows)
            flops *= min(1.0, even / rows)
        which = _pass_of(line.op_name)
        by_pass[which] += flops
        fp8 = any(dtype.startswith("f8") for dtype, _ in operands)
        by_format["fp8" if fp8 else "bf16"] += flops
        if which == "recomputation":
            continue
        if _scheduled_as(line) in seen:
            again += flops
        else:
            seen.add(_scheduled_as(line))
            kernel = attention_kernel(line)
            core += flops if kernel is None and "attention_core" in line.op_name else 0.0
            scores_again += flops if kernel == "mla_attention_queries" else 0.0
            sums += flops if re.search("reduce.window|cumsum", line.op_name) else 0.0
    return _Flops(by_pass, by_format, core, sums, again, scores_again, padding)


def _rows_of_experts(config: RunConfig, tokens: float) -> float:
    """That a device's experts get at once, of so many tokens a device in a micro-batch and an even load."""
    return tokens * config.model.num_experts_per_tok / (1 + config.mesh.dual)


def _scheduled_as(line: Instruction) -> str:
    """The instruction's name when XLA:GPU put it in order; copies that rematerialisation made later share it."""
    found = re.search(r'scheduling_name="([^"]*)"', line.attributes)
    return found.group(1) if found else line.name


def _pass_of(op_name: str) -> str:
    """forward, recomputation, backward or other, from the names that JAX's transformations leave."""
    if "rematted_computation" in op_name:
        return "recomputation"
    if "transpose(" in op_name:
        return "backward"
    return "forward" if "jvp(" in op_name else "other"


def _totals(found: list[Collective], pod: Pod, peak: float) -> list[CollectiveTotal]:
    """Sums over collectives of one kind and axis, largest first."""
    kind = pod.hardware
    groups: dict[tuple[str, str], list[Collective]] = defaultdict(list)
    for collective in found:
        groups[collective.kind, "+".join(collective.axes)].append(collective)
    totals = []
    for (name, axis), members in groups.items():
        seconds = [c.times * max(c.hop_bytes / kind.scale_up.bandwidth, c.slow_bytes / kind.scale_out.bandwidth)
                   for c in members]
        between = [c.times * c.flops_between / peak for c in members]
        totals.append(CollectiveTotal(
            name, axis, sum(c.times for c in members), sum(c.times * c.bytes for c in members),
            sum(c.times * c.slow_bytes for c in members),
            sum(c.times * c.bytes for c in members if c.overlapped), sum(seconds),
            sum(map(min, seconds, between)), sum(between)))
    return sorted(totals, key=lambda total: -total.bytes)


def memory_by_kind(config: RunConfig, mesh: Mesh, temporary: int) -> dict[str, int]:
    """Bytes of one device. Exact for the state; of the temporaries, compute weights and summed gradients follow from
    their layouts, and the rest is activations, communication buffers and workspace together."""
    state = state_bytes(config, mesh)
    made = state["compute_weights"] + state["summed_gradients"]
    return {**state, "activations_and_buffers": max(0, temporary - made)}


_NO_BUFFER = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "constant",
              "opt-barrier", "after-all"}


def _largest_buffers(walk: Walk, count: int = 8) -> list[dict[str, Any]]:
    """The largest single results in the schedule, with where they come from; one entry a shape and name."""
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    for name, _ in walk.computations():
        for line in walk.program.computations[name].values():
            if line.opcode in _NO_BUFFER or line.opcode.endswith(("-start", "-done")):
                continue
            for dtype, dims in arrays(line.shape):
                shape = f"{dtype}[{','.join(map(str, dims))}]"
                entry = {"bytes": shape_bytes(shape), "shape": shape, "from": line.op_name}
                seen.setdefault((shape, line.op_name), entry)
    return sorted(seen.values(), key=lambda entry: -entry["bytes"])[:count]
