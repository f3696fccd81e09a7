"""Two processes of four devices each load and generate as one process of eight does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.config import ConfigError, MeshConfig
from dsv3_jax.inference.generate import Generator
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.interop import store
from dsv3_jax.interop.convert import open_store
from dsv3_jax.interop.load import load
from dsv3_jax.mesh import make_mesh
from dsv3_jax.presets import MODELS
from tests import oracle
from tests.published import in_format, published_from_oracle, save, small_config_json

ROOT = Path(__file__).parents[3]
TINY = MODELS["tiny"]
MESH = MeshConfig(scale_out=2, scale_up=2, context=2)
PROMPTS = [[5, 9, 3], [7], [1, 2, 3, 4, 5, 6, 7, 8]]
SAMPLING = [Sampling(temperature=0), Sampling(seed=3), Sampling(0.7, top_k=20, seed=4)]
COPY = "model.layers.3.shared_head.head.weight"

_BEGIN = """
import json, sys
from pathlib import Path
from dsv3_jax.config import DistributedConfig, MeshConfig
from dsv3_jax.training import runtime
address, index, work = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
runtime.start(MeshConfig(simulate_devices=4), DistributedConfig(address, 2, index))
from dsv3_jax.mesh import make_mesh
from tests.dsv3_jax.interop import test_processes as test
mesh = make_mesh(test.MESH)
print(json.dumps(test.{function}(mesh, work, index)))
"""


def loaded(mesh, work, index):
    """Saves the shards that a process holds; returns the bytes it read of each tensor, and what it said of copies."""
    store.BLOCK_ELEMENTS = 128 * 64  # four blocks of the head's rows, so that both processes compare some
    source, read = open_store(work / "source"), {}
    rows = source._rows

    def counting(name, first, last):
        values = rows(name, first, last)
        read[name] = read.get(name, 0) + values.nbytes
        return values
    source._rows = counting
    held = {json.dumps([path, bounds]): values for path, bounds, values in shards(load(source, mesh))}
    np.savez(work / f"{index}.npz", **held)
    said = []
    with pytest.raises(ConfigError) as refused:
        load(open_store(work / "different"), mesh)
    load(open_store(work / "different"), mesh, allow_different_copies=True, say=said.append)
    return {"read": read, "refused": str(refused.value), "said": said}


def generated(mesh, work, index=0):
    """The new tokens, without drafts and with."""
    weights, texts = load(open_store(work / "source"), mesh), []
    for speculative in (False, True):
        generator = Generator(TINY, mesh, precision="float32", speculative=speculative)
        prompts = [np.array(prompt) for prompt in PROMPTS]
        texts.append(generator.generate(generator.prepare(*weights), prompts, 5, SAMPLING).run())
    return texts


def shards(loaded):
    """(path, bounds, values) of every shard on this process' devices."""
    for path, value in jax.tree_util.tree_leaves_with_path(loaded):
        for shard in value.addressable_shards:
            bounds = [part.indices(size)[:2] for part, size in zip(shard.index, value.shape, strict=True)]
            yield jax.tree_util.keystr(path), bounds, np.asarray(shard.data)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _two_processes(work, function):
    """What each of two processes returns from a function above."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
                                "JAX_COMPILATION_CACHE_DIR": str(ROOT / "tests" / ".cache"), "PYTHONPATH": str(ROOT)}
    address = f"127.0.0.1:{_free_port()}"
    script = _BEGIN.replace("{function}", function)
    processes = [subprocess.Popen([sys.executable, "-c", script, address, str(index), str(work)], text=True,
                                  env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                 for index in range(2)]
    outputs = [process.communicate(timeout=400) for process in processes]
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A published folder, and another whose copy of the head differs."""
    work = tmp_path_factory.mktemp("work")
    tensors = in_format(published_from_oracle(TINY, oracle.random_weights(TINY, 4)), "float32")
    save(work / "source", small_config_json(TINY, False), tensors)
    different = tensors[COPY].copy()
    different[150, 5] += 1  # in the second block, which the second process compares
    save(work / "different", small_config_json(TINY, False), tensors | {COPY: different})
    return work


def test_they_load_what_one_process_loads(work):
    outcomes = _two_processes(work, "loaded")
    alone = load(open_store(work / "source"), make_mesh(MESH))
    expected = {json.dumps([path, bounds]): values for path, bounds, values in shards(alone)}
    found: set[str] = set()
    for index in range(2):
        for key, values in np.load(work / f"{index}.npz").items():
            np.testing.assert_array_equal(values, expected[key], key)
            found.add(key)
    assert found == expected.keys()
    _check_reads(work, [outcome["read"] for outcome in outcomes])
    for outcome in outcomes:  # else one process would stop, and the others wait for it
        assert COPY in outcome["refused"]
        assert "row 150" in outcome["refused"]
        assert len(outcome["said"]) == 1


def _check_reads(work, reads):
    """A process reads its experts, once, and no others."""
    first, second = ({name for name in read if ".experts." in name} for read in reads)
    assert len(first) == len(second) == 3 * 8 * 3
    assert not first & second
    for name, stored in open_store(work / "source").tensors.items():
        if ".experts." in name:
            assert sum(read.get(name, 0) for read in reads) == stored.nbytes, name


@pytest.mark.slow
def test_they_generate_what_one_process_does(work):
    assert _two_processes(work, "generated") == [generated(make_mesh(MESH), work)] * 2
