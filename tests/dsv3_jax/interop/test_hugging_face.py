"""The model and the oracle against Hugging Face transformers, by the golden files of `tests/goldens/hugging_face`.

What the files hold and how they were made: `tests/goldens/make_hugging_face.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from flax import nnx

from dsv3_jax.config import MeshConfig, ModelConfig, RopeScaling
from dsv3_jax.interop.convert import open_store
from dsv3_jax.interop.load import load
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn import router
from dsv3_jax.nn.model import DeepSeekV3, model_structure
from tests import oracle

GOLDENS = Path(__file__).parents[2] / "goldens" / "hugging_face"
CASES = sorted(folder.name for folder in GOLDENS.iterdir())
# Case, prefix of the expectation's names, score of experts outside the chosen groups.
RUNS = [*((case, "", "-inf") for case in CASES), ("negative_bias", "zero_mask_", "0")]
each_run = pytest.mark.parametrize(("case", "prefix", "masked"), RUNS)

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}


def _read_config(folder: Path, masked_group_score: str) -> ModelConfig:
    published = json.loads((folder / "config.json").read_text())
    known = {field.name: published[field.name] for field in dataclasses.fields(ModelConfig)
             if field.name in published and field.name != "num_key_value_heads"}
    if known["rope_scaling"]:
        given = {key: value for key, value in known["rope_scaling"].items() if key != "type"}
        known["rope_scaling"] = RopeScaling(**{"mscale": 1.0, "mscale_all_dim": 0.0} | given)
    return ModelConfig(**{"num_nextn_predict_layers": 0} | known, mtp_hidden="post_norm",
                       masked_group_score=masked_group_score)


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Tensors by their published names; float8 ones are float32, times the scale of their 128x128 block."""
    stored = {name: np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"]).astype(np.float32)
              for name, entry in safetensors.deserialize((folder / "model.safetensors").read_bytes())}
    for name in [name for name in stored if name.endswith("_scale_inv")]:
        weight = stored[name.removesuffix("_scale_inv")]
        weight *= np.kron(stored.pop(name), np.ones((128, 128), np.float32))[:weight.shape[0], :weight.shape[1]]
    return stored


def load_for_oracle(folder: Path, masked_group_score: str) -> tuple[ModelConfig, oracle.Weights]:
    """A folder of the published format as the oracle's weights: matrices [in, out], the experts' stacked."""
    config, published = _read_config(folder, masked_group_score), _read_tensors(folder)
    weights = {}
    for name in oracle.weight_shapes(config):
        own = name
        if name.startswith("mtp."):
            depth, rest = name.removeprefix("mtp.").split(".", 1)
            rest = f"shared_head.{rest}" if rest == "norm.weight" else rest.removeprefix("block.")
            own = f"layers.{config.num_hidden_layers + int(depth)}.{rest}"
        own = own if own == "lm_head.weight" else f"model.{own}"
        before, stacked, part = own.partition(".mlp.experts.")
        if stacked:
            weights[name] = np.stack([published[f"{before}{stacked}{expert}.{part}.weight"].T
                                      for expert in range(config.n_routed_experts)])
        elif own.endswith("e_score_correction_bias"):
            weights[name] = published.get(own, np.zeros(config.n_routed_experts))  # V2 has none.
        else:
            weights[name] = published[own] if "embed_tokens" in own else published[own].T
    return config, {name: weight.astype(np.float64) for name, weight in weights.items()}


@functools.cache
def load_published(folder: Path, masked_group_score: str) -> tuple[ModelConfig, DeepSeekV3]:
    """A folder of the published format as this project's model."""
    store = open_store(folder)
    config = dataclasses.replace(store.config, masked_group_score=masked_group_score)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    structure = model_structure(config)
    return config, nnx.merge(structure, *load(store, mesh))


def _expected(case: str, prefix: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / case / "expected.npz") as file:
        found = {name: file[name] for name in file.files}
    replaced = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    return found | replaced


def _ascending(experts_BTK: jax.Array, weights_BTK: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    experts, weights = np.asarray(experts_BTK), np.asarray(weights_BTK)
    order = np.argsort(experts, axis=-1)
    return np.take_along_axis(experts, order, -1), np.take_along_axis(weights, order, -1)


def _run(model: DeepSeekV3, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> tuple[list, list]:
    """(logits of the model and of its prediction layers, (experts, weights) of each MoE layer in order)."""
    choices: list[tuple[np.ndarray, np.ndarray]] = []
    choose = router.choose_experts

    def recording(*args):
        routing = choose(*args)
        jax.debug.callback(lambda *found: choices.append(_ascending(*found)), routing.experts_K, routing.weights_K,
                           ordered=True)
        return routing
    monkeypatch.setattr(router, "choose_experts", recording)

    @jax.jit
    def run(tokens):
        output = model(tokens)
        return [model.logits(hidden) for hidden in (output.hidden_BTD, *output.mtp_hidden)]
    logits = jax.block_until_ready(run(tokens))
    jax.effects_barrier()
    return logits, choices


def _assert_close(actual, expected, share):
    """Within `share` of the largest value expected."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=share * np.abs(expected).max())


def _assert_logits(expected: dict[str, np.ndarray], logits: list) -> None:
    """Float32 rounding of two programs through four layers stays under 1e-5 of the largest logit."""
    wanted = [expected[name] for name in ("logits", "mtp_logits") if name in expected]
    for got, want in zip(logits, wanted, strict=True):
        _assert_close(got, want, 1e-5)


@each_run
def test_model_agrees(case, prefix, masked, monkeypatch):
    """Every layer chooses the same experts; weights differ by what rounding does to the hidden states before."""
    expected = _expected(case, prefix)
    _, model = load_published(GOLDENS / case, masked)
    logits, choices = _run(model, jnp.asarray(expected["tokens"]), monkeypatch)
    _assert_logits(expected, logits)
    for (experts, weights), want_experts, want_weights in zip(
            choices, expected["experts"], expected["weights"], strict=True):
        np.testing.assert_array_equal(experts, want_experts)
        _assert_close(weights, want_weights, 3e-6)


@each_run
def test_routers_agree(case, prefix, masked):
    """From the very inputs of transformers' routers: the same experts, each weight within 1e-6 of itself."""
    expected = _expected(case, prefix)
    _, model = load_published(GOLDENS / case, masked)
    graphdef, stacked = nnx.split(model.moe_layers.mlp.gate)
    layers = range(len(expected["experts"]) - len(model.mtp))
    gates = [nnx.merge(graphdef, jax.tree.map(lambda x, i=i: x[i], stacked)) for i in layers]
    gates += [module.block.mlp.gate for module in model.mtp]
    for gate, hidden_BTD, want_experts, want_weights in zip(
            gates, expected["router_inputs"], expected["experts"], expected["weights"], strict=True):
        routing = gate(jnp.asarray(hidden_BTD))
        experts, weights = _ascending(routing.experts_K, routing.weights_K)
        np.testing.assert_array_equal(experts, want_experts)
        np.testing.assert_allclose(weights, want_weights, rtol=1e-6)


@each_run
def test_oracle_agrees(case, prefix, masked):
    """The oracle, written from the papers' equations in float64, is the same model as transformers'."""
    expected = _expected(case, prefix)
    main, depths = oracle.forward(*load_for_oracle(GOLDENS / case, masked), expected["tokens"])
    _assert_logits(expected, [main, *depths])


def test_the_score_outside_the_groups_matters():
    """The case of negative biases tells the two ways apart."""
    assert not np.array_equal(_expected("negative_bias", "")["experts"],
                              _expected("negative_bias", "zero_mask_")["experts"])
