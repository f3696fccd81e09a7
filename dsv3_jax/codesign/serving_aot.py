"""Compiles what serves a model with replicated experts for a pod that is not there, and reads what came out.

Three programs: a decoding step, a chunk of prompts, and the move of one layer's experts to another placement. Of each
the compiler tells memory and the bytes of every collective by mesh axis, per device.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from typing import Any, Literal, NamedTuple

from jax.sharding import Mesh

from dsv3_jax.codesign.collectives import Layout, collectives
from dsv3_jax.codesign.hlo import Walk, parse
from dsv3_jax.codesign.pods import Pod, layout_of, pod_mesh
from dsv3_jax.config import ConfigError, MeshConfig, ModelConfig, Precision, Transport
from dsv3_jax.expert_parallel.replicas import Placement
from dsv3_jax.inference.expert_slots import LayerMover, deployment_on, expert_layers
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.scheduler import Sizes
from dsv3_jax.inference.serving_programs import ServingPrograms
from dsv3_jax.presets import ServingDeployment

Program = Literal["step", "chunk", "move"]


class Sent(NamedTuple):
    """All collectives of one kind along the same mesh axes; bytes are what one device sends."""

    kind: str
    axes: str
    times: float
    bytes: float
    slow_bytes: float
    """Of these, what leaves the node."""
    overlapped_bytes: float
    """Of these, those with matrix products between start and done."""


@dataclasses.dataclass(frozen=True)
class ServingReport:
    """Of one program; bytes are per device."""

    pod: str
    program: Program
    slots: int
    tokens: int
    """Of each device in one run, drafts included; 0 for a move."""
    expert_layers: int
    """In which tokens travel: the prediction modules' too, but in a chunk not the last's, whose output nobody wants."""
    argument_bytes: int
    """Weights and cache."""
    temporary_bytes: int
    peak_bytes: int
    hbm_bytes: int
    fits: bool
    compile_seconds: float
    collectives: list[Sent]
    """Where one round of dispatch is enough; most bytes first."""


def compile_serving(model: ModelConfig, pod: Pod, deployment: ServingDeployment, program: Program, sizes: Sizes, *,
                    chunk: int = 1024, precision: Precision = "fp8",
                    transport: Transport = "padded", dual: bool = False) -> ServingReport:
    """Compiles one program, drafts included if the model has prediction modules.

    Args:
      sizes: of the engine; a step has all its rows, at their full context.
      chunk: tokens of each device; those of devices that share prompts are one chunk, or with `dual` two.
      dual: halves of the rows beside each other (`inference.layers_in_halves`).

    Raises:
      ConfigError: the deployment has other devices than the pod.
    """
    if (deployment.nodes, deployment.devices) != (pod.domains, pod.devices):
        raise ConfigError(f"the deployment has {deployment.devices} devices on {deployment.nodes} nodes, --pod {pod} "
                          f"{pod.devices} on {pod.domains}: choose a pod of {deployment.nodes} nodes of "
                          f"{deployment.devices // deployment.nodes}")
    shared = deployment.context
    mesh = pod_mesh(pod, MeshConfig(data=1, scale_out=pod.domains, scale_up=pod.devices_per_domain // shared,
                                    context=shared))
    began = time.perf_counter()
    compiled = _compiled(model, mesh, deployment, program, sizes, chunk, precision, transport, dual)
    seconds = time.perf_counter() - began
    memory, hbm = compiled.memory_analysis(), pod.hardware.hbm_bytes
    peak = max(memory.peak_memory_in_bytes, memory.argument_size_in_bytes + memory.temp_size_in_bytes
               + memory.output_size_in_bytes - memory.alias_size_in_bytes)
    tokens = {"step": sizes.rows * (1 + model.num_nextn_predict_layers), "chunk": chunk, "move": 0}[program]
    layers = expert_layers(model) - int(program == "chunk" and model.num_nextn_predict_layers > 0)
    return ServingReport(str(pod), program, model.n_routed_experts + deployment.redundant, tokens, layers,
                         memory.argument_size_in_bytes, memory.temp_size_in_bytes, peak, hbm,
                         peak <= hbm, seconds, _sent(compiled.as_text(), layout_of(pod, mesh)))


def _compiled(model: ModelConfig, mesh: Mesh, deployment: ServingDeployment, program: Program, sizes: Sizes,
              chunk: int, precision: Precision, transport: Transport, dual: bool) -> Any:
    placement = Placement.in_order(expert_layers(model), deployment_on(model, mesh, deployment.redundant,
                                                                       deployment.by_group))
    on_mesh = ModelOnMesh(model, mesh, precision=precision, placement=placement, transport=transport, dual=dual,
                          speculative=model.num_nextn_predict_layers > 0, reads_only=program != "step")
    if program == "move":
        return LayerMover(model, mesh, on_mesh.shapes()).compiled[True]
    programs = ServingPrograms(on_mesh, sizes.rows, sizes.pages, sizes.page_size)
    weights, state = programs.shapes()
    width = sizes.pages_per_row
    lanes = 1 + dual
    lowered = (programs.lower_step(weights, state, sizes.rows, width) if program == "step"
               else programs.lower_read(weights, state, chunk * deployment.context // lanes, width, lanes))
    return lowered.compile(programs.options)


def _sent(text: str, layout: Layout) -> list[Sent]:
    totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for found in collectives(Walk(parse(text), {"further_rounds": 0}), layout):
        total = totals[found.kind, "+".join(found.axes)]
        for index, figure in enumerate((1, found.bytes, found.slow_bytes, found.bytes * found.overlapped)):
            total[index] += found.times * figure
    return sorted((Sent(*key, *total) for key, total in totals.items()), key=lambda sent: -sent.bytes)
