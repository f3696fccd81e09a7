"""Exchanges beside computing, in the schedules that the real compilers make of training steps."""

from __future__ import annotations

import functools

import pytest

from dsv3_jax.codesign.aot import PodReport, compile_for_pod
from dsv3_jax.codesign.pods import parse_pod
from dsv3_jax.codesign.step_flops import flops_by_cause
from dsv3_jax.config import BatchConfig, MeshConfig, ModelConfig, PipelineConfig, RunConfig

MODEL = ModelConfig(
    vocab_size=1024, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=5,
    first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64,
    qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2,
    num_nextn_predict_layers=0, max_position_embeddings=256)


@functools.cache
def compiled(pod: str, micro_batches: int = 1, **mesh: int | bool) -> PodReport:
    return compile_for_pod(run_of(micro_batches, **mesh), parse_pod(pod))


def run_of(micro_batches: int = 1, **mesh: int | bool) -> RunConfig:
    """Of a small model."""
    return RunConfig(model=MODEL, mesh=MeshConfig(**mesh), recompute="full", pipeline=PipelineConfig("dualpipe"),
                     batch=BatchConfig(sequences=32, sequence_length=256, micro_batches=micro_batches))


def share_beside_products(report: PodReport, kind: str, axis: str) -> float:
    """Of the bytes that such collectives send."""
    found = [total for total in report.collectives if total.kind == kind and total.axis == axis]
    return sum(total.overlapped_bytes for total in found) / sum(total.bytes for total in found)


GPUS = {"scale_out": 2, "scale_up": 2}


@pytest.mark.slow
def test_halves_on_gpus():
    """Without: 49% and 40%. And they compute what the whole would."""
    report = compiled("h100:2x2", **GPUS, dual=True)
    for axis in ("scale_out", "scale_up"):
        assert share_beside_products(report, "all-to-all", axis) > 0.95
    causes = report.flops_per_token_by_cause
    calculated = flops_by_cause(run_of(**GPUS, dual=True))
    assert {name: causes[name] for name in calculated} == pytest.approx(calculated, rel=1e-6)
    assert abs(causes["other"]) < 0.02 * causes["model"]


@pytest.mark.slow
def test_halves_on_a_slice_of_tpus():
    """94%; without, none are asynchronous."""
    assert share_beside_products(compiled("v5p:2x2x1", scale_up=4, dual=True), "all-to-all", "scale_up") > 0.92


@pytest.mark.slow
def test_a_pipeline_on_gpus():
    """Forwards beside backwards; and transfers beside gradients of weights."""
    report = compiled("h100:4x2", 8, pipe=2, **GPUS)
    assert share_beside_products(report, "collective-permute", "pipe") > 0.95
    assert share_beside_products(report, "all-to-all", "scale_out") > 0.95
    assert share_beside_products(report, "all-to-all", "scale_up") > 0.87
    assert report.counted_once == []
