"""A small model compiled by the real compilers for machines that are not here, against counts by hand.

Two layers, one of them with experts, no multi-token prediction: small enough that every byte on the network can be
written down from the equations of dispatch and of weight gathering.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsv3_jax.codesign.aot import CollectiveTotal, PodReport, checked_mesh, compile_for_pod, report
from dsv3_jax.codesign.counting import count_parameters
from dsv3_jax.codesign.pods import parse_pod
from dsv3_jax.codesign.step_flops import flops_by_cause
from dsv3_jax.codesign.step_traffic import exchange_traffic
from dsv3_jax.config import BatchConfig, ConfigError, MeshConfig, ModelConfig, RunConfig
from dsv3_jax.presets import RUNS

ROOT = Path(__file__).parents[3]
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
    return checked(compile_for_pod(dataclasses.replace(RUN, mesh=mesh), parse_pod(pod)))


def checked(report: PodReport) -> PodReport:
    """The report, after the checks that hold for every machine."""
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


@pytest.mark.slow
def test_one_slice():
    """What `test_two_slices` and `test_one_slice_has_no_slow_network` prove, in one program."""
    report = compiled("v5p:2x2x4", MeshConfig(scale_up=16, zero="full"))
    assert report.slow_seconds == 0
    assert {total.kind for total in report.collectives} >= {"all-to-all", "all-gather"}


@pytest.mark.slow
def test_two_slices():
    """(What crosses between slices is also counted in test_exchange.py, of programs that compile in seconds.)"""
    report = compiled("v5p:2x2x2,slices=2", RUN.mesh)
    assert report.slow_seconds > 0
    hops = {total.axis: total.bytes for total in report.collectives if total.kind == "all-to-all"}
    assert hops == _bytes_of_dispatch_and_combine()
    # What is calculated without a compiler, for the level that recomputes most.
    assert exchange_traffic(RUN, 16) == (hops["scale_out"], hops["scale_up"])
    calculated = flops_by_cause(RUN)
    found = {name: report.flops_per_token_by_cause[name] for name in calculated}
    assert found == pytest.approx(calculated, rel=0.01)


def _bytes_of_dispatch_and_combine() -> dict[str, float]:
    """Each hop carries the buffers of the quota (capacity 1.5).

    Rows in bf16 five times: dispatch, its recomputation, combine, and the ways back of both. The float32 weights of all
    rows go out once and their gradient comes back; the int32 choices go once. What arrives is kept for the backward.
    """
    width, top_k, reach = MODEL.hidden_size, MODEL.num_experts_per_tok, MODEL.topk_group
    node_rows = min(TOKENS, int(1.5 * TOKENS * reach / 2))
    device_choices = int(1.5 * TOKENS * top_k / 16)
    rows = {("scale_out", 2): 2 * node_rows, ("scale_up", 8): 8 * min(2 * node_rows, 2 * device_choices)}
    return {axis: (ranks - 1) / ranks * count * (5 * 2 * width + 2 * 4 * top_k + 4 * top_k)
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


def _options(config: Any, default: Any, prefix: str = "--") -> list[str]:
    """The command line that makes `config` of `default`."""
    options = []
    for field in dataclasses.fields(config):
        value, other = getattr(config, field.name), getattr(default, field.name)
        name = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value) and dataclasses.is_dataclass(other):
            options += _options(value, other, name + ".")
        elif value != other:
            options += [name, str(value)]
    return options


@pytest.mark.slow
def test_sixteen_gpus_on_two_hosts_as_the_script_tells_it():
    """Its one JSON object is the whole report, and the table goes to standard error."""
    done = subprocess.run([sys.executable, "experiments/compile_for_pod.py", "--preset", "tiny", "--pod", "h100:2x8",
                           "--json", *_options(RUN, RUNS["tiny"])], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "compile_seconds" in done.stderr
    told = json.loads(done.stdout)
    report = checked(PodReport(**told | {"collectives": [CollectiveTotal(**each) for each in told["collectives"]]}))
    assert report.preset == "tiny"
    assert report.compile_seconds > 0
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
    assert _report("h100:2x8", text).flops_per_token_by_cause["compiler_recomputation"] == 2 * 8 ** 3 / TOKENS


def _report(pod: str, text: str, mesh: MeshConfig = RUN.mesh) -> PodReport:
    """Of a program written by hand."""
    memory = SimpleNamespace(peak_memory_in_bytes=0, argument_size_in_bytes=0, temp_size_in_bytes=0,
                             output_size_in_bytes=0, alias_size_in_bytes=0)
    run = dataclasses.replace(RUN, mesh=mesh)
    return report(memory, text, 0.0, run, parse_pod(pod), checked_mesh(run, parse_pod(pod)), "")


@pytest.mark.parametrize(("pod", "mesh", "slow"), [
    ("v5p:2x2x4", MeshConfig(scale_up=16, zero="full"), 0), ("v5p:2x2x2,slices=2", RUN.mesh, 512 / 2)])
def test_one_slice_has_no_slow_network(pod, mesh, slow):
    """Of 512 bytes spread over two slices half leave, at the rate of the slow network."""
    found = _report(pod, """HloModule m, is_scheduled=true

ENTRY %main (p: f32[16,8]) -> f32[16,8] {
  %p = f32[16,8]{1,0} parameter(0)
  ROOT %out = f32[16,8]{1,0} all-to-all(%p), channel_id=1, replica_groups=[1,16]<=[16], dimensions={0}
}
""", mesh)
    assert found.slow_seconds == pytest.approx(slow / parse_pod(pod).hardware.scale_out.bandwidth)
    assert found.fast_seconds > 0


@pytest.mark.parametrize(("change", "message"), [
    ({"mesh": MeshConfig(scale_up=16)}, r"mesh.scale_up \(16\) does not fit inside one fast domain of 8"),
    ({"mesh": MeshConfig(scale_out=4, scale_up=8)}, r"needs more than the 16 gpu"),
    ({"batch": BatchConfig(sequences=24, sequence_length=256), "mesh": RUN.mesh},
     r"\(24/1=24\) must be divisible by the 16 devices")])
def test_layouts_that_do_not_divide_are_refused_before_compiling(change, message):
    with pytest.raises(ConfigError, match=message):
        compile_for_pod(dataclasses.replace(RUN, **change), parse_pod("h100:2x8"))




@pytest.mark.slow
@pytest.mark.parametrize(("context", "recompute"), [(1, "full"), (2, "paper"), (1, "none")])
def test_attention_by_kernels_computes_what_is_seen(context, recompute):
    """On Hopper: nothing masked, scores once more in the backward, as calculated; and less memory."""
    model = dataclasses.replace(MODEL, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
                                max_position_embeddings=2048)
    run = RunConfig(model=model, batch=BatchConfig(sequences=4, sequence_length=2048), precision="bf16",
                    recompute=recompute, mesh=MeshConfig(data=1, scale_out=2, scale_up=2 // context, context=context))
    xla, kernels = (compile_for_pod(dataclasses.replace(run, attention_by=by), parse_pod("h800:2x2"))
                    for by in ("xla", "kernels"))
    found = kernels.flops_per_token_by_cause
    predicted = flops_by_cause(dataclasses.replace(run, attention_by="kernels"))
    assert predicted == pytest.approx({name: found[name] for name in predicted}, rel=1e-3)
    assert abs(found["other"]) < 1e-3 * kernels.model_flops_per_token
    assert found["masked_attention"] == 0 < xla.flops_per_token_by_cause["masked_attention"]
    assert kernels.flops_per_token < xla.flops_per_token
    assert kernels.temporary_bytes < xla.temporary_bytes
