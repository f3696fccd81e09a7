"""config.json of every family, in both layouts, there and back."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_jax.config import ConfigError, RopeScaling
from dsv3_jax.interop.published_config import model_from_published, published_from_model, with_format
from dsv3_jax.presets import MODELS
from tests.published import V3_CONFIG, config_json

PUBLISHED = ["deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "moonlight_16b", "kimi_k2"]


def _transformers_5(values):
    """The layout of transformers 5: theta and scaling in one object, rope_type, floats for integers."""
    values = dict(values)
    scaling = dict(values.pop("rope_scaling") or {"type": "default"})
    merged = {"rope_theta": float(values.pop("rope_theta")), "rope_type": scaling.pop("type")}
    merged |= {name: float(value) if name != "original_max_position_embeddings" else value
               for name, value in scaling.items()}
    extra = {"rope_parameters": merged, "dtype": values.pop("torch_dtype"), "rope_interleave": True,
             "qk_head_dim": 192, "head_dim": 64}
    return values | extra


@pytest.mark.parametrize("layout", [dict, _transformers_5], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize("model", PUBLISHED)
def test_published_files_are_the_presets(model, layout):
    """Two fields are training's own: presets have the papers' values, files a library's defaults."""
    expected = dataclasses.replace(MODELS[model], initializer_range=0.02, aux_loss_alpha=0.001)
    assert model_from_published(layout(config_json(model))) == expected


@pytest.mark.parametrize("fmt", ["float8", "bfloat16", "float32"])
@pytest.mark.parametrize("model", sorted(name for name in MODELS if MODELS[name].attention == "mla"))
def test_there_and_back(model, fmt):
    values = published_from_model(MODELS[model], fmt, bos=5, eos=6)
    assert model_from_published(values) == MODELS[model]
    assert values["architectures"] == [f"Deepseek{'V2' if 'v2' in model else 'V3'}ForCausalLM"]
    assert values["torch_dtype"] == ("float32" if fmt == "float32" else "bfloat16")
    assert ("quantization_config" in values) == (fmt == "float8")
    assert (values["bos_token_id"], values["eos_token_id"]) == (5, 6)


def test_v3_is_written_as_published():
    """Field by field, what DeepSeek's own file says; floats may stand for integers."""
    written = published_from_model(dataclasses.replace(MODELS["deepseek_v3"], initializer_range=0.02,
                                                       aux_loss_alpha=0.001), "float8", 0, 1)
    assert {name: written.get(name) for name in V3_CONFIG} == V3_CONFIG


@pytest.mark.parametrize("changes", [{"mtp_hidden": "post_norm"}, {"masked_group_score": "0"}], ids=str)
def test_choices_of_the_code_survive(changes):
    config = dataclasses.replace(MODELS["tiny"], **changes)
    assert model_from_published(published_from_model(config, "bfloat16")) == config


@pytest.mark.parametrize(("model", "message"), [
    (MODELS["quickstart_gqa"], r"model.attention \(gqa\) is in no published architecture"),
    (dataclasses.replace(MODELS["tiny"], attention_window=8), r"model.attention_window \(8\)")], ids=["gqa", "window"])
def test_what_has_no_published_format_is_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        published_from_model(model, "float32")


def test_yarn_without_mscale_leaves_the_temperature_alone():
    scaling = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 4096.0}
    found = model_from_published(V3_CONFIG | {"rope_scaling": scaling}).rope_scaling
    assert found == RopeScaling(4.0, 4096, 32.0, 1.0, mscale=1.0, mscale_all_dim=0.0)


def test_another_format_changes_nothing_else():
    values = V3_CONFIG | {"auto_map": {"AutoConfig": "x.Y"}}
    values["quantization_config"] = V3_CONFIG["quantization_config"] | {"scale_fmt": "ue8m0"}
    wide = with_format(values, "bfloat16")
    assert wide == {name: value for name, value in values.items() if name != "quantization_config"}
    assert with_format(wide, "float8") == values | {"quantization_config": V3_CONFIG["quantization_config"]}


YARN = V3_CONFIG["rope_scaling"]


@pytest.mark.parametrize(("changes", "words"), [
    ({"model_type": "deepseek_v4"}, ["model_type", "deepseek_v4", "deepseek_v3"]),
    ({"model_type": None}, ["model_type", "None"]),
    ({"attention_bias": True}, ["attention_bias", "true", "false"]),
    ({"tie_word_embeddings": True}, ["tie_word_embeddings", "true"]),
    ({"moe_layer_freq": 2}, ["moe_layer_freq", "2"]),
    ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    ({"rope_interleave": False}, ["rope_interleave", "false"]),
    ({"num_key_value_heads": 8}, ["num_key_value_heads", "8", "128"]),
    ({"scoring_func": "softmax"}, ["scoring_func", "softmax", "sigmoid"]),
    ({"topk_method": "greedy"}, ["topk_method", "greedy", "noaux_tc"]),
    ({"norm_topk_prob": "yes"}, ["norm_topk_prob", "yes"]),
    ({"rope_scaling": YARN | {"type": "linear"}}, ["rope_scaling", "rope_type", "linear", "yarn"]),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, ["original_max_position_embeddings", "missing"]),
    ({"rope_parameters": YARN | {"attention_factor": 1.1}}, ["rope_parameters", "attention_factor", "1.1"]),
    ({"hidden_size": None}, ["hidden_size", "missing"]),
    ({"hidden_size": "7168"}, ["hidden_size", "7168", "number"]),
    ({"hidden_size": 7168.5}, ["hidden_size", "7168.5", "whole"]),
    ({"n_group": 7}, ["n_routed_experts (256)", "n_group (7)"]),
    ({"mtp_hidden": "sideways"}, ["mtp_hidden", "sideways"]),
])
def test_what_cannot_be_computed_is_refused(changes, words):
    with pytest.raises(ConfigError) as error:
        model_from_published(V3_CONFIG | changes)
    for word in words:
        assert word in str(error.value)


def test_a_router_of_no_published_model_is_not_written():
    with pytest.raises(ConfigError, match=r"scoring_func \(softmax\) with model.topk_method \(noaux_tc\)"):
        published_from_model(dataclasses.replace(MODELS["tiny"], scoring_func="softmax"), "float8")
