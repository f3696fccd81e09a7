"""Bad settings fail at once, and the message names field, value and remedy."""

from __future__ import annotations

import dataclasses
import json

import pytest

from dsv3_jax import config as c
from dsv3_jax.mesh import make_mesh
from dsv3_jax.presets import MODELS, RUNS
from dsv3_jax.training.checkpoint import differing_fields

TINY = RUNS["tiny"]


def _model(**changes):
    return lambda: dataclasses.replace(TINY.model, **changes)


def _run(**changes):
    return lambda: dataclasses.replace(TINY, **changes)


BAD = {
    "experts over ranks": (_run(mesh=c.MeshConfig(scale_out=4, scale_up=3)), ["16", "4*3*1=12", "n_routed_experts"]),
    "experts over context": (_run(mesh=c.MeshConfig(scale_up=8, context=4)),
                             ["n_routed_experts (16)", "scale_up*mesh.context (1*8*4=32)"]),
    "sequence over context": (_run(mesh=c.MeshConfig(context=16), batch=c.BatchConfig(sequence_length=40)),
                              ["batch.sequence_length (40)", "mesh.context (16)"]),
    "no context": (lambda: c.MeshConfig(context=0), ["mesh.context (0)", "at least 1"]),
    "groups over nodes": (_run(mesh=c.MeshConfig(scale_out=8)), ["n_group (4)", "scale_out (8)"]),
    "kept groups": (_model(topk_group=5), ["topk_group (5)", "n_group (4)"]),
    "experts over groups": (_model(n_routed_experts=18), ["18", "n_group (4)"]),
    "top-k": (_model(num_experts_per_tok=9), ["num_experts_per_tok (9)", "2*16/4=8"]),
    "lone expert in a group": (_model(n_group=16, topk_group=8), ["n_group (16)"]),
    "greedy with groups": (_model(topk_method="greedy"), ["topk_method", "n_group (4)"]),
    "attention of no kind": (_model(attention="full"), ["attention (full)", "mla, gqa, mqa"]),
    "groups of heads": (_model(attention="gqa", num_key_value_heads=3), ["num_key_value_heads (3)", "heads (2)"]),
    "gqa without groups": (_model(attention="gqa"), ["num_key_value_heads (None)", "1..2"]),
    "mqa with groups": (_model(attention="mqa", num_key_value_heads=2), ["num_key_value_heads (2)", "choose gqa"]),
    "mla with groups": (_model(num_key_value_heads=2), ["num_key_value_heads (2)", "attention (mla)"]),
    "mla with a head's width": (_model(head_dim=16), ["head_dim (16)", "attention (mla)"]),
    "odd head": (_model(attention="mqa", head_dim=7), ["head_dim (7)", "even"]),
    "kernels for others": (_run(model=dataclasses.replace(TINY.model, attention="mqa"), attention_by="kernels"),
                           ["attention_by (kernels)", "model.attention mla", "take xla"]),
    "no window": (_model(attention_window=0), ["attention_window (0)", "at least 1"]),
    "odd rope": (_model(qk_rope_head_dim=7), ["qk_rope_head_dim (7)"]),
    "no heads": (_model(num_attention_heads=0), ["num_attention_heads (0)"]),
    "zero latent": (_model(q_lora_rank=0), ["q_lora_rank (0)"]),
    "all dense": (_model(first_k_dense_replace=3), ["first_k_dense_replace (3)", "num_hidden_layers (3)"]),
    "length": (_run(batch=c.BatchConfig(sequence_length=256)), ["sequence_length (256)", "(128)"]),
    "micro-batches": (lambda: c.BatchConfig(sequences=8, micro_batches=3), ["8", "micro_batches (3)"]),
    "ramp": (lambda: c.BatchConfig(sequences=8, micro_batches=2, ramp_from=3, ramp_until=0.1), ["ramp_from (3)"]),
    "shares": (lambda: c.ScheduleConfig(constant_until=0.9, cosine_until=0.5), ["constant_until", "ascend"]),
    "capacity": (lambda: c.MeshConfig(capacity_factor=0.9), ["mesh.capacity_factor (0.9)", "at least 1"]),
    "pipe": (lambda: c.MeshConfig(pipe=0), ["pipe (0)"]),
    "pipe and context": (lambda: c.MeshConfig(pipe=2, context=2), ["mesh.context (2)", "mesh.pipe (2)", "scale_up"]),
    "pipe and zero": (lambda: c.MeshConfig(pipe=2, zero="full"), ["mesh.zero (full)", "mesh.pipe (2)", "zero1"]),
    "put off": (lambda: c.PipelineConfig(put_off=-1), ["pipeline.put_off (-1)", "take 0"]),
    "beta": (lambda: c.OptimizerConfig(beta2=1.0), ["beta2 (1.0)"]),
    "distributed": (lambda: c.DistributedConfig(coordinator="localhost:1"), ["go together"]),
    "mesh over devices": (lambda: make_mesh(c.MeshConfig(scale_out=4, scale_up=4)),
                          ["4*4*1=16", "8 cpu", "--mesh.simulate-devices 16"]),
    "idle devices": (lambda: make_mesh(c.MeshConfig(data=1, scale_up=4)), ["4 of 8", "mesh.data"]),
    "scale_up over a host": (lambda: make_mesh(c.MeshConfig(scale_up=3)), ["scale_up"]),
    "context over devices": (lambda: make_mesh(c.MeshConfig(scale_up=4, context=4)), ["*context (1*1*1*4*4=16)"]),
}


@pytest.mark.parametrize(("make", "words"), BAD.values(), ids=BAD.keys())
def test_bad_setting_is_named(make, words):
    with pytest.raises(c.ConfigError) as error:
        make()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", RUNS)
def test_presets_survive_json(name):
    assert c.run_from_dict(json.loads(c.to_json(RUNS[name]))) == RUNS[name]


def test_v3_preset_has_its_node_limit():
    assert (MODELS["deepseek_v3"].n_group, MODELS["deepseek_v3"].topk_group) == (8, 4)


def test_run_folder_of_before_other_attention_is_of_the_same_run():
    values = json.loads(c.to_json(TINY))
    for name in ("attention", "num_key_value_heads", "head_dim", "attention_window"):
        del values["model"][name]
    assert c.run_from_dict(values) == TINY
    assert differing_fields(values, TINY) == []
    other = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, attention="mqa"))
    assert differing_fields(values, other) == ["model.attention: mla -> mqa"]


def test_run_folder_of_before_capacity_factor_and_context_loads():
    values = json.loads(c.to_json(TINY))
    del values["mesh"]["capacity_factor"], values["mesh"]["context"]
    assert c.run_from_dict(values).execution == c.Execution("paper", 1.5)
    assert c.run_from_dict(values).mesh.context == 1
