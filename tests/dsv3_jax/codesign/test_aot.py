"""A small model compiled by the real compilers for machines that are not here, against counts by hand.

Two layers, one of them with experts, no multi-token prediction: small enough that every byte on the network can be
written down from the equations of dispatch and of weight gathering.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from dsv3_jax.codesign.aot import PodReport, checked_mesh, compile_for_pod, report
from dsv3_jax.codesign.counting import count_parameters
from dsv3_jax.codesign.pods import parse_pod
from dsv3_jax.config import BatchConfig, ConfigError, MeshConfig, ModelConfig, RunConfig

MODEL = ModelConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=2,
    first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64,
    qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2,
    num_nextn_predict_layers=0, max_position_embeddings=256)
RUN = RunConfig(model=MODEL, batch=BatchConfig(sequences=32, sequence_length=256), recompute="full",
                mesh=MeshConfig(scale_out=2, scale_up=8, zero="full"))
TOKENS = 2 * 256
"""Of one device: 32 sequences on 16."""


def compiled(pod: str, mesh: MeshConfig) -> PodReport:
    """The report, after the checks that hold for every machine."""
    report = compile_for_pod(dataclasses.replace(RUN, mesh=mesh), parse_pod(pod))
    assert report.devices == 16
    assert report.fits
    assert 0 < report.peak_bytes < report.hbm_bytes
    assert report.counted_once == []
    # Master weights 4 bytes, two moments of 2; all but the smallest are spread over the 16 devices.
    parameters = count_parameters(MODEL).main
    assert report.memory_by_kind["weights"] == pytest.approx(4 * parameters / 16, rel=0.02)
    assert report.memory_by_kind["optimizer"] == pytest.approx(4 * parameters / 16, rel=0.02)
    assert report.argument_bytes >= report.memory_by_kind["weights"] + report.memory_by_kind["optimizer"]
    # FLOPs are the analytic ones and what is named.
    causes = report.flops_per_token_by_cause
    assert sum(causes.values()) == pytest.approx(report.flops_per_token)
    assert abs(causes["other"]) < 0.02 * report.model_flops_per_token
    assert causes["recomputation"] > 0
    assert causes["masked_attention"] > 0
    assert report.floor_seconds == max(report.compute_seconds, report.fast_seconds, report.slow_seconds)
    assert report.scheduled_seconds >= report.compute_seconds
    assert all(total.slow_bytes == 0 for total in report.collectives if total.axis == "scale_up")
    assert all(total.slow_bytes == total.bytes for total in report.collectives if total.axis == "scale_out")
    return report


def test_one_slice():
    report = compiled("v5p:2x2x4", MeshConfig(scale_up=16, zero="full"))
    assert report.slow_seconds == 0
    assert {total.kind for total in report.collectives} >= {"all-to-all", "all-gather"}


def test_two_slices():
    report = compiled("v5p:2x2x2,slices=2", RUN.mesh)
    assert report.slow_seconds > 0
    hops = {total.axis: total.bytes for total in report.collectives if total.kind == "all-to-all"}
    assert hops == _bytes_of_dispatch_and_combine()


def _bytes_of_dispatch_and_combine() -> dict[str, float]:
    """Each hop carries the buffers of the quota (capacity 1.5).

    Rows in bf16 five times: dispatch, its recomputation, combine, and the ways back of both. The float32 weights of all
    rows go out twice and their gradient comes back; the int32 choices go once, being kept for the backward.
    """
    width, top_k, reach = MODEL.hidden_size, MODEL.num_experts_per_tok, MODEL.topk_group
    node_rows = min(TOKENS, int(1.5 * TOKENS * reach / 2))
    device_choices = int(1.5 * TOKENS * top_k / 16)
    rows = {("scale_out", 2): 2 * node_rows, ("scale_up", 8): 8 * min(2 * node_rows, 2 * device_choices)}
    return {axis: (ranks - 1) / ranks * count * (5 * 2 * width + 3 * 4 * top_k + 4 * top_k)
            for (axis, ranks), count in rows.items()}


def _bytes_of_gathered_weights() -> float:
    """Full sharding gathers what a layer uses when it runs and again when the backward recomputes it, embedding, head
    and last norm once; in bf16, routers and norm gains in float32. Experts live where they are used."""
    count, m = count_parameters(MODEL).by_part, MODEL
    gains = m.num_hidden_layers * (2 * m.hidden_size + m.q_lora_rank + m.kv_lora_rank)
    matrices = (count["attention"] - m.num_hidden_layers * (m.q_lora_rank + m.kv_lora_rank)
                + count["dense feed-forward"] + count["shared experts"])
    once = 2 * (count["embedding"] + count["output head"]) + 4 * m.hidden_size
    return 15 / 16 * (2 * (2 * matrices + 4 * count["routers"] + 4 * gains) + once)


def test_sixteen_gpus_on_two_hosts():
    report = compiled("h100:2x8", RUN.mesh)
    hops = {total.axis: total.bytes for total in report.collectives if total.kind == "all-to-all"}
    assert hops == _bytes_of_dispatch_and_combine()
    assert sum(total.bytes for total in report.collectives
               if total.kind == "all-gather") == _bytes_of_gathered_weights()
    # XLA:GPU's scheduler hides some of it behind products.
    assert 0 < report.overlapped_share < 1
    assert any(total.hidden_seconds > 0 for total in report.collectives)


def test_copies_made_by_the_compiler_are_named():
    """XLA:GPU's rematerialization leaves copies that were scheduled as their original; here one 8x8 product of two."""
    product = ('dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}, '
               'metadata={op_name="jit(step)/jvp()/dot_general" scheduling_name="dot.1"}')
    text = f"""HloModule m, is_scheduled=true

ENTRY %main (a: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8]{{1,0}} parameter(0)
  %dot.1 = f32[8,8]{{1,0}} {product}
  ROOT %dot.2 = f32[8,8]{{1,0}} {product}
}}
"""
    pod, memory = parse_pod("h100:2x8"), SimpleNamespace(
        peak_memory_in_bytes=0, argument_size_in_bytes=0, temp_size_in_bytes=0, output_size_in_bytes=0,
        alias_size_in_bytes=0)
    causes = report(memory, text, 0.0, RUN, pod, checked_mesh(RUN, pod), "").flops_per_token_by_cause
    assert causes["compiler_recomputation"] == 2 * 8 ** 3 / TOKENS


@pytest.mark.parametrize(("change", "message"), [
    ({"mesh": MeshConfig(scale_up=16)}, r"mesh.scale_up \(16\) does not fit inside one fast domain of 8"),
    ({"mesh": MeshConfig(scale_out=4, scale_up=8)}, r"needs more than the 16 gpu"),
    ({"batch": BatchConfig(sequences=24, sequence_length=256), "mesh": RUN.mesh},
     r"\(24/1=24\) must be divisible by the 16 devices")])
def test_layouts_that_do_not_divide_are_refused_before_compiling(change, message):
    with pytest.raises(ConfigError, match=message):
        compile_for_pod(dataclasses.replace(RUN, **change), parse_pod("h100:2x8"))


