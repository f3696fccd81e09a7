"""The published `config.json` as a `ModelConfig`, and back.

Files of transformers 4 (rope_theta and rope_scaling) and of transformers 5 (rope_parameters) are read; the former are
written, which both read. What the file says and the model here cannot do is refused, never ignored.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from dsv3_jax.config import ConfigError, ModelConfig, RopeScaling, named

Format = Literal["float8", "bfloat16", "float32"]
"""Types of published weights: float8 in blocks with float32 scales and the rest bfloat16, or all in one type."""
FORMATS: tuple[Format, ...] = get_args(Format)


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """What a `model_type` means where its file is silent."""

    name: str
    routing: Mapping[str, Any]
    topk_methods: tuple[str, ...]


_SIGMOID = _Architecture("DeepseekV3ForCausalLM",
                         {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}, ("noaux_tc",))
_SOFTMAX = _Architecture("DeepseekV2ForCausalLM",
                         {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False},
                         ("greedy", "group_limited_greedy"))
# Kimi-K2 has the architecture of V3 under a name of its own; Moonlight calls itself deepseek_v3.
ARCHITECTURES = {"deepseek_v3": _SIGMOID, "kimi_k2": _SIGMOID, "deepseek_v2": _SOFTMAX}

# The only value that the model here computes, and what else to do.
_FIXED = {
    "attention_bias": (False, "attention here has no biases"),
    "tie_word_embeddings": (False, "embedding and output head are separate weights here"),
    "moe_layer_freq": (1, "every layer after first_k_dense_replace has experts here"),
    "hidden_act": ("silu", "feed-forwards here are SwiGLU"),
    "rope_interleave": (True, "rotary pairs are adjacent here; permute the rotary rows of q and kv_a first"),
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
          "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
          "n_routed_experts", "num_experts_per_tok", "first_k_dense_replace", "max_position_embeddings")
_OURS = ("masked_group_score", "mtp_hidden", "latent_norm_eps")
_UNPUBLISHED = ("attention", "num_key_value_heads", "head_dim", "attention_window")
"""Choices that published files leave to the code. Written under our names where not the default; others ignore them."""


def model_from_published(values: Mapping[str, Any], where: Any = "config.json") -> ModelConfig:
    """The model that a published configuration describes.

    Outside the chosen groups experts score what the model's own code gives them: 0 in V2's, -inf in V3's.

    Args:
      values: the parsed file.
      where: names the file in errors.

    Raises:
      ConfigError: a field is missing, malformed, or asks for what is not built; names it, its value and the remedy.
    """
    read = _Reader(values, where)
    architecture = named(ARCHITECTURES, str(values.get("model_type")), f"{where}: model_type")
    for field, (only, reason) in _FIXED.items():
        read.require(field, values.get(field, only), (only,), reason)
    sizes: dict[str, Any] = {field: read.integer(field) for field in _SIZES}
    heads = sizes["num_attention_heads"]
    read.require("num_key_value_heads", values.get("num_key_value_heads", heads), (heads,),
                 "latent attention has as many key as query heads")
    routing = {field: values.get(field, default) for field, default in architecture.routing.items()}
    read.require("scoring_func", routing["scoring_func"], (architecture.routing["scoring_func"],),
                 f"the router of {values['model_type']}")
    read.require("topk_method", routing["topk_method"], architecture.topk_methods,
                 f"the router of {values['model_type']}")
    read.require("norm_topk_prob", routing["norm_topk_prob"], (True, False), "")
    masked = "0" if routing["topk_method"] == "group_limited_greedy" else "-inf"
    theta, scaling = _rope(read)
    depth = read.integer("num_nextn_predict_layers", 0)
    return ModelConfig(
        **sizes, **routing,
        q_lora_rank=None if values.get("q_lora_rank") is None else read.integer("q_lora_rank"),
        n_shared_experts=read.integer("n_shared_experts", 0), n_group=read.integer("n_group", 1),
        topk_group=read.integer("topk_group", 1),
        routed_scaling_factor=read.number("routed_scaling_factor", 1.0),
        aux_loss_alpha=read.number("aux_loss_alpha", 1e-4),
        num_nextn_predict_layers=depth,
        rms_norm_eps=read.number("rms_norm_eps", 1e-6),
        latent_norm_eps=read.number("latent_norm_eps", 1e-6),
        initializer_range=read.number("initializer_range", 0.02),
        rope_theta=theta, rope_scaling=scaling,
        masked_group_score=read.one_of("masked_group_score", masked, ("-inf", "0")),
        mtp_hidden=read.one_of("mtp_hidden", _mtp_hidden(depth), ("pre_norm", "post_norm")))


def _rope(read: _Reader) -> tuple[float, RopeScaling | None]:
    """Base and YaRN scaling, of either layout of the file."""
    merged = read.values.get("rope_parameters")
    group = "rope_parameters" if merged else "rope_scaling"
    inner = _Reader(merged or read.values.get("rope_scaling") or {}, f"{read.where}: {group}")
    theta = inner.number("rope_theta", read.number("rope_theta", 10000.0))
    kind = inner.values.get("rope_type", inner.values.get("type", "default"))
    inner.require("rope_type", kind, ("default", "yarn"), "other ways to extend the context are not built")
    if kind == "default":
        return theta, None
    inner.require("truncate", inner.values.get("truncate", True), (True,), "YaRN's ramp here has whole-numbered ends")
    inner.require("attention_factor", inner.values.get("attention_factor"), (None,),
                  "the factor follows from mscale and mscale_all_dim")
    # A file without mscale_all_dim leaves the softmax temperature alone: 0, not this project's default.
    return theta, RopeScaling(
        factor=inner.number("factor"),
        original_max_position_embeddings=inner.integer("original_max_position_embeddings"),
        beta_fast=inner.number("beta_fast", 32.0), beta_slow=inner.number("beta_slow", 1.0),
        mscale=inner.number("mscale", 1.0), mscale_all_dim=inner.number("mscale_all_dim", 0.0))


class _Reader:
    """Fields of a JSON object, with errors that name field, value and file."""

    def __init__(self, values: Mapping[str, Any], where: Any):
        self.values, self.where = values, where

    def require(self, field: str, value: Any, allowed: tuple[Any, ...], reason: str) -> None:
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            names = " or ".join(json.dumps(one) for one in allowed)
            raise ConfigError(f"{self.where}: {field} ({json.dumps(value)}) must be {names}"
                              + (f": {reason}" if reason else ""))

    def one_of(self, field: str, default: str, allowed: tuple[str, ...]) -> Any:
        value = self.values.get(field, default)
        self.require(field, value, allowed, "a choice of dsv3_jax")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = self.values.get(field)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.where}: {field} is missing; add it, from the model's published file")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{self.where}: {field} ({json.dumps(value)}) must be a number")
        return float(value)

    def integer(self, field: str, default: int | None = None) -> int:
        value = self.number(field, default)
        if not value.is_integer():
            raise ConfigError(f"{self.where}: {field} ({value}) must be a whole number")
        return int(value)


def published_from_model(config: ModelConfig, fmt: Format, bos: int | None = None,
                         eos: int | None = None) -> dict[str, Any]:
    """A complete `config.json` for weights of `config` in `fmt`.

    Args:
      bos, eos: ids that open and close a document, if the model has a tokenizer.

    Raises:
      ConfigError: no published architecture routes as `config` does.
    """
    c = config
    for name, published in (("attention", "mla"), ("attention_window", None)):
        if getattr(c, name) != published:
            raise ConfigError(f"model.{name} ({getattr(c, name)}) is in no published architecture, so the model has no "
                              "published format: keep the run folder")
    kind = next((kind for kind, one in ARCHITECTURES.items() if c.topk_method in one.topk_methods
                 and c.scoring_func == one.routing["scoring_func"]), None)
    if kind is None:
        raise ConfigError(f"model.scoring_func ({c.scoring_func}) with model.topk_method ({c.topk_method}) is in no "
                          "published architecture: use sigmoid with noaux_tc, or softmax with greedy or "
                          "group_limited_greedy")
    default = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    scaling = None if c.rope_scaling is None else {"type": "yarn", **dataclasses.asdict(c.rope_scaling)}
    values: dict[str, Any] = {"architectures": [ARCHITECTURES[kind].name], "model_type": kind}
    values |= {name: value for name, value in dataclasses.asdict(c).items() if name not in (*_OURS, *_UNPUBLISHED)}
    values |= {"rope_scaling": scaling, "num_key_value_heads": c.num_attention_heads, "hidden_act": "silu",
               "attention_bias": False, "attention_dropout": 0.0, "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True,
               "pretraining_tp": 1, "tie_word_embeddings": False, "use_cache": True,
               "bos_token_id": bos, "eos_token_id": eos}
    values |= {name: getattr(c, name) for name in _OURS if getattr(c, name) != _own_default(name, c, default)}
    return with_format(values, fmt)


def _own_default(name: str, config: ModelConfig, default: Mapping[str, Any]) -> Any:
    if name == "masked_group_score" and config.topk_method == "group_limited_greedy":
        return "0"
    if name == "mtp_hidden":
        return _mtp_hidden(config.num_nextn_predict_layers)
    return default[name]


def _mtp_hidden(depth: int) -> str:
    """What transformers and vLLM run published prediction modules on; without any it does not matter."""
    return "post_norm" if depth else "pre_norm"


def with_format(values: Mapping[str, Any], fmt: Format) -> dict[str, Any]:
    """`values` for weights that were just written in `fmt`; all else stays as it is.

    `quantization_config` is written anew: scales made here are largest/448, not powers of two (scale_fmt ue8m0).
    """
    out = {name: value for name, value in values.items() if name != "quantization_config"}
    dtype = "float32" if fmt == "float32" else "bfloat16"
    for name in {"torch_dtype"} if "dtype" not in values else {"dtype", "torch_dtype"} & values.keys():
        out[name] = dtype
    if fmt == "float8":
        out["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                      "weight_block_size": [128, 128]}
    return out


def check_quantization(values: Mapping[str, Any], where: Any) -> bool:
    """Whether the file says that weights are float8 in blocks of 128 x 128.

    Raises:
      ConfigError: they are quantised in another way.
    """
    found = values.get("quantization_config")
    if not found:
        return False
    read = _Reader(found, f"{where}: quantization_config")
    for field, only in (("quant_method", "fp8"), ("fmt", "e4m3"), ("weight_block_size", [128, 128])):
        read.require(field, found.get(field, only), (only,), "other quantisations are not read; convert to bfloat16")
    return True


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
      ConfigError: no such file, or no JSON object in it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing: give a folder with all files of the model") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}): fetch or write it again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(values).__name__}")
    return values
