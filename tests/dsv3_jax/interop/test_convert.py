"""Conversions between folders, bit for bit, and what stops them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

from dsv3_jax.config import ConfigError
from dsv3_jax.interop import safetensors_writer, store
from dsv3_jax.interop.convert import convert, open_store
from dsv3_jax.interop.float8 import dequantise, quantise
from dsv3_jax.interop.orbax_files import OrbaxArrays
from dsv3_jax.interop.orbax_weights import OrbaxWriter
from dsv3_jax.interop.safetensors_folder import SafetensorsFolder
from dsv3_jax.presets import MODELS
from tests import oracle
from tests.published import (
    BFLOAT16,
    E4M3,
    in_format,
    published_from_oracle,
    read_bytes,
    save,
    small_config_json,
)

# Wide enough for several blocks of scales, and edges that no block fills: kv_a has 130 + 8 rows.
MODEL = dataclasses.replace(MODELS["tiny"], hidden_size=192, kv_lora_rank=130, moe_intermediate_size=136,
                            n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
FORMATS = ["float8", "bfloat16", "float32"]


def _tensors(fmt, config=MODEL):
    return in_format(published_from_oracle(config, oracle.random_weights(config, seed=4)), fmt)


def _folder(path, fmt, config=MODEL, shards=1):
    return save(path, small_config_json(config, fmt == "float8"), _tensors(fmt, config), shards)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Tensors here are small; this cuts even them into several blocks of rows."""
    monkeypatch.setattr(store, "BLOCK_ELEMENTS", 128 * 192)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return {fmt: _folder(folder / fmt, fmt, shards=3 if fmt == "float8" else 1) for fmt in FORMATS}


@pytest.mark.parametrize("fmt", FORMATS)
def test_published_to_orbax_and_back_bit_for_bit(published, fmt, tmp_path):
    source = published[fmt]
    (source / "tokenizer.json").write_text('{"any": "bytes"}')
    convert(open_store(source), tmp_path / "orbax", "orbax")
    convert(open_store(tmp_path / "orbax"), tmp_path / "back", "published", shard_bytes=300_000)
    assert read_bytes(tmp_path / "back") == read_bytes(source)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text())
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "orbax"]


@pytest.mark.parametrize("fmt", FORMATS)
def test_plain_orbax_restores_the_published_tensors(published, fmt, tmp_path):
    """As a flat dictionary, and into arrays laid out by the caller."""
    convert(open_store(published[fmt]), tmp_path / "orbax", "orbax")
    expected = _tensors(fmt)
    restored = ocp.StandardCheckpointer().restore(tmp_path / "orbax" / "weights")
    assert restored.keys() == expected.keys()
    for name, value in expected.items():
        assert restored[name].dtype == value.dtype
        assert np.asarray(restored[name]).tobytes() == value.tobytes(), name
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    target = {name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
              for name, value in expected.items()}
    restored = ocp.StandardCheckpointer().restore(tmp_path / "orbax" / "weights", target)
    for name, value in expected.items():
        assert restored[name].sharding == sharding
        assert np.asarray(restored[name]).tobytes() == value.tobytes(), name


def test_what_plain_orbax_saved_is_read(tmp_path):
    tensors = _tensors("float8")
    (tmp_path / "orbax").mkdir()
    (tmp_path / "orbax" / "config.json").write_text(json.dumps(small_config_json(MODEL, True)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax" / "weights", jax.tree.map(jax.numpy.asarray, tensors))
    convert(open_store(tmp_path / "orbax"), tmp_path / "back", "published")
    found = read_bytes(tmp_path / "back")
    assert {name: about[2] for name, about in found.items()} == {name: t.tobytes() for name, t in tensors.items()}


def test_index_says_where_and_how_much(published, tmp_path):
    convert(open_store(published["bfloat16"]), tmp_path / "out", "published", shard_bytes=200_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = _tensors("bfloat16")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    largest = max(value.nbytes for value in tensors.values())
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.stat().st_size < 200_000 + largest + 100_000  # and its header


@pytest.mark.parametrize(("source", "target"), [(a, b) for a in FORMATS for b in FORMATS if a != b])
def test_formats(published, source, target, tmp_path):
    """Each tensor as plain NumPy converts it, all at once."""
    convert(open_store(published[source]), tmp_path / "out", "published", target)
    tensors, found = _tensors(source), read_bytes(tmp_path / "out")
    expected = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        wide = value.astype(np.float32)
        if value.dtype == E4M3:
            wide = dequantise(value, tensors[name + "_scale_inv"])
        if name.endswith("e_score_correction_bias") or target == "float32":
            expected[name] = wide
        elif target == "float8" and name + "_scale_inv" in found:
            expected[name], expected[name + "_scale_inv"] = quantise(wide)
        else:
            expected[name] = wide.astype(BFLOAT16)
    assert expected.keys() == found.keys() == _tensors(target).keys()
    for name, value in expected.items():
        assert found[name][1:] == (value.shape, value.tobytes()), name
    open_store(tmp_path / "out").format()


def test_bfloat16_survives_float32(published, tmp_path):
    convert(open_store(published["bfloat16"]), tmp_path / "wide", "orbax", "float32")
    convert(open_store(tmp_path / "wide"), tmp_path / "back", "published", "bfloat16")
    assert read_bytes(tmp_path / "back") == read_bytes(published["bfloat16"])


def test_bias_in_bfloat16_is_kept(tmp_path):
    """Some models are published so."""
    tensors = {name: value.astype(BFLOAT16) for name, value in _tensors("bfloat16").items()}
    folder = save(tmp_path / "source", small_config_json(MODEL, False), tensors)
    convert(open_store(folder), tmp_path / "out", "orbax")
    convert(open_store(tmp_path / "out"), tmp_path / "back", "published")
    assert read_bytes(tmp_path / "back") == read_bytes(folder)


NAME = "model.layers.1.mlp.experts.2.up_proj.weight"


def _damage(folder, fmt, how):
    """A folder with one fault, and the words that its error must have."""
    tensors, values = _tensors(fmt), small_config_json(MODEL, fmt == "float8")
    file = "model.safetensors"
    if how == "missing":
        del tensors[NAME]
    elif how == "extra":
        tensors["model.layers.0.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"]
    elif how == "misshapen":
        tensors[NAME] = np.ascontiguousarray(tensors[NAME].T)
    elif how == "wrong dtype":
        tensors[NAME] = tensors[NAME].astype(np.float16)
    elif how == "not finite":
        tensors[NAME] = tensors[NAME].copy()
        tensors[NAME][-1, -1] = np.nan
    elif how == "no prediction layer":
        tensors = {name: value for name, value in tensors.items() if "layers.3." not in name}
    elif how == "unknown architecture":
        values["model_type"] = "llama"
    save(folder, values, tensors, shards=2 if how.startswith(("index", "unindexed")) else 1)
    index = folder / "model.safetensors.index.json"
    if how == "truncated":
        os.truncate(folder / file, (folder / file).stat().st_size - 10)
    elif how == "longer":
        with (folder / file).open("ab") as end:
            end.write(b"0000")
    elif how == "header cut":
        os.truncate(folder / file, 100)
    elif how == "empty":
        os.truncate(folder / file, 0)
    elif how == "index names absent shard":
        (folder / "model-00002-of-000002.safetensors").unlink()
    elif how == "index names absent tensor":
        about = json.loads(index.read_text())
        about["weight_map"]["model.layers.9.weight"] = "model-00001-of-000002.safetensors"
        index.write_text(json.dumps(about))
    elif how == "unindexed tensor":
        about = json.loads(index.read_text())
        del about["weight_map"][NAME]
        index.write_text(json.dumps(about))
    elif how == "no index":
        save(folder, values, tensors, shards=2)
        index.unlink()
        (folder / file).unlink()


FAULTS = {
    "missing": [NAME, "missing"],
    "extra": ["model.layers.0.mlp.gate.weight", "model.safetensors"],
    "misshapen": [NAME, "model.safetensors", "[192, 136]", "[136, 192]"],
    "wrong dtype": [NAME, "model.safetensors", "float16"],
    "not finite": [NAME, "model.safetensors", "NaN"],
    "no prediction layer": ["model.layers.3.", "num_nextn_predict_layers (1)"],
    "unknown architecture": ["model_type", "llama", "config.json"],
    "truncated": ["model.safetensors", "truncated", "tensor "],
    "longer": ["model.safetensors", "4 bytes after"],
    "header cut": ["model.safetensors", "truncated"],
    "empty": ["model.safetensors", "truncated"],
    "index names absent shard": ["model-00002-of-000002.safetensors", "tensor ", "index.json"],
    "index names absent tensor": ["model.layers.9.weight", "model-00001-of-000002.safetensors", "index.json"],
    "unindexed tensor": [NAME, "model-0000", "index.json"],
    "no index": ["model.safetensors.index.json"],
}


@pytest.mark.parametrize("fmt", ["float8", "bfloat16"])
@pytest.mark.parametrize("how", FAULTS)
def test_faults_name_tensor_and_file_and_leave_nothing(how, fmt, tmp_path):
    source = tmp_path / "source"
    _damage(source, fmt, how)
    with pytest.raises(ConfigError) as error:
        convert(open_store(source), tmp_path / "out", "orbax")
    for word in [str(source), *FAULTS[how]]:
        assert word in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("how", ["no metadata", "truncated data", "missing chunk", "not finite"])
def test_orbax_faults(how, tmp_path):
    tensors, folder = _tensors("bfloat16"), tmp_path / "source"
    if how == "not finite":
        tensors[NAME] = np.full_like(tensors[NAME], np.inf)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(small_config_json(MODEL, False)))
    plain = how == "missing chunk"  # folders instead of a database, so that a test can take a chunk away
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=not plain)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder / "weights", args=ocp.args.PyTreeSave(jax.tree.map(jax.numpy.asarray, tensors)))
    if how == "no metadata":
        (folder / "weights" / "_METADATA").unlink()
    elif how == "truncated data":
        largest = max((folder / "weights").rglob("d/*"), key=lambda path: path.stat().st_size)
        os.truncate(largest, largest.stat().st_size // 2)
    elif how == "missing chunk":
        (folder / "weights" / NAME / "0.0").unlink()
    with pytest.raises(ConfigError) as error:
        convert(open_store(folder), tmp_path / "out", "published")
    words = {"no metadata": ["_METADATA"], "truncated data": ["tensor ", "/d/"], "missing chunk": [NAME, "missing"],
             "not finite": [NAME, "infinity"]}[how]
    for word in [str(folder / "weights"), *words]:
        assert word in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _bytes_read():
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_many_small_tensors(tmp_path):
    """Opening reads the index about once, not for every tensor; writing commits by the number of tensors too."""
    tensors = {f"{i}": ((2, 2), np.dtype(np.float32)) for i in range(2500)}
    writer = OrbaxWriter(tmp_path, tensors)
    for i in range(2500):
        writer.write(f"{i}", 0, np.full((2, 2), i, np.float32))
    assert len(list((tmp_path / "weights" / "d").glob("*"))) > 1, "all writes wait in memory"
    writer.finish()
    size = sum(path.stat().st_size for path in (tmp_path / "weights" / "d").iterdir())
    before = _bytes_read()
    arrays = OrbaxArrays(tmp_path / "weights")
    assert len(arrays.arrays) == 2500
    assert 0 < _bytes_read() - before < 3 * size
    for i in range(0, 2500, 5):  # more than stay open
        assert arrays.read(f"{i}", ((1, 2), (0, 2))).tolist() == [[i, i]]
    assert _bytes_read() - before < 6 * size


@pytest.mark.parametrize("kind", ["published", "orbax"])
def test_an_existing_target_is_refused_and_untouched(published, kind, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        convert(open_store(published["float8"]), tmp_path / "out", kind)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", ["published", "orbax"])
def test_an_error_while_writing_leaves_nothing(published, kind, tmp_path, monkeypatch):
    def stop(done):
        if done.tensors > 20:
            raise OSError("no space left on device")
    with pytest.raises(OSError, match="no space"):
        convert(open_store(published["float8"]), tmp_path / "out", kind, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritten_tensor_is_an_error(tmp_path):
    """A writer that was not given every byte must not look complete."""
    writer = safetensors_writer.SafetensorsWriter(tmp_path, {"a": ((4, 2), np.dtype(np.float32))})
    writer.write("a", 0, np.ones((3, 2), np.float32))
    with pytest.raises(RuntimeError, match="8 bytes"):
        writer.finish()


@pytest.mark.parametrize(("number", "left"), [(signal.SIGTERM, []), (signal.SIGKILL, [".out.partial"])])
def test_a_kill_never_leaves_a_target(published, number, left, tmp_path):
    """SIGTERM cleans up; after SIGKILL the next attempt does."""
    script = (
        "import sys, time, signal; from pathlib import Path\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "from dsv3_jax.interop.convert import convert, open_store\n"
        "def slow(done): print('at work', flush=True); time.sleep(0.2)\n"
        f"convert(open_store(Path({str(published['float8'])!r})), Path({str(tmp_path / 'out')!r}), 'orbax', "
        "progress=slow)\n")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])})
    assert process.stdout.readline() == "at work\n"
    if number == signal.SIGKILL:
        with pytest.raises(ConfigError, match="another process"):
            convert(open_store(published["float8"]), tmp_path / "out", "orbax")
    time.sleep(0.3)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert [path.name for path in tmp_path.iterdir()] == left
    convert(open_store(published["float8"]), tmp_path / "out", "orbax")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(open_store(tmp_path / "out").tensors) == len(_tensors("float8"))


@pytest.mark.parametrize("index", [(), (slice(3, 9),), (slice(100, 190), slice(5, 6)), (slice(7, 8), slice(0, 192)),
                                   (slice(0, 0),)], ids=str)
@pytest.mark.parametrize("kind", ["published", "orbax"])
def test_slices(published, kind, index, tmp_path):
    folder = published["float8"]
    if kind == "orbax":
        folder = convert(open_store(folder), tmp_path / "orbax", "orbax")
    found = open_store(folder).read("model.embed_tokens.weight", index)
    np.testing.assert_array_equal(found, _tensors("float8")["model.embed_tokens.weight"][index])


def test_derived_tables_are_left_out(tmp_path):
    """Some files carry rotary tables, which follow from config.json."""
    tensors = _tensors("bfloat16") | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    folder = save(tmp_path / "source", small_config_json(MODEL, False), tensors)
    assert len(SafetensorsFolder(folder).tensors) == len(tensors) - 1
    assert open_store(folder).format() == "bfloat16"


def test_a_folder_of_nothing_known_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither safetensors"):
        open_store(tmp_path)
    with pytest.raises(ConfigError, match="neither safetensors"):
        open_store(tmp_path / "absent")
