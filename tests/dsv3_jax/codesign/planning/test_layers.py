"""Seconds of operations, exchanges and the optimizer, by hand."""

from __future__ import annotations

import pytest

from dsv3_jax.codesign.hardware import HARDWARE
from dsv3_jax.codesign.planning.layers import Machine, exchange, layer_time
from dsv3_jax.codesign.planning.operations import Operation, Work
from dsv3_jax.codesign.planning.rates import LATEST, PAPER, kernel_rates
from dsv3_jax.codesign.planning.update import update
from dsv3_jax.codesign.traffic import RowsAToken
from dsv3_jax.config import ConfigError
from dsv3_jax.expert_parallel.exchange import RowBytes
from dsv3_jax.presets import MODELS

H800 = Machine(HARDWARE["h800"], PAPER, 8)
V5P = Machine(HARDWARE["v5p"], PAPER, 512)
ROWS = RowsAToken(nodes=4, slow_copies=7, slow_rows=3.5, fast_rows=6.5)
WIRE = RowBytes(7392, 14336, 7392, 14336)
HBM = 3.0e12


def test_a_measured_shape_has_its_own_rate():
    rate = PAPER.product(HARDWARE["h800"], True, 2112, 7168, False)
    assert rate.value == 1058e12
    assert "that of" not in rate.source
    near = PAPER.product(HARDWARE["h800"], True, 2000, 7000, False)
    assert near.value == 1058e12
    assert "N, K = 2112, 7168" in near.source


def test_other_hardware_reaches_the_same_share():
    h800, b200 = HARDWARE["h800"], HARDWARE["b200"]
    ratio = b200.peak_flops["fp8"] / h800.peak_flops["fp8"]
    assert LATEST.product(b200, True, 4096, 7168, True).value == pytest.approx(1346e12 * ratio)
    assert LATEST.core(b200, False).flops == pytest.approx(579e12 * b200.peak_flops["bf16"] / 989.4e12, rel=1e-3)
    assert "b200" in LATEST.taken_over(b200)
    assert LATEST.taken_over(HARDWARE["h200"]) == ""


def test_refusals():
    with pytest.raises(ConfigError, match=r"precision \(fp8\).*v5p.*bf16"):
        PAPER.weight_gradient(HARDWARE["v5p"], True)
    with pytest.raises(ConfigError, match="kernels lattest is unknown; did you mean latest"):
        kernel_rates("lattest")


def test_operations_take_the_longer_of_flops_and_bytes():
    assert H800.time(Operation("pass", "forward", "memory", bytes=HBM)).seconds == pytest.approx(1)
    wide = H800.time(Operation("product", "forward", "product", 1058e12, 2112, 7168, 1.0, True))
    assert (wide.seconds, wide.resource) == (pytest.approx(1), "tensor cores")
    narrow = H800.time(Operation("product", "forward", "product", 1.0, 2112, 7168, HBM, True))
    assert (narrow.seconds, narrow.resource) == (pytest.approx(1), "HBM")


def test_padded_values_cost_attention_its_share():
    """Values of 128 as wide as keys of 192: 384 for 320."""
    core = Operation("core", "forward", "core", 579e12, 192, 128)
    assert H800.time(core).seconds == pytest.approx(384 / 320)
    assert Machine(HARDWARE["h800"], LATEST, 8).time(core).seconds == pytest.approx(1)


def test_exchange_waits_for_the_slower_network():
    work = Work(MODELS["deepseek_v3"], 4096, 4096, True, "paper", ROWS, fast_devices=8)
    told = exchange(work, H800, WIRE)
    assert told.forward == pytest.approx(4096 * 3.5 * 21728 / 40e9 + 2 * 3.7e-6)
    assert told.bytes_out == pytest.approx(2 * 4096 * 3.5 * 21728)
    assert "InfiniBand" in told.resource
    inside = exchange(Work(MODELS["deepseek_v3"], 4096, 4096, True, "experts", ROWS._replace(slow_rows=0),
                           fast_devices=8), H800, WIRE)
    assert inside.forward == pytest.approx(4096 * 6.5 * 21728 / 160e9 + 2 * 3.33e-6)
    assert inside.backward - inside.forward == pytest.approx(4096 * 6.5 * 7392 / 160e9)
    assert "NVLink" in inside.resource


def test_a_torus_is_crossed_by_hops():
    """64 devices, 4 to a side: a mean of one link along each."""
    assert V5P.hops(64) == pytest.approx(3)
    assert V5P.hops(1) == 1
    assert H800.hops(8) == 1


def test_layers_without_experts_exchange_nothing():
    work = Work(MODELS["deepseek_v3"], 4096, 4096, True, "paper", ROWS)
    assert layer_time(work, "dense", H800, WIRE).exchange is None
    assert layer_time(work, "experts", H800, None).exchange is None
    assert layer_time(work, "experts", H800, WIRE).exchange is not None


def test_update_by_hand():
    """64 experts' devices on 8 nodes, twice: an expert's copies on two nodes, all else on 16 nodes of 8."""
    told = update(H800, experts=1e9, others=1e9, copies=2, expert_parallel=64, moved=6)
    assert told.slow_bytes == pytest.approx(6 * (1e9 / 2 + 1e9 / 8 * 15 / 16))
    assert told.fast_bytes == pytest.approx(6 * 1e9 * 7 / 8)
    assert told.memory == pytest.approx(22 * (1e9 / 2 + 1e9 / 128) / HBM)
    assert told.seconds == pytest.approx(max(told.slow_bytes / 40e9, told.fast_bytes / 160e9) + told.memory)
    alone = update(H800, 1e9, 1e9, copies=1, expert_parallel=1, moved=6)
    assert alone.network == 0
    node = update(H800, 1e9, 0.0, copies=8, expert_parallel=1, moved=6)  # inside one node
    assert (node.slow_bytes, node.fast_bytes) == (0, pytest.approx(6e9 * 7 / 8))
