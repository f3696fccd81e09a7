"""The table against the papers and against itself."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import pytest

from dsv3_jax.codesign.hardware import HARDWARE, all_to_all_hops, hardware, peak_bf16_flops
from dsv3_jax.codesign.links import Link
from dsv3_jax.config import ConfigError

ENTRIES = pytest.mark.parametrize("entry", HARDWARE.values(), ids=HARDWARE)
NAMES = "h800 h100 h200 b200 gb200 v5e v5p v6e tpu7x"


def test_names():
    assert " ".join(HARDWARE) == NAMES
    assert all(hardware(name) is entry and entry.name == name for name, entry in HARDWARE.items())


def test_h800_of_paper_1_section_4_1():
    h800 = hardware("h800")
    assert (h800.scale_up.bandwidth, h800.scale_out.bandwidth) == (200e9, 50e9)
    assert (h800.scale_up.effective, h800.scale_out.effective) == (160e9, 40e9)
    assert h800.scale_up.bandwidth / h800.scale_out.bandwidth == 4
    assert h800.scale_up.effective / h800.scale_out.effective == 4
    assert (h800.scale_up.latency, h800.scale_out.latency) == (3.33e-6, 3.7e-6)
    assert h800.largest_scale_up == 8


def test_speed_limits_of_paper_1_section_2_3_2():
    """Section 2.3.2's time to send a layer's dispatch and combine, from the nominal rates; "7K" is 7,000."""
    message_bytes = (1 + 2) * 32 * 9 * 7000
    assert message_bytes / hardware("h800").scale_out.bandwidth == pytest.approx(120.96e-6)
    assert message_bytes / hardware("gb200").scale_up.bandwidth == pytest.approx(6.72e-6)
    assert hardware("gb200").largest_scale_up == 72


def test_mfu_of_paper_1_table_4():
    """432 TFLOP/s are 43.73% and 385 are 38.94% of the peak, which the printed digits put at 987.9 and 988.7."""
    peak = hardware("h800").peak_flops["bf16"]
    assert 432e12 / peak == pytest.approx(0.4373, abs=0.001)
    assert 385e12 / peak == pytest.approx(0.3894, abs=0.001)


@ENTRIES
def test_entry_is_consistent(entry):
    bf16 = entry.peak_flops["bf16"]
    assert set(entry.peak_flops) <= {"bf16", "fp8", "int8"}
    assert all(peak >= bf16 for peak in entry.peak_flops.values())
    for link in (entry.scale_up, entry.scale_out):
        assert 0 < link.effective <= link.bandwidth
        assert link.latency is None or link.latency > 0
    # Each level is faster than the next one out, and ridge points of all these chips lie in the hundreds.
    assert entry.hbm_bandwidth > entry.scale_up.bandwidth > entry.scale_out.bandwidth
    assert 100 < bf16 / entry.hbm_bandwidth < 1000
    assert (entry.torus > 0) == (entry.kind == "tpu")
    assert entry.largest_scale_up % entry.devices_per_chip == 0
    assert isinstance(entry.hbm_bytes, int)
    assert entry.source
    assert entry in {entry}  # may be the key of a cache
    assert peak_bf16_flops(entry.device_kind) == bf16


@pytest.mark.parametrize(("name", "gigabytes"), [
    ("h800", 80), ("h100", 80), ("h200", 141), ("b200", 180), ("gb200", 186), ("v5e", 16 * 1.0737),
    ("v5p", 95 * 1.0737), ("v6e", 32 * 1.0737), ("tpu7x", 96 * 1.0737)])
def test_usable_memory_is_near_the_datasheet(name, gigabytes):
    """Datasheets round, some down; a chip taken for a device, or a neighbour's figure, is further off than 8%."""
    assert hardware(name).hbm_bytes / 1e9 == pytest.approx(gigabytes, rel=0.08)


@pytest.mark.parametrize(("name", "links", "gigabits"), [("v5e", 4, 25), ("v5p", 6, 50), ("v6e", 4, 100),
                                                         ("tpu7x", 6, 100)])
def test_tpu_networks_of_a_chip(name, links, gigabits):
    """A link is 50 GB/s one way on v5e and 100 later; the data centre network is printed in Gbit/s a chip."""
    entry = hardware(name)
    assert entry.scale_up.bandwidth * entry.devices_per_chip / links == (50e9 if name == "v5e" else 100e9)
    assert entry.scale_out.bandwidth * entry.devices_per_chip * 8 == gigabits * 1e9
    assert links == 2 * entry.torus


def test_tpu7x_device_is_half_a_chip():
    entry = hardware("tpu7x")
    assert entry.devices_per_chip == 2
    assert entry.largest_scale_up == 18432
    assert entry.peak_flops == {"bf16": 1153.5e12, "fp8": 2307e12}
    assert entry.hbm_bandwidth == 3690e9


@pytest.mark.parametrize(("name", "hint"), [
    ("h900", "; did you mean h800?"), ("H100", "; did you mean h100?"), ("tpu7", "; did you mean tpu7x?"),
    ("laptop", "?")])
def test_unknown_name(name, hint):
    with pytest.raises(ConfigError, match=re.escape(
            f"hardware {name} is unknown{hint} Choose from {', '.join(NAMES.split())}")):
        hardware(name)


@pytest.mark.parametrize(("device_kind", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H800", 989.4e12), ("NVIDIA H200", 989.4e12),
    ("NVIDIA H100 PCIe", 756.5e12), ("NVIDIA H200 NVL", 835.5e12), ("NVIDIA B200", 2250e12), ("NVIDIA GB200", 2500e12),
    ("NVIDIA A100-SXM4-80GB", 312e12), ("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12),
    ("TPU v5", 459e12), ("TPU v5p", 459e12), ("TPU v6 lite", 918e12), ("TPU v6e", 918e12), ("TPU7x", 1153.5e12),
    ("cpu", None), ("NVIDIA L4", None), ("TPU v3", None)])
def test_peak_of_a_device_jax_names(device_kind, peak):
    assert peak_bf16_flops(device_kind) == peak


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Link(-50e9, 40e9, None, "x"), r"bandwidth \(-50000000000.0\) must be a finite number above 0"),
    (lambda: Link(50e9, 0, None, "x"), r"effective \(0\)"), (lambda: Link(50e9, 40e9, -1e-6, "x"), r"latency"),
    (lambda: Link(50e9, 60e9, None, "x"), r"effective \(6e\+10\) must not exceed the nominal bandwidth \(5e\+10\)"),
    *((lambda change=change: dataclasses.replace(hardware("h800"), **change), message) for change, message in (
        ({"hbm_bytes": 0}, r"hbm_bytes \(0\)"), ({"hbm_bandwidth": float("inf")}, r"hbm_bandwidth \(inf\)"),
        ({"peak_flops": {"bf16": -1.0}}, r"peak_flops.bf16 \(-1.0\)"),
        ({"largest_scale_up": 0}, r"largest_scale_up \(0\)"), ({"devices_per_chip": 0}, r"devices_per_chip \(0\)")))])
def test_nonsense_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (5,), (16,), (2, 2), (4, 1), (3, 4), (16, 16), (4, 4, 8),
                                   (2, 3, 5)])
def test_all_to_all_hops_by_counting(shape):
    """From one device to all by the shorter way round each ring; all devices are alike."""
    cells = list(itertools.product(*map(range, shape)))
    hops = sum(min(at, n - at) for cell in cells for at, n in zip(cell, shape, strict=True))
    assert all_to_all_hops(shape) == pytest.approx(hops / math.prod(shape), rel=1e-12)


def test_all_to_all_hops_of_no_torus():
    with pytest.raises(ConfigError, match="torus 4x0 must have sizes of at least 1"):
        all_to_all_hops((4, 0))
