"""FLOPs and bytes of a step that are calculated, against the compiled programs' reports and real plans."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.codesign.exchange import Case, legs
from dsv3_jax.codesign.step_buffers import dispatch_slots
from dsv3_jax.codesign.step_flops import flops_by_cause, padding_flops
from dsv3_jax.codesign.step_traffic import exchange_traffic
from dsv3_jax.codesign.traffic import RowsAToken
from dsv3_jax.config import BatchConfig, ConfigError, MeshConfig, RunConfig
from dsv3_jax.expert_parallel.exchange import Wire
from dsv3_jax.expert_parallel.topology import Topology
from dsv3_jax.mesh import make_mesh
from dsv3_jax.presets import MODELS, RUNS
from tests.dsv3_jax.codesign.pod_reports import REPORTS, Report


@pytest.mark.parametrize("report", REPORTS, ids=str)
def test_flops_of_compiled_programs_by_cause(report: Report):
    """All but running sums, and what no name explains, 25 millionths."""
    found, predicted = report.told["flops_per_token_by_cause"], flops_by_cause(report.config)
    assert predicted == pytest.approx({name: found[name] for name in predicted}, rel=1e-9)
    assert sum(predicted.values()) == pytest.approx(report.told["flops_per_token"], rel=1e-4)


@pytest.mark.parametrize("report", REPORTS, ids=str)
def test_room_in_the_experts_buffers(report: Report):
    predicted = padding_flops(report.config, report.told["devices"])
    assert predicted == pytest.approx(report.told["expert_padding_flops_per_token"], rel=1e-9)


@pytest.mark.parametrize("report", REPORTS, ids=str)
def test_all_to_alls_of_compiled_programs(report: Report):
    """To the byte, over both networks: the buffers of capacity factor 1.5, in bf16 and float8."""
    found = {total["axis"]: total["bytes"] for total in report.told["collectives"] if total["kind"] == "all-to-all"}
    predicted = exchange_traffic(report.config, report.told["devices"])
    assert predicted.between_nodes == found.pop("scale_out", 0)
    (inside,) = found.values()
    assert predicted.inside_node == pytest.approx(inside, rel=1e-12)


TINY = dataclasses.replace(RUNS["tiny"], precision="bf16", batch=BatchConfig(sequences=16, sequence_length=64))


@pytest.mark.parametrize(("mesh", "factor"), [
    (MeshConfig(scale_out=2, scale_up=4), 1.5), (MeshConfig(scale_out=4, scale_up=2), 1.0),
    (MeshConfig(scale_up=4, context=2), 1.5), (MeshConfig(scale_out=2, scale_up=2, context=2), 100.0),
    (MeshConfig(scale_out=4, data=2), 1.25)], ids=str)
def test_slots_are_those_of_the_plan(eight_devices, mesh, factor):
    """The plan of a mesh's expert-parallel group, by the shapes that JAX gives it."""
    run = dataclasses.replace(TINY, mesh=dataclasses.replace(mesh, capacity_factor=factor))
    slots, tokens, ranks = dispatch_slots(run, 8), 16 * 64 // 8, mesh.expert_parallel
    topology = Topology(16, mesh.scale_out, mesh.scale_up * mesh.context)
    case = Case(run.model, tokens, topology, Wire(), factor)
    real = make_mesh(dataclasses.replace(mesh, data=1), eight_devices[:ranks])
    with jax.set_mesh(real):
        plan = jax.eval_shape(legs(case, real).plan, jax.ShapeDtypeStruct((ranks * tokens, 4), jnp.int32),
                              jax.ShapeDtypeStruct((ranks * tokens, 4), jnp.float32))
    found = [0 if hop is None else len(hop.copies.choice_S) // ranks
             for hop in (plan.moves.node_hop, plan.moves.device_hop)]
    assert [slots.between_nodes, slots.inside_node] == found
    # Rows before the experts are aligned to 128 there, and to a smaller tile here in bf16.
    float8 = dispatch_slots(dataclasses.replace(run, precision="fp8"), 8)
    assert float8.experts == plan.weights_P.shape[0] // ranks
    assert slots.experts <= float8.experts


def test_ragged_transports_send_the_rows_that_there_are():
    """Of the padded bytes two thirds at an even load, which capacity factor 1.5 leaves room beside."""
    run = RUNS["deepseek_v3_h800"]
    even = RowsAToken(4, 7, 4 * 7 / 8, 8 * 7 / 8)
    padded, ragged, kernels = (
        exchange_traffic(dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, transport=transport)), 2048, even)
        for transport in ("padded", "ragged", "pallas"))
    assert ragged.between_nodes / padded.between_nodes == pytest.approx(2 / 3, rel=2e-3)
    assert ragged.inside_node / padded.inside_node == pytest.approx(2 / 3, rel=2e-3)
    assert kernels == (padded.between_nodes, ragged.inside_node)
    with pytest.raises(ConfigError, match=r"mesh.transport \(ragged\) sends rows as the router chooses: count them"):
        exchange_traffic(dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, transport="ragged")), 2048)


def test_a_window_computes_what_its_queries_see_together():
    """Chunks of 512 queries see 512 + 1023 keys, of which each attends to 1024, fewer at the start."""
    model = dataclasses.replace(MODELS["deepseek_v3"], attention_window=1024)
    run = RunConfig(model, batch=BatchConfig(sequence_length=4096), recompute="full")
    found = flops_by_cause(run)["masked_attention"]
    per_key = 3 * 2 * 128 * (192 + 128) * 62
    assert found == pytest.approx(per_key * (512 + 1023 - (1024 - 1024 ** 2 / 2 / 4096)))
