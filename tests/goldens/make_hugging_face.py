"""Makes the golden files that tie this project to Hugging Face transformers.

Those in `hugging_face/` were made by transformers 5.23.0 with torch 2.13.0 on a CPU (`made_by` in each expected.npz).
To make them again, in an environment of Python 3.11 or later (the project's own needs neither package):

    pip install torch transformers safetensors numpy
    python tests/goldens/make_hugging_face.py [CASE ...]

A case is a folder of three files:

    config.json        keys as in the published files
    model.safetensors  random weights as published: one tensor an expert, [out, in], bfloat16 (or float8 with scales)
    expected.npz       what transformers computes from those two files, in float32, with eager attention:
      tokens         int32 [B, T], or [B, T + 1] with multi-token prediction
      logits         [B, T, V]
      mtp_logits     [B, T, V] of the prediction layer, where there is one
      experts        int32 [L, B, T, K], ascending, of every MoE layer; a prediction layer comes last
      weights        [L, B, T, K] in the same order
      router_inputs  [L, B, T, D]
      zero_mask_*    the same three, and logits, were experts outside the chosen groups scored 0 (see `CASES`)

Choices are fair to compare because tokens are drawn again until no score lies closer than `SMALLEST_GAP` to the
boundary of a choice. Every choice of transformers' is checked here against a second, plain router.

Versions differ. Up to 4.57 transformers gave experts outside the chosen groups of V3 the score 0; now it is -inf, as in
DeepSeek's code (transformers #45440). 4.57.6 computes `zero_mask_logits` here within 2e-7 of the largest. It left
YaRN's temperature out of V2's attention, so that it does not agree on the V2 cases. All versions apply `rms_norm_eps`
to all norms but those of the compressed query and of the latent, which have 1e-6. All leave the layer of multi-token
prediction out of the model; 5.23 runs it for drafts, on hidden states from after the final norm.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

FOLDER = Path(__file__).parent / "hugging_face"
SMALLEST_GAP = 1e-5
SEQUENCES, LENGTH = 2, 16
BLOCK = 128
Tensors = dict[str, torch.Tensor]

PUBLISHED = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 8, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 16, "v_head_dim": 12, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "attention_bias": False,
    "attention_dropout": 0.0, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "use_cache": True,
    "max_position_embeddings": 2560, "rope_theta": 10000, "rope_scaling": None, "torch_dtype": "bfloat16",
    "pretraining_tp": 1,
}
V3 = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", **PUBLISHED, "n_group": 4,
      "topk_group": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
      "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0}
V2 = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", **PUBLISHED, "n_group": 1,
      "topk_group": 1, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
      "routed_scaling_factor": 1.0, "n_shared_experts": 2}
# Frequency pair 0 of 8 is kept, 1 and 2 are on the ramp, the rest is divided by 40.
BARE_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64}


def yarn(mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    return {**BARE_YARN, "beta_fast": 32, "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale_all_dim}


def small_bias(draw: torch.Tensor) -> torch.Tensor:
    return 0.1 * draw


def negative_bias(draw: torch.Tensor) -> torch.Tensor:
    """Only experts 3 and 9 can have a biased score above 0."""
    bias = 0.1 * draw - 1.5
    bias[[3, 9]] += 2.0
    return bias


class Case(NamedTuple):
    """How a case differs from the tiny V3 or V2."""

    config: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16
    """Of matrices on disk; float8 goes with scales."""
    bias: Callable[[torch.Tensor], torch.Tensor] = small_bias
    zero_mask: bool = False
    embedding_std: float = 1.0


CASES = {
    "yarn": Case(V3 | {"rope_scaling": yarn(1.0, 1.0)}),
    "yarn_unequal_mscales": Case(V3 | {"rope_scaling": yarn(1.0, 0.5), "n_group": 8, "topk_group": 3}),
    "yarn_without_mscale_keys": Case(V3 | {"rope_scaling": BARE_YARN, "n_shared_experts": 2, "n_routed_experts": 8,
                                           "num_experts_per_tok": 3}),
    "two_groups_in_float32": Case(V3 | {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1,
                                        "num_hidden_layers": 2, "torch_dtype": "float32"}, torch.float32),
    # As in Moonlight: no groups, no query compression; small inputs make the norms' epsilon count.
    "one_group_other_eps_and_theta": Case(
        V3 | {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "n_shared_experts": 2, "rope_theta": 50000.0,
              "rms_norm_eps": 1e-3, "routed_scaling_factor": 2.446}, embedding_std=0.05),
    "unnormalised_two_dense_layers": Case(
        V3 | {"norm_topk_prob": False, "routed_scaling_factor": 1.7, "n_shared_experts": 3,
              "first_k_dense_replace": 2}),
    "v2_lite": Case(V2 | {"q_lora_rank": None, "n_routed_experts": 8, "rope_scaling": yarn(0.707, 0.707)}),
    # (V2's factor of 16 is for softmax over 160 experts; over 16 it would amplify float32 rounding to 1e-5.)
    "v2_groups": Case(V2 | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
                            "routed_scaling_factor": 3.0, "rope_scaling": yarn(1.0, 1.0)}),
    # Six experts are chosen, of three groups of four. By the score of 0 the four others go before all but two of them,
    # so there is no tie to decide.
    "negative_bias": Case(V3 | {"topk_group": 3, "num_experts_per_tok": 6, "num_hidden_layers": 2}, bias=negative_bias,
                          zero_mask=True),
    "prediction": Case(V3 | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "n_routed_experts": 12}),
    "float8": Case(
        V3 | {"vocab_size": 32, "hidden_size": 136, "intermediate_size": 132, "num_hidden_layers": 2,
              "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
              "rope_scaling": yarn(1.0, 1.0),
              "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                      "weight_block_size": [BLOCK, BLOCK]}}, torch.float8_e4m3fn),
}


def unquantised(config: dict[str, Any]) -> dict[str, Any]:
    """A copy (transformers writes into what it is given) that says nothing of float8."""
    return copy.deepcopy({key: value for key, value in config.items() if key != "quantization_config"})


def names_and_shapes(config: dict[str, Any]) -> dict[str, torch.Size]:
    """Of the tensors that transformers itself writes for this model, and of the published prediction layer."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**unquantised(config)))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        shapes = {name: tensor.shape for name, tensor in load_file(f"{folder}/model.safetensors").items()}
    if config.get("num_nextn_predict_layers"):
        layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        last, new = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
        shapes |= {name.replace(last, new): shape for name, shape in shapes.items() if name.startswith(last)}
        shapes |= {f"{new}{name}.weight": torch.Size([hidden]) for name in ("enorm", "hnorm", "shared_head.norm")}
        shapes |= {f"{new}eh_proj.weight": torch.Size([hidden, 2 * hidden])}
    return dict(sorted(shapes.items()))


def draw_weights(case: Case, random: torch.Generator) -> Tensors:
    """Weights exact in bfloat16 (the bias: float32) that spread attention and routing widely."""
    weights = {}
    for name, shape in names_and_shapes(case.config).items():
        draw = torch.randn(shape, generator=random)
        if name.endswith("e_score_correction_bias"):
            weights[name] = case.bias(draw)
            continue
        if "norm" in name.split(".")[-2]:
            draw = 1.0 + 0.2 * draw
        elif "embed_tokens" in name:
            draw = case.embedding_std * draw
        else:
            draw = (2.0 if ".gate.weight" in name or ".q_" in name else 1.0) * draw / math.sqrt(shape[-1])
        weights[name] = draw.bfloat16().float()
    layers, head = case.config["num_hidden_layers"], {}
    if case.config.get("num_nextn_predict_layers"):  # The published files repeat what the prediction layer shares.
        head = {f"model.layers.{layers}.embed_tokens.weight": weights["model.embed_tokens.weight"],
                f"model.layers.{layers}.shared_head.head.weight": weights["lm_head.weight"]}
    return weights | head


def in_blocks(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A value a block -> the value of each element's block."""
    return scale.repeat_interleave(BLOCK, 0)[:shape[0]].repeat_interleave(BLOCK, 1)[:, :shape[1]]


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8 e4m3, scale of each 128x128 block); blocks at the edges are partial."""
    rows, columns = (math.ceil(size / BLOCK) for size in weight.shape)
    largest = torch.stack([torch.stack([weight[r * BLOCK:(r + 1) * BLOCK, c * BLOCK:(c + 1) * BLOCK].abs().max()
                                        for c in range(columns)]) for r in range(rows)])
    scale = largest / torch.finfo(torch.float8_e4m3fn).max
    return (weight / in_blocks(scale, weight.shape)).to(torch.float8_e4m3fn), scale


def on_disk(case: Case, weights: Tensors) -> tuple[Tensors, Tensors]:
    """(the tensors of the file, the float32 weights they stand for)."""
    stored: Tensors = {}
    exact = dict(weights)
    for name, weight in weights.items():
        if name.endswith("e_score_correction_bias") or case.dtype == torch.float32:
            stored[name] = weight
        elif case.dtype == torch.float8_e4m3fn and "_proj" in name and "eh_proj" not in name:
            stored[name], stored[f"{name}_scale_inv"] = quantise(weight)
            exact[name] = stored[name].float() * in_blocks(stored[f"{name}_scale_inv"], weight.shape)
        else:
            stored[name] = weight.bfloat16()
    return {name: tensor.clone().contiguous() for name, tensor in stored.items()}, exact


def load_peer(config: dict[str, Any], exact: Tensors) -> tuple[torch.nn.Module, MtpModel | None]:
    """transformers' model, and its layer of multi-token prediction, read from a folder of the published format."""
    own = getattr(transformers, config["architectures"][0])
    # The class knows the prediction layer of the 61-layer model only.
    own._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config['num_hidden_layers']}.*"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(unquantised(config)))
        save_file({name: tensor.clone() for name, tensor in exact.items()}, f"{folder}/model.safetensors",
                  metadata={"format": "pt"})
        model, loading = own.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                             experts_implementation="eager", output_loading_info=True)
        assert not any(loading.values()), loading
        prediction = MtpModel.from_pretrained(model) if config.get("num_nextn_predict_layers") else None
    return model.eval(), prediction.eval() if prediction else None


class Choice(NamedTuple):
    """A router's decision for tokens [T], experts ascending."""

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    gap: float
    """How close a score came to the boundary of a choice."""


def gap_after(scores: torch.Tensor, count: int) -> float:
    """The smallest step between the scores that are among the `count` best and those that are not."""
    ordered = scores.sort(dim=-1, descending=True).values
    return float((ordered[:, count - 1] - ordered[:, count]).min()) if count < scores.shape[-1] else math.inf


def choose(config: dict[str, Any], hidden_TD: torch.Tensor, gate: torch.nn.Module, masked: float) -> Choice:
    """The published routing in plain words; `masked` is the score of experts outside the chosen groups."""
    logits = hidden_TD @ gate.weight.T
    biased = config["topk_method"] == "noaux_tc"
    scores = logits.sigmoid() if config["scoring_func"] == "sigmoid" else logits.softmax(dim=-1)
    ranked = scores + gate.e_score_correction_bias if biased else scores
    gap, groups = math.inf, config["n_group"]
    if groups > 1:
        by_group = ranked.reshape(len(ranked), groups, -1)
        group_scores = by_group.sort(dim=-1, descending=True).values[..., :2 if biased else 1].sum(dim=-1)
        gap = gap_after(group_scores, config["topk_group"])
        kept = group_scores >= group_scores.sort(dim=-1, descending=True).values[:, config["topk_group"] - 1, None]
        ranked = torch.where(kept[..., None], by_group, torch.tensor(masked)).reshape(ranked.shape)
    top_k = config["num_experts_per_tok"]
    experts = ranked.argsort(dim=-1, descending=True)[:, :top_k].sort(dim=-1).values
    weights = scores.gather(1, experts)
    if config["norm_topk_prob"]:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Choice(experts, weights * config["routed_scaling_factor"], min(gap, gap_after(ranked, top_k)))


def routers_of(*models: torch.nn.Module | None) -> list[torch.nn.Module]:
    return [module for model in models if model for module in model.modules() if "TopkRouter" in type(module).__name__]


def forward(model: torch.nn.Module, prediction: MtpModel | None, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of all positions and depths; the prediction layer reads each position's next token."""
    if prediction is None:
        return {"logits": model(tokens, use_cache=False).logits}
    length = tokens.shape[1] - 1
    hidden = model.model(tokens[:, :length], use_cache=False).last_hidden_state
    ahead = prediction.forward_layer(0, hidden, torch.arange(1, length + 1)[None],
                                     MtpCache(config=model.config.get_mtp_config()), input_ids=tokens[:, 1:])
    return {"logits": model.lm_head(hidden), "mtp_logits": model.lm_head(ahead)}


def record(config: dict[str, Any], model: torch.nn.Module, prediction: MtpModel | None, tokens: torch.Tensor,
           masked: float) -> tuple[dict[str, np.ndarray], float]:
    """Logits and routing, and how close routing came to another choice."""
    found: list[tuple[torch.Tensor, Choice]] = []

    def see(gate: torch.nn.Module, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, ...]) -> None:
        hidden_TD = inputs[0].reshape(-1, config["hidden_size"])
        plain = choose(config, hidden_TD, gate, masked)
        experts, order = output[2].sort(dim=-1)
        weights = output[1].gather(1, order)
        if plain.gap > SMALLEST_GAP:
            assert torch.equal(experts, plain.experts_TK)
            torch.testing.assert_close(weights, plain.weights_TK, rtol=1e-5, atol=0)
        found.append((hidden_TD, Choice(experts, weights, plain.gap)))
    hooks = [gate.register_forward_hook(see) for gate in routers_of(model, prediction)]
    with torch.no_grad():
        outputs = forward(model, prediction, tokens)
    for hook in hooks:
        hook.remove()
    batch = outputs["logits"].shape[:2]
    outputs |= {"experts": torch.stack([choice.experts_TK.int().reshape(*batch, -1) for _, choice in found]),
                "weights": torch.stack([choice.weights_TK.reshape(*batch, -1) for _, choice in found]),
                "router_inputs": torch.stack([hidden_TD.reshape(*batch, -1) for hidden_TD, _ in found])}
    return {name: value.numpy() for name, value in outputs.items()}, min(choice.gap for _, choice in found)


def mask_with_zero(config: dict[str, Any], model: torch.nn.Module) -> None:
    """Puts the plain router with the masking score 0 in place of transformers' own."""
    def use_plain(gate: torch.nn.Module) -> None:
        def route(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            hidden_TD = hidden.reshape(-1, config["hidden_size"])
            choice = choose(config, hidden_TD, gate, 0.0)
            return hidden_TD @ gate.weight.T, choice.weights_TK, choice.experts_TK
        gate.forward = route
    for gate in routers_of(model):
        use_plain(gate)


def check_variety(model: torch.nn.Module, expected: dict[str, np.ndarray]) -> None:
    """Experts take turns, and heads look at few tokens: a uniform mistake could not hide."""
    for chosen in expected["experts"]:
        assert len(np.unique(chosen.reshape(-1, chosen.shape[-1]), axis=0)) > 3
    with torch.no_grad():
        maps = model(torch.as_tensor(expected["tokens"])[:, :LENGTH].long(), output_attentions=True).attentions
    assert all(attention[:, :, -1].max(dim=-1).values.mean() > 2 / LENGTH for attention in maps)


def make(name: str) -> None:
    """Writes one case."""
    case, random = CASES[name], torch.Generator().manual_seed(sum(name.encode()))
    config = case.config
    stored, exact = on_disk(case, draw_weights(case, random))
    length = LENGTH + config.get("num_nextn_predict_layers", 0)
    zero_mask: dict[str, np.ndarray] = {}
    for _ in range(100):
        tokens = torch.randint(config["vocab_size"], (SEQUENCES, length), generator=random)
        model, prediction = load_peer(config, exact)
        outside = -math.inf if config["topk_method"] == "noaux_tc" else 0.0
        expected, gap = record(config, model, prediction, tokens, outside)
        check_variety(model, expected | {"tokens": tokens.numpy()})
        if case.zero_mask:
            mask_with_zero(config, model)
            zero_mask, zero_gap = record(config, model, prediction, tokens, 0.0)
            assert not np.array_equal(zero_mask["experts"], expected["experts"])
            gap = min(gap, zero_gap)
        if gap > SMALLEST_GAP:
            break
    else:
        raise RuntimeError(f"{name}: every draw of tokens had a near-tie")
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    made_by = f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    np.savez_compressed(folder / "expected.npz", made_by=made_by, tokens=tokens.numpy().astype(np.int32), **expected,
                        **{f"zero_mask_{key}": value for key, value in zero_mask.items()})
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size / 1e3:.0f} kB, smallest gap {gap:.1e}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for chosen_case in sys.argv[1:] or CASES:
        make(chosen_case)
