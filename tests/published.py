"""Published models made without the package's own writers: names and layouts spelt out, files by `safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from dsv3_jax.config import ModelConfig

E4M3, BFLOAT16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
Tensors = dict[str, np.ndarray]
KEPT = ("embed_tokens", "norm", "lm_head", "mlp.gate.", "eh_proj", "shared_head")
"""Parts of the names of tensors that the float8 format leaves in bfloat16 (the router's bias: float32)."""

V3_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_nextn_predict_layers": 1,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "first_k_dense_replace": 3, "moe_layer_freq": 1, "ep_size": 1,
    "seq_aux": True, "aux_loss_alpha": 0.001, "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 1, "max_position_embeddings": 163840, "rope_theta": 10000, "torch_dtype": "bfloat16",
    "pretraining_tp": 1, "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0},
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128]}}

# What the other models' files say differently (None: nothing at all).
_DIFFERENT: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400,
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
        "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "topk_group": 3,
        "routed_scaling_factor": 16.0, "norm_topk_prob": False, "scoring_func": "softmax",
        "topk_method": "group_limited_greedy", "first_k_dense_replace": 1, "bos_token_id": 100000,
        "eos_token_id": 100001, "num_nextn_predict_layers": None, "quantization_config": None},
    "deepseek_v2_lite": {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400,
        "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
        "scoring_func": "softmax", "topk_method": "greedy", "first_k_dense_replace": 1, "bos_token_id": 100000,
        "eos_token_id": 100001, "num_nextn_predict_layers": None, "quantization_config": None,
        "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                         "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "moonlight_16b": {
        "vocab_size": 163840, "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408,
        "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446,
        "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "rope_theta": 50000.0, "rope_scaling": None, "quantization_config": None},
    "kimi_k2": {
        "model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
        "first_k_dense_replace": 1, "num_nextn_predict_layers": 0, "max_position_embeddings": 131072,
        "rope_theta": 50000.0, "rope_scaling": {
            "type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 1.0,
            "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
}
# Compressed queries are absent where the file says null.
_NULL = {"deepseek_v2_lite": ("q_lora_rank",), "moonlight_16b": ("q_lora_rank",)}


def config_json(model: str) -> dict[str, Any]:
    """The published config.json of a model, in the layout of transformers 4."""
    values = {name: value for name, value in (V3_CONFIG | _DIFFERENT[model]).items()
              if value is not None or name == "rope_scaling"}
    return values | {name: None for name in _NULL.get(model, ())}


def small_config_json(config: ModelConfig, quantised: bool) -> dict[str, Any]:
    """The file of a small model with V3's router."""
    values = V3_CONFIG | {name: getattr(config, name) for name in V3_CONFIG.keys() & vars(config).keys()}
    values |= {"num_key_value_heads": config.num_attention_heads, "rope_scaling": None}
    return values if quantised else {name: value for name, value in values.items() if name != "quantization_config"}


def published_from_oracle(config: ModelConfig, weights: Tensors) -> Tensors:
    """The oracle's flat [in, out] weights (see `tests.oracle`) under published names, [out, in], float32."""
    out: Tensors = {}
    for name, value in weights.items():
        value = np.asarray(value, np.float32)
        if name.startswith("mtp."):
            _, depth, rest = name.split(".", 2)
            rest = "shared_head.norm.weight" if rest == "norm.weight" else rest.removeprefix("block.")
            name = f"layers.{config.num_hidden_layers + int(depth)}.{rest}"
        name = name if name == "lm_head.weight" else f"model.{name}"
        if name == "model.embed_tokens.weight" or value.ndim == 1:
            out[name] = value
        elif ".mlp.experts." in name:
            stem, matrix = name.rsplit(".", 1)
            out |= {f"{stem}.{expert}.{matrix}.weight": one.T for expert, one in enumerate(value)}
        else:
            out[name] = value.T
    for depth in range(config.num_nextn_predict_layers):
        prefix = f"model.layers.{config.num_hidden_layers + depth}"
        out[f"{prefix}.embed_tokens.weight"] = out["model.embed_tokens.weight"]
        out[f"{prefix}.shared_head.head.weight"] = out["lm_head.weight"]
    if config.topk_method != "noaux_tc":
        out = {name: value for name, value in out.items() if not name.endswith("e_score_correction_bias")}
    return {name: np.ascontiguousarray(value) for name, value in out.items()}


def in_format(tensors: Tensors, fmt: str, seed: int = 0) -> Tensors:
    """`tensors` in a published format. In float8 the codes and scales are random: any code but NaN, any scale."""
    random = np.random.default_rng(seed)
    out: Tensors = {}
    for name, value in tensors.items():
        if name.endswith("e_score_correction_bias") or fmt == "float32":
            out[name] = value.astype(np.float32)
        elif fmt == "bfloat16" or any(part in name for part in KEPT):
            out[name] = value.astype(BFLOAT16)
        else:
            magnitude = random.integers(0, 127, value.shape, np.uint8)
            out[name] = (magnitude | (random.integers(0, 2, value.shape, np.uint8) << 7)).view(E4M3)
            blocks = tuple((size + 127) // 128 for size in value.shape)
            out[name + "_scale_inv"] = random.uniform(1e-5, 1e-3, blocks).astype(np.float32)
    return out


def save(folder: Path, values: dict[str, Any], tensors: Tensors, shards: int = 1) -> Path:
    """Writes a published folder with the `safetensors` library, in the order of names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05d}-of-{shards:06d}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in tensors.values())},
             "weight_map": {name: files[i % shards] for i, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """(dtype, shape, bytes) of every tensor in a folder, as the `safetensors` library reads them."""
    return {name: (about["dtype"], tuple(about["shape"]), bytes(about["data"]))
            for path in folder.glob("*.safetensors") for name, about in safetensors.deserialize(path.read_bytes())}
