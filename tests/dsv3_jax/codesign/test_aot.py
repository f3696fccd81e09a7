"""A small model compiled by the real compilers for machines that are not here, against counts by hand.

Two layers, one of them with experts, no multi-token prediction: small enough that every byte on the network can be
written down from the equations of dispatch and of weight gathering.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest

from dsv3_jax.codesign.aot import PodReport, compile_for_pod
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


@functools.cache
def compiled(pod: str, mesh: MeshConfig) -> PodReport:
    return compile_for_pod(dataclasses.replace(RUN, mesh=mesh), parse_pod(pod))


def sixteen_gpus() -> PodReport:
    return compiled("h100:2x8", RUN.mesh)


PODS = [("h100:2x8", RUN.mesh), ("v5e:4x4", MeshConfig(scale_up=16, zero="full")),
        ("v5e:2x4,slices=2", RUN.mesh)]


@pytest.mark.parametrize(("pod", "mesh"), PODS, ids=[pod for pod, _ in PODS])
def test_report_of_each_machine(pod, mesh):
    report = compiled(pod, mesh)
    assert report.devices == 16
    assert report.fits
    assert 0 < report.peak_bytes < report.hbm_bytes
    assert report.counted_once == []
    # Master weights 4 bytes, two moments of 2; all but the smallest are spread over the 16 devices.
    parameters = count_parameters(MODEL).main
    assert report.memory_by_kind["weights"] == pytest.approx(4 * parameters / 16, rel=0.02)
    assert report.memory_by_kind["optimizer"] == pytest.approx(4 * parameters / 16, rel=0.02)
    assert report.argument_bytes >= report.memory_by_kind["weights"] + report.memory_by_kind["optimizer"]
    assert report.floor_seconds == max(report.compute_seconds, report.fast_seconds, report.slow_seconds)
    assert report.scheduled_seconds >= report.compute_seconds


@pytest.mark.parametrize(("pod", "mesh"), PODS, ids=[pod for pod, _ in PODS])
def test_flops_are_the_analytic_ones_and_what_is_named(pod, mesh):
    report = compiled(pod, mesh)
    causes = report.flops_per_token_by_cause
    assert sum(causes.values()) == pytest.approx(report.flops_per_token)
    assert abs(causes["other"]) < 0.02 * report.model_flops_per_token
    assert causes["recomputation"] > 0
    assert causes["masked_attention"] > 0


def test_all_to_all_bytes_are_those_of_a_hand_count():
    """Each hop carries the buffers of the quota (capacity 1.5), once each for: dispatch, its recomputation, combine,
    and the two ways back; and beside the rows, the choices (int32) and weights (float32) of every row."""
    width, top_k, reach = MODEL.hidden_size, 4, 2
    node_rows = min(TOKENS, int(1.5 * TOKENS * reach / 2))  # every token may visit both nodes: the worst case
    device_choices = int(1.5 * TOKENS * top_k / 16)
    rows = {"scale_out": 2 * node_rows, "scale_up": 8 * min(2 * node_rows, 2 * device_choices)}
    found = {total.axis: total for total in sixteen_gpus().collectives if total.kind == "all-to-all"}
    assert set(found) == set(rows)
    for axis, ranks in (("scale_out", 2), ("scale_up", 8)):
        sent = (ranks - 1) / ranks * rows[axis]
        # Rows in bf16 five times; weights out twice (forward, recomputation) and their gradient back once; choices
        # out twice.
        assert found[axis].bytes == sent * (5 * 2 * width + 3 * 4 * top_k + 2 * 4 * top_k)
        assert found[axis].slow_bytes == (found[axis].bytes if axis == "scale_out" else 0)


def test_bytes_of_gathered_weights_are_those_of_a_hand_count():
    """Full sharding gathers what a layer uses when it runs and again when the backward recomputes it; embedding and
    head once. The experts live where they are used and are not gathered."""
    count = count_parameters(MODEL).by_part
    report = sixteen_gpus()
    gathers = [total for total in report.collectives if total.kind == "all-gather"]
    matrices = sum(size for part, size in count.items() if part not in ("routed experts", "norms", "routers",
                                                                         "embedding", "output head"))
    both = 2 * (2 * matrices + 4 * count["routers"] + 4 * (count["norms"] - MODEL.hidden_size))
    once = 2 * (count["embedding"] + count["output head"]) + 4 * MODEL.hidden_size  # and the last norm
    assert sum(total.bytes for total in gathers) == 15 / 16 * (both + once)


def test_the_slow_network_is_the_one_between_hosts_and_slices():
    for pod in ("h100:2x8", "v5e:2x4,slices=2"):
        report = compiled(pod, RUN.mesh)
        assert all(total.slow_bytes == 0 for total in report.collectives if total.axis == "scale_up")
        assert all(total.slow_bytes == total.bytes for total in report.collectives if total.axis == "scale_out")
        assert report.slow_seconds > 0
    assert compiled("v5e:4x4", MeshConfig(scale_up=16, zero="full")).slow_seconds == 0


def test_gpu_schedule_hides_some_communication():
    report = sixteen_gpus()
    assert 0 < report.overlapped_share < 1
    assert any(total.hidden_seconds > 0 for total in report.collectives)


@pytest.mark.parametrize(("change", "message"), [
    ({"mesh": MeshConfig(scale_up=16)}, r"mesh.scale_up \(16\) does not fit inside one fast domain of 8"),
    ({"mesh": MeshConfig(scale_out=4, scale_up=8)}, r"needs more than the 16 gpu"),
    ({"batch": BatchConfig(sequences=24, sequence_length=256), "mesh": RUN.mesh},
     r"\(24/1=24\) must be divisible by the 16 devices")])
def test_layouts_that_do_not_divide_are_refused_before_compiling(change, message):
    with pytest.raises(ConfigError, match=message):
        compile_for_pod(dataclasses.replace(RUN, **change), parse_pod("h100:2x8"))


