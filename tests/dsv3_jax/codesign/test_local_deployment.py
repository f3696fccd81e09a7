"""Tokens a second of a PC and a server, by hand and against paper 1's section 2.2.2."""

from __future__ import annotations

import pytest

from dsv3_jax.codesign import local_machines
from dsv3_jax.codesign.dense_models import DENSE_MODELS, DenseModel
from dsv3_jax.codesign.local_deployment import BITS, tokens_per_second, weights_of
from dsv3_jax.codesign.local_machines import LOCAL_MACHINES, LocalMachine, Memory, find_machine, load_machine
from dsv3_jax.config import ConfigError
from dsv3_jax.presets import MODELS

SMALL = DenseModel("small", layers=2, hidden=100, intermediate=300, heads=4, kv_heads=2, head_dim=25, vocabulary=1000)
READ = 2 * (2 * 100 * 100 + 2 * 100 * 50 + 3 * 100 * 300) + 1000 * 100
"""Weights that a token reads."""
CACHED = 2 * 2 * 25 * 2 * 2
"""Bytes of a token in its cache."""


def test_one_memory_by_hand():
    machine = LocalMachine("pc", Memory(1e9, 1e6, 5e5), None, "")
    speed = tokens_per_second(SMALL, machine, bits=8, context=10)
    assert speed.nominal == pytest.approx(1e6 / (READ + 10 * CACHED))
    assert speed.effective == speed.nominal / 2
    assert speed.model_bytes == READ + 1000 * 100 + 10 * CACHED


def test_two_memories_by_hand():
    """The GPU is filled first, and the two take turns."""
    machine = LocalMachine("server", Memory(1e9, 1e6, 1e6), Memory(1e5, 1e7, 1e7), "")
    speed = tokens_per_second(SMALL, machine, bits=8, context=0)
    assert (speed.gpu_bytes, speed.memory_bytes) == (1e5, READ - 1e5)
    assert speed.nominal == pytest.approx(1 / (1e5 / 1e7 + (READ - 1e5) / 1e6))


def test_routed_experts_stay_in_the_processors_memory():
    """8 of 256 experts in 58 layers, 44.04M weights each; all else is 16.2B without the embedding."""
    weights = weights_of(MODELS["deepseek_v3"])
    assert weights.routed == 58 * 8 * 3 * 7168 * 2048
    assert weights.always == pytest.approx(36.63e9 - weights.routed, rel=1e-3)
    speed = tokens_per_second(MODELS["deepseek_v3"], LOCAL_MACHINES["ktransformers_server"], 4, context=0)
    assert (speed.memory_bytes, speed.gpu_bytes) == (weights.routed / 2, weights.always / 2)


@pytest.mark.parametrize(("machine", "low", "high"), [("ryzen_ai_max", 18, 23), ("dgx_spark", 18, 24),
                                                      ("m4_max", 36, 48)])
def test_deepseek_v2_on_a_pc(machine, low, high):
    """Nearly 20 tokens a second, or twice that; the bound is at most a fifth above."""
    assert low < tokens_per_second(MODELS["deepseek_v2"], LOCAL_MACHINES[machine], BITS["q4_0"]).nominal < high


def test_a_dense_model_of_70b_has_single_digits():
    speed = tokens_per_second(DENSE_MODELS["llama3.1_70b"], LOCAL_MACHINES["ryzen_ai_max"], BITS["q4_0"])
    assert 5 < speed.effective < speed.nominal < 10


def test_deepseek_v3_on_the_server():
    """Nearly 20 lies between what KTransformers reports of two sockets, 13.4, and the bound of its memories."""
    bound = tokens_per_second(MODELS["deepseek_v3"], LOCAL_MACHINES["ktransformers_server"], BITS["q4_k_m"]).nominal
    assert 20 < bound < 40
    assert LOCAL_MACHINES["ktransformers_server"].memory.bandwidth == pytest.approx(614.4e9)


@pytest.mark.parametrize(("model", "gigabytes"), [("deepseek_v3", 404.5), ("deepseek_v2", 142.5)])
def test_bits_of_published_files(model, gigabytes):
    """Sizes of mradermacher's and leafspark's Q4_K_M files."""
    assert weights_of(MODELS[model]).total * BITS["q4_k_m"] / 8e9 == pytest.approx(gigabytes, rel=0.005)


def test_a_model_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"378 GB at 4.5 bits a weight exceed the 137 GB of AMD .*: take fewer bits"):
        tokens_per_second(MODELS["deepseek_v3"], LOCAL_MACHINES["ryzen_ai_max"], 4.5)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Memory(0, 1.0, 1.0), r"bytes \(0\)"), (lambda: Memory(1.0, -1.0, 1.0), r"bandwidth \(-1.0\)"),
    (lambda: Memory(1.0, 1.0, 2.0), r"effective \(2\) must not exceed the nominal bandwidth \(1\)"),
    (lambda: tokens_per_second(SMALL, LOCAL_MACHINES["m4_max"], 0), r"bits \(0\)"),
    (lambda: tokens_per_second(SMALL, LOCAL_MACHINES["m4_max"], 8, context=-1), r"context \(-1\)")])
def test_nonsense_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_machines_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    lines = local_machines.__doc__.splitlines()
    path.write_text("\n".join(line[4:] for line in lines if line.startswith("    ")))
    mine = find_machine(str(path))
    assert mine == load_machine(path)
    assert mine.memory == Memory(768e9, 614.4e9, 500e9)
    assert mine.gpu == Memory(34.3e9, 1792e9, 1792e9)
    path.write_text(path.read_text().replace("500e9", "700e9"))
    with pytest.raises(ConfigError, match=r"mine.toml: memory.effective \(7\S+\) must not exceed the nominal"):
        load_machine(path)
    with pytest.raises(ConfigError, match="machine laptop is unknown"):
        find_machine("laptop")


def test_machines_can_be():
    for machine in LOCAL_MACHINES.values():
        for memory in (machine.memory, machine.gpu):
            assert memory is None or 0 < memory.effective <= memory.bandwidth
