"""A dispatch and its combine, compiled for a pod: what the programs send over each network, and the least they could.

Plan, dispatch and combine are three programs, so that every collective belongs to one of them. A padded all-to-all
sends its operand, of which the program tells the size. A ragged one sends the rows in its operand, whose number the
router decides, and so does a kernel: there the bytes are those of rows as counted, times what the program has for a
row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.codesign.collectives import Collective, collectives
from dsv3_jax.codesign.hlo import Walk, parse
from dsv3_jax.codesign.pods import Pod, layout_of, pod_mesh
from dsv3_jax.codesign.traffic import RowsAToken
from dsv3_jax.config import MeshConfig, ModelConfig
from dsv3_jax.expert_parallel.exchange import Wire, combine, dispatch, row_bytes
from dsv3_jax.expert_parallel.plan import Plan, make_plan
from dsv3_jax.expert_parallel.rounds import Quota, round_quota
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import EXPERT_AXES
from dsv3_jax.precision.linear import GROUP_ALIGNMENT
from dsv3_jax.precision.quantised import Carried

ON_ALL = PartitionSpec(EXPERT_AXES)


class Case(NamedTuple):
    """What is exchanged."""

    model: ModelConfig
    tokens: int
    """Of one device."""
    topology: Topology
    wire: Wire
    capacity_factor: float

    @property
    def quota(self) -> Quota:
        reach = self.model.topk_group if self.model.n_group > 1 else self.model.num_experts_per_tok
        return round_quota(self.topology, self.tokens, self.model.num_experts_per_tok, reach, self.capacity_factor)


class Legs(NamedTuple):
    """Jitted functions over all devices of a mesh; arrays are those of all devices, one after another."""

    plan: Callable[[jax.Array, jax.Array], Plan]
    """(experts int32 [N*T, K], weights float32 [N*T, K])."""
    dispatch: Callable[[jax.Array, Plan], Any]
    """(hidden [N*T, D], plan) -> rows [N*P, D], Quantised on a float8 wire."""
    combine: Callable[[jax.Array, Plan], jax.Array]
    """(outputs [N*P, D], plan) -> [N*T, D] in the type of the outputs."""


def legs(case: Case, mesh: Mesh) -> Legs:
    """Plan, dispatch and combine of one round, each a program of its own."""
    def plan(experts_TK: jax.Array, weights_TK: jax.Array) -> Plan:
        return make_plan(experts_TK, weights_TK, case.topology, case.quota, GROUP_ALIGNMENT)

    def out(hidden_TD: jax.Array, plan: Plan) -> Any:
        rows = dispatch(hidden_TD, plan, case.wire)
        return rows.quantised if isinstance(rows, Carried) else rows

    def home(outputs_PD: jax.Array, plan: Plan) -> jax.Array:
        return combine(outputs_PD, plan, case.wire).astype(outputs_PD.dtype)
    return Legs(*(jax.jit(jax.shard_map(leg, mesh=mesh, in_specs=(ON_ALL, ON_ALL), out_specs=ON_ALL, check_vma=False))
                  for leg in (plan, out, home)))


class Program(NamedTuple):
    """What one leg was compiled to."""

    leg: str
    collectives: list[Collective]
    kernels: int
    """Of `pallas_kernels` that exchange rows."""
    temporary_bytes: int


class Compiled(NamedTuple):
    """All legs, and what they have in common."""

    programs: list[Program]
    node_slots: int
    """Of one device for the hop between nodes; 0 without one."""
    device_slots: int
    """Of one device for the hop inside nodes; 0 without one."""
    hops: float
    """Links of the torus that a byte inside a domain crosses on its way; 1 where it is switched."""


def compile_legs(case: Case, pod: Pod) -> Compiled:
    """Compiles the three legs for `pod`, whose devices are all in one expert-parallel group.

    Raises:
      ImportError, ConfigError: see `pod_devices` and `make_mesh`.
    """
    mesh = pod_mesh(pod, MeshConfig(scale_out=case.topology.scale_out, scale_up=case.topology.scale_up))
    run, layout, wide = legs(case, mesh), layout_of(pod, mesh), jnp.dtype(jnp.bfloat16)
    tokens, top_k, width = mesh.size * case.tokens, case.model.num_experts_per_tok, case.model.hidden_size

    def shaped(tree: Any) -> Any:
        spread = NamedSharding(mesh, ON_ALL)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread), tree)
    choices = shaped((np.empty((tokens, top_k), np.int32), np.empty((tokens, top_k), np.float32)))
    hidden = shaped(jax.ShapeDtypeStruct((tokens, width), wide))
    programs = []
    with jax.set_mesh(mesh):
        plan = shaped(jax.eval_shape(run.plan, *choices))
        outputs = shaped(jax.ShapeDtypeStruct((plan.weights_P.shape[0], width), wide))
        for leg, operands in (("plan", choices), ("dispatch", (hidden, plan)), ("combine", (outputs, plan))):
            compiled = getattr(run, leg).lower(*operands).compile()
            walk = Walk(parse(compiled.as_text()), {})
            kernels = sum(line.opcode == "custom-call" and "all_to_all" in line.op_name
                          for _, line, _ in walk.instructions())
            programs.append(Program(leg, collectives(walk, layout), kernels,
                                    compiled.memory_analysis().temp_size_in_bytes))
    node_slots, device_slots = (0 if hop is None else len(hop.copies.choice_S) // mesh.size
                                for hop in (plan.moves.node_hop, plan.moves.device_hop))
    inside = [c for program in programs for c in program.collectives if c.fast_bytes]
    hops = sum(c.hop_bytes for c in inside) / sum(c.fast_bytes for c in inside) if inside else 1.0
    return Compiled(programs, node_slots, device_slots, hops)


class Sent(NamedTuple):
    """Bytes that one device sends in one leg, or in all."""

    leg: str
    slow: float
    fast: float
    least_slow: float
    """Each row once to each other node that has an expert for it; nothing for the plan."""
    least_fast: float
    """Each copy once to each other device of its node that has an expert for it."""


def sent(case: Case, compiled: Compiled, rows: RowsAToken) -> list[Sent]:
    """What the programs send when rows are as counted."""
    bytes_a_row = row_bytes(case.model.hidden_size, jnp.dtype(jnp.bfloat16).itemsize, case.wire)
    slow_rows, fast_rows = case.tokens * rows.slow_rows, case.tokens * rows.fast_rows
    slow_share = _share(slow_rows, compiled.node_slots, case.topology.scale_out)
    fast_share = _share(fast_rows, compiled.device_slots, case.topology.scale_up)
    told = []
    for program in compiled.programs:
        a_row = {"plan": 0, "dispatch": bytes_a_row.dispatch, "combine": bytes_a_row.combine}[program.leg]
        padded = [c for c in program.collectives if c.kind != "ragged-all-to-all"]
        ragged = [c for c in program.collectives if c.kind == "ragged-all-to-all"]
        slow = sum(c.slow_bytes for c in padded) + slow_share * sum(c.slow_bytes for c in ragged)
        fast = sum(c.fast_bytes for c in padded) + fast_share * sum(c.fast_bytes for c in ragged)
        if program.kernels:
            fast += fast_rows * a_row
        told.append(Sent(program.leg, slow, fast, slow_rows * a_row, fast_rows * a_row))
    return [*told, Sent("all", *(sum(numbers) for numbers in zip(*(leg[1:] for leg in told), strict=True)))]


def _share(rows: float, slots: int, ranks: int) -> float:
    """Of the slots for other ranks, those with rows."""
    return rows / (slots * (ranks - 1) / ranks) if slots else 0.0
