"""The list of published tensors, against what is known of the published files."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

import pytest

from dsv3_jax.codesign.counting import count_parameters
from dsv3_jax.interop.names import published_tensors
from dsv3_jax.presets import MODELS

# (pattern, tensors, shape, dtype) of every tensor of DeepSeek-V3, as in its files.
F8, F32, B16 = "float8_e4m3fn", "float32", "bfloat16"
EXPERT = r"model\.layers\.\d+\.mlp\.experts\.\d+"
SHARED = r"model\.layers\.\d+\.mlp\.shared_experts"
DENSE = r"model\.layers\.[012]\.mlp"
ATTENTION = r"model\.layers\.\d+\.self_attn"
MTP = r"model\.layers\.61"


def _both(pattern, count, shape, blocks):
    return [(pattern + r"\.weight", count, shape, F8), (pattern + r"\.weight_scale_inv", count, blocks, F32)]


V3_FILES = [
    (r"(model\.embed_tokens|lm_head)\.weight", 2, (129280, 7168), B16),
    (r"model\.norm\.weight", 1, (7168,), B16),
    (r"model\.layers\.\d+\.(input|post_attention)_layernorm\.weight", 124, (7168,), B16),
    *_both(ATTENTION + r"\.q_a_proj", 62, (1536, 7168), (12, 56)),
    (ATTENTION + r"\.q_a_layernorm\.weight", 62, (1536,), B16),
    *_both(ATTENTION + r"\.q_b_proj", 62, (24576, 1536), (192, 12)),
    *_both(ATTENTION + r"\.kv_a_proj_with_mqa", 62, (576, 7168), (5, 56)),
    (ATTENTION + r"\.kv_a_layernorm\.weight", 62, (512,), B16),
    *_both(ATTENTION + r"\.kv_b_proj", 62, (32768, 512), (256, 4)),
    *_both(ATTENTION + r"\.o_proj", 62, (7168, 16384), (56, 128)),
    *_both(DENSE + r"\.(gate|up)_proj", 6, (18432, 7168), (144, 56)),
    *_both(DENSE + r"\.down_proj", 3, (7168, 18432), (56, 144)),
    (r"model\.layers\.\d+\.mlp\.gate\.weight", 59, (256, 7168), B16),
    (r"model\.layers\.\d+\.mlp\.gate\.e_score_correction_bias", 59, (256,), F32),
    *_both(EXPERT + r"\.(gate|up)_proj", 59 * 512, (2048, 7168), (16, 56)),
    *_both(EXPERT + r"\.down_proj", 59 * 256, (7168, 2048), (56, 16)),
    *_both(SHARED + r"\.(gate|up)_proj", 59 * 2, (2048, 7168), (16, 56)),
    *_both(SHARED + r"\.down_proj", 59, (7168, 2048), (56, 16)),
    (MTP + r"\.(enorm|hnorm|shared_head\.norm)\.weight", 3, (7168,), B16),
    (MTP + r"\.eh_proj\.weight", 1, (7168, 14336), B16),
    (MTP + r"\.(embed_tokens|shared_head\.head)\.weight", 2, (129280, 7168), B16),
]


def test_deepseek_v3_has_the_published_tensors():
    specs = published_tensors(MODELS["deepseek_v3"], "float8")
    assert len(specs) == len({spec.name for spec in specs}) == 91_991
    assert sum(math.prod(spec.shape) for spec in specs) == 684_531_386_000
    found = collections.Counter()
    patterns = [(re.compile(pattern), shape, dtype) for pattern, _, shape, dtype in V3_FILES]
    for spec in specs:
        matches = [pattern for pattern in patterns if pattern[0].fullmatch(spec.name)]
        assert len(matches) == 1, spec.name
        assert (spec.shape, spec.dtype.name) == matches[0][1:], spec.name
        found[matches[0][0].pattern] += 1
    assert found == {pattern: count for pattern, count, _, _ in V3_FILES}
    layers = {int(spec.name.split(".")[2]) for spec in specs if spec.name.startswith("model.layers.")}
    assert layers == set(range(62))


def test_copies_and_scales_say_of_what():
    specs = {spec.name: spec for spec in published_tensors(MODELS["deepseek_v3"], "float8")}
    assert {name: spec.copy_of for name, spec in specs.items() if spec.copy_of} == {
        "model.layers.61.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight": "lm_head.weight"}
    scales = {name: spec.scale_of for name, spec in specs.items() if spec.scale_of}
    assert scales == {name: name.removesuffix("_scale_inv") for name in specs if name.endswith("_scale_inv")}


VARIANTS = {
    **{name: MODELS[name] for name in ("deepseek_v2", "deepseek_v2_lite", "moonlight_16b", "kimi_k2", "tiny")},
    "three depths": dataclasses.replace(MODELS["tiny"], num_nextn_predict_layers=3),
    "no shared expert, no dense layer": dataclasses.replace(MODELS["tiny"], n_shared_experts=0,
                                                            first_k_dense_replace=0),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_parameter_is_published_once(config):
    """Elements add up to those counted on the model itself, plus the biases and the copies of embedding and head."""
    specs = published_tensors(config, "bfloat16")
    routers = config.num_moe_layers + config.num_nextn_predict_layers
    biases = routers * config.n_routed_experts if config.topk_method == "noaux_tc" else 0
    count = count_parameters(config)
    own = sum(math.prod(spec.shape) for spec in specs if spec.copy_of is None)
    assert own == count.main + count.mtp + biases
    assert sum(spec.copy_of is not None for spec in specs) == 2 * config.num_nextn_predict_layers
    assert {spec.dtype.name for spec in specs if spec.place.router_bias} == ({F32} if biases else set())
    assert {spec.dtype.name for spec in specs if not spec.place.router_bias} == {B16}


@pytest.mark.parametrize(("model", "there", "absent"), [
    ("deepseek_v2", ["model.layers.59.self_attn.q_b_proj.weight"], ["e_score_correction_bias", "layers.60.", "q_proj"]),
    ("deepseek_v2_lite", ["model.layers.0.self_attn.q_proj.weight"], ["e_score_correction_bias", "layers.27.", "q_a_"]),
    ("moonlight_16b", ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias"],
     ["layers.27.", "q_b_"]),
    ("kimi_k2", ["model.layers.60.mlp.experts.383.down_proj.weight", "model.layers.1.self_attn.q_a_proj.weight"],
     ["layers.61.", "q_proj", "layers.0.mlp.gate."]),
])
def test_families_differ(model, there, absent):
    names = [spec.name for spec in published_tensors(MODELS[model], "bfloat16")]
    assert set(there) <= set(names)
    for part in absent:
        assert not [name for name in names if part in name]
