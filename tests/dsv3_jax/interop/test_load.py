"""Published tensors as live parameters on any mesh, and back."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.interop import load as load_module
from dsv3_jax.interop import store
from dsv3_jax.interop.convert import convert, open_store
from dsv3_jax.interop.load import LiveWeights, load
from dsv3_jax.mesh import make_mesh
from dsv3_jax.nn.model import model_structure
from dsv3_jax.nn.router import RouterBias
from dsv3_jax.precision.quantised import Quantised
from dsv3_jax.precision.recipe import inference_weights
from dsv3_jax.presets import MODELS, RUNS
from dsv3_jax.training.schedule import Position
from dsv3_jax.training.state import init_state, state_shardings
from tests import oracle
from tests.published import (
    E4M3,
    in_format,
    published_from_oracle,
    read_bytes,
    save,
    small_config_json,
)
from tests.weights import model_from_oracle

TINY = MODELS["tiny"]
MESHES = {"1 device": MeshConfig(data=1), "8 devices": MeshConfig(scale_out=2, scale_up=4),
          "2 share a sequence": MeshConfig(data=2, scale_up=2, context=2)}
V2 = {"scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 0}
VARIANTS = {
    "v3": {},
    "wide": {"hidden_size": 192, "kv_lora_rank": 130, "moe_intermediate_size": 136},
    "two prediction depths, no query compression": {"num_nextn_predict_layers": 2, "q_lora_rank": None},
    "no dense layer, no shared expert": {"first_k_dense_replace": 0, "n_shared_experts": 0},
    "v2": {**V2, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "n_shared_experts": 2},
}


def _mesh(name):
    config = MESHES[name]
    return make_mesh(config, jax.devices()[:1] if name == "1 device" else None)


def _source(path, config, fmt="float32", seed=4, **replaced):
    """A published folder of the oracle's weights."""
    tensors = in_format(published_from_oracle(config, oracle.random_weights(config, seed)), fmt) | replaced
    values = small_config_json(config, fmt == "float8")
    values |= {name: getattr(config, name) for name in ("scoring_func", "topk_method")}
    if config.scoring_func == "softmax":
        values |= {"model_type": "deepseek_v2"}
    return save(path, values, tensors)


def _states(model):
    return nnx.split(model, nnx.Param, RouterBias)[1:3]


def _equal(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(store, "BLOCK_ELEMENTS", 128 * 192)


@pytest.mark.parametrize(("variant", "mesh"), [*((name, "8 devices") for name in VARIANTS),
                                               ("wide", "1 device"), ("wide", "2 share a sequence")])
def test_load_gives_the_oracles_model(variant, mesh, tmp_path):
    """Every weight where the oracle's stands: no transpose, half, layer or expert is mixed up."""
    config = dataclasses.replace(TINY, **VARIANTS[variant])
    params, router_bias = load(open_store(_source(tmp_path / "source", config)), _mesh(mesh))
    weights = oracle.random_weights(config, 4)
    if config.topk_method != "noaux_tc":  # has no published bias
        weights = {name: 0 * value if "correction_bias" in name else value for name, value in weights.items()}
    expected = _states(model_from_oracle(config, weights))
    _equal((params, router_bias), expected)


def test_arrays_lie_as_in_training(tmp_path):
    config = dataclasses.replace(RUNS["tiny"], mesh=MESHES["8 devices"])
    params, router_bias = load(open_store(_source(tmp_path / "source", TINY)), _mesh("8 devices"))
    layout = state_shardings(config, _mesh("8 devices"))
    for found, wanted in ((params, layout.params), (router_bias, layout.router_bias)):
        same = jax.tree.map(lambda x, s: x.sharding == s and x.dtype == np.float32, found, wanted)
        assert all(jax.tree.leaves(same))


def test_a_device_reads_only_its_slices(tmp_path):
    """In all, each published element about once, however many devices: the experts of a layer are spread over 8."""
    source = open_store(_source(tmp_path / "source", TINY))
    read = {}
    original = source._read

    def counting(name, bounds):
        read[name] = read.get(name, 0) + math.prod(last - first for first, last in bounds)
        return original(name, bounds)
    source._read = counting
    load(source, _mesh("8 devices"))
    experts = {name: count for name, count in read.items() if ".experts." in name}
    assert len(experts) == 3 * 16 * 3
    assert {name: count for name, count in experts.items() if count != math.prod(source.tensors[name].shape)} == {}


@pytest.mark.parametrize("mesh", ["1 device", "8 devices"])
def test_float8_is_multiplied_by_its_scales(mesh, tmp_path):
    config = dataclasses.replace(TINY, **VARIANTS["wide"])
    folder = _source(tmp_path / "source", config, "float8")
    params, _ = load(open_store(folder), _mesh(mesh))
    tensors = in_format(published_from_oracle(config, oracle.random_weights(config, 4)), "float8")
    for name, ours in (("layers.0.self_attn.kv_a_proj_with_mqa", params.dense_layers.self_attn.kv_a_proj_with_mqa),
                       ("layers.0.mlp.down_proj", params.dense_layers.mlp.down_proj)):
        codes, scales = tensors[f"model.{name}.weight"], tensors[f"model.{name}.weight_scale_inv"]
        assert codes.dtype == E4M3
        wide = codes.astype(np.float32)
        for (i, j), scale in np.ndenumerate(scales):
            wide[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128] *= scale
        np.testing.assert_array_equal(np.asarray(ours.weight[...])[0], wide.T)


def test_another_dtype(tmp_path):
    source = open_store(_source(tmp_path / "source", TINY, "bfloat16"))
    narrow, bias = load(source, _mesh("8 devices"), dtype=jnp.bfloat16)
    wide, _ = load(source, _mesh("8 devices"))
    for path, variable in nnx.to_flat_state(narrow):
        kept = "norm" in str(path) or "gate" in path  # norms and routers compute in float32
        assert variable[...].dtype.name == ("float32" if kept else "bfloat16"), path
    assert {x.dtype.name for x in jax.tree.leaves(bias)} == {"float32"}
    _equal(jax.tree.map(lambda x: x.astype(np.float32), narrow), wide)


@pytest.mark.parametrize(("fmt", "mesh"), [("bfloat16", "1 device"), ("bfloat16", "8 devices"),
                                           ("float32", "2 share a sequence")])
def test_published_to_live_and_back_bit_for_bit(fmt, mesh, tmp_path):
    config = dataclasses.replace(TINY, **VARIANTS["wide"])
    source = _source(tmp_path / "source", config, fmt)
    params, router_bias = load(open_store(source), _mesh(mesh))
    convert(LiveWeights(config, params, router_bias), tmp_path / "out", "published", fmt)
    assert read_bytes(tmp_path / "out") == read_bytes(source)


@functools.cache
def _made_on_one_device():
    return jax.tree.map(np.asarray, init_state(RUNS["tiny"], _mesh("1 device")))


def _first_state(mesh):
    """To make it there would take a program of its own."""
    return jax.device_put(_made_on_one_device(), state_shardings(RUNS["tiny"], mesh))


@jax.jit
def _logits(params, router_bias, tokens):
    model = nnx.merge(model_structure(TINY), params, router_bias)
    output = model(tokens)
    return [model.logits(hidden) for hidden in (output.hidden_BTD, *output.mtp_hidden)]


@pytest.mark.parametrize("mesh", ["1 device", "8 devices"])
@pytest.mark.parametrize("kind", ["published", "orbax"])
def test_exported_and_imported_logits_are_the_same_bit_for_bit(kind, mesh, tmp_path):
    """Main model and prediction module, of float32 weights with a bias that is not zero."""
    mesh = _mesh(mesh)
    state = _first_state(mesh)
    bias = jax.tree.map(lambda x: x + np.linspace(-0.1, 0.1, x.size, dtype=np.float32).reshape(x.shape),
                        state.router_bias)
    convert(LiveWeights(TINY, state.params, bias), tmp_path / "out", kind)
    params, router_bias = load(open_store(tmp_path / "out"), mesh)
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (8, 13))
    with jax.set_mesh(mesh):
        expected, actual = _logits(state.params, bias, tokens), _logits(params, router_bias, tokens)
    assert len(expected) == 2
    for got, want in zip(actual, expected, strict=True):
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize("name", ["model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"])
def test_copies_that_differ_are_refused_unless_allowed(name, tmp_path):
    main = "lm_head.weight" if "head" in name else "model.embed_tokens.weight"
    tensors = in_format(published_from_oracle(TINY, oracle.random_weights(TINY, 4)), "float32")
    other = tensors[name].copy()
    other[317, 5] += 1
    source = open_store(_source(tmp_path / "source", TINY, **{name: other}))
    with pytest.raises(ConfigError) as error:
        load(source, _mesh("1 device"))
    for word in (name, main, "row 317"):
        assert word in str(error.value)
    lines = []
    params, _ = load(source, _mesh("1 device"), allow_different_copies=True, say=lines.append)
    assert len(lines) == 1
    assert name in lines[0]
    ours = params.lm_head if "head" in name else params.embed_tokens
    np.testing.assert_array_equal(ours.weight[...], tensors[main])


def test_nothing_is_loaded_from_a_damaged_folder(tmp_path):
    tensors = in_format(published_from_oracle(TINY, oracle.random_weights(TINY, 4)), "float32")
    name = "model.layers.2.mlp.experts.15.down_proj.weight"
    bad = tensors[name].copy()
    bad[3, 3] = np.inf
    with pytest.raises(ConfigError, match=name):
        load(open_store(_source(tmp_path / "source", TINY, **{name: bad})), _mesh("8 devices"))


# As they are, scripts read checkpoints in tests/experiments/test_scripts.py.
@pytest.mark.parametrize("chunked", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_runs_checkpoint_is_a_store(chunked, tmp_path, monkeypatch):
    """Weights, biases and moving average of the stacked training state, on 8 devices, come out as published."""
    from dsv3_jax.training import checkpoint
    if chunked:  # as a large model's arrays are
        monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1 << 13)
    config = dataclasses.replace(RUNS["tiny"], mesh=MESHES["8 devices"])
    mesh = _mesh("8 devices")
    state = _first_state(mesh)
    state.ema = jax.tree.map(lambda x: 2 * x, state.params)
    state.router_bias = jax.tree.map(lambda x: x + 0.5, state.router_bias)
    checkpoints = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
    checkpoints.save(state, config, Position(7, 8))
    checkpoints.finish()
    restored, _ = checkpoints.restore(config, mesh)
    _equal(restored.params, state.params)
    checkpoints.close()
    if chunked:
        array = open_store(tmp_path / "run")._arrays._open("params/moe_layers/mlp/experts/gate_up_proj/value")
        chunk = array.chunk_layout.read_chunk.shape
        assert chunk[:2] == (1, 1)
    for ema, expected in ((False, state.params), (True, state.ema)):
        params, router_bias = load(open_store(tmp_path / "run", 7, ema), mesh)
        _equal(params, expected)
        _equal(router_bias, state.router_bias)
    convert(open_store(tmp_path / "run"), tmp_path / "out", "published", "bfloat16")
    convert(LiveWeights(TINY, state.params, state.router_bias), tmp_path / "live", "published", "bfloat16")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "live")
    with pytest.raises(ConfigError, match="step 6"):
        open_store(tmp_path / "run", 6)


def test_load_takes_no_more_of_a_tensor_than_a_device_holds(monkeypatch, tmp_path):
    """The host never assembles a whole stacked array when 8 devices share it."""
    largest = []
    original = load_module._on_host

    def measured(shape, *rest):
        largest.append(math.prod(shape))
        return original(shape, *rest)
    monkeypatch.setattr(load_module, "_on_host", measured)
    params, _ = load(open_store(_source(tmp_path / "source", TINY)), _mesh("8 devices"))
    assert max(largest) == max(x.size for x in jax.tree.leaves(params)) / 8


@pytest.mark.parametrize("mesh", ["1 device", "8 devices"])
def test_large_arrays_reach_devices_tensor_by_tensor(mesh, monkeypatch, tmp_path):
    """The same arrays, and what is handed over at a time is no more than a published tensor."""
    source = open_store(_source(tmp_path / "source", TINY))
    expected = load(source, _mesh(mesh))
    monkeypatch.setattr(load_module, "HOST_BYTES", 0)
    handed, original = [], jax.device_put

    def measured(x, device):
        handed.append(x.size)
        return original(x, device)
    monkeypatch.setattr(load_module.jax, "device_put", measured)
    _equal(load(source, _mesh(mesh)), expected)
    assert max(handed) <= max(math.prod(tensor.shape) for tensor in source.tensors.values())


@jax.jit
def _dequantised(params):
    return jax.tree.map(lambda x: x.transposed.dequantise(jnp.bfloat16) if isinstance(x, Quantised) else x, params,
                        is_leaf=lambda x: isinstance(x, Quantised))


@pytest.mark.parametrize("mesh", ["1 device", "8 devices"])
@pytest.mark.parametrize("inner", [128, 136])
def test_float8_stays_as_it_is_published(inner, mesh, tmp_path):
    """Codes and scales of what inference holds in float8 are the files' own, the rest as without; where stored blocks
    are not ours, because two halves share one, the array comes in bf16."""
    config = dataclasses.replace(TINY, **VARIANTS["wide"] | {"moe_intermediate_size": inner})
    source = open_store(_source(tmp_path / "source", config, "float8"))
    params, _ = load(source, _mesh(mesh), dtype=jnp.bfloat16, float8=True)
    wide, _ = load(source, _mesh(mesh), dtype=jnp.bfloat16)
    plain = {"/".join(map(str, path)) for path, variable in nnx.to_flat_state(params)
             if variable.get_metadata("float8", False) and not isinstance(variable.get_value(), Quantised)}
    found, expected = (nnx.to_flat_state(state) for state in (_dequantised(params), wide))
    for (path, ours), (same, other) in zip(found, expected, strict=True):
        assert path == same
        np.testing.assert_array_equal(np.asarray(ours.get_value()), np.asarray(other.get_value()), err_msg=str(path))
    halves = {"moe_layers/mlp/experts/gate_up_proj", "mtp/0/block/mlp/experts/gate_up_proj"}
    assert plain == {"mtp/0/eh_proj/weight"} | (halves if inner == 136 else set())  # published in bf16; see above
    held = jax.eval_shape(lambda params: inference_weights(params, "fp8"), params)
    assert all(isinstance(variable.get_value(), Quantised) == variable.get_metadata("float8", False)
               for _, variable in nnx.to_flat_state(held))


def test_float8_codes_and_scales_are_the_files_own(tmp_path):
    config = dataclasses.replace(TINY, hidden_size=192, moe_intermediate_size=128)
    params, _ = load(open_store(_source(tmp_path / "source", config, "float8")), _mesh("8 devices"), float8=True)
    tensors = in_format(published_from_oracle(config, oracle.random_weights(config, 4)), "float8")
    gate_up = params.moe_layers.mlp.experts.gate_up_proj.get_value()
    for half, name in enumerate(("gate_proj", "up_proj")):
        codes, scales = (tensors[f"model.layers.2.mlp.experts.5.{name}.weight{end}"] for end in ("", "_scale_inv"))
        found = np.split(np.asarray(gate_up.values), 2, axis=-2)[half][1, 5]
        np.testing.assert_array_equal(found.view(np.uint8), codes.view(np.uint8))
        np.testing.assert_array_equal(np.split(np.asarray(gate_up.scales), 2, axis=-2)[half][1, 5], scales)
