"""Hardware of one's own: what a file means, and what is refused."""

from __future__ import annotations

import re

import pytest

from dsv3_jax.codesign import hardware_file
from dsv3_jax.codesign.hardware import hardware
from dsv3_jax.codesign.hardware_file import load_hardware
from dsv3_jax.codesign.links import LINKS
from dsv3_jax.codesign.pods import parse_pod, pod_devices
from dsv3_jax.config import ConfigError

WHOLE = """
name = "mine"
kind = "gpu"
hbm_bytes = 141e9
hbm_bandwidth = 4.8e12
largest_scale_up = 64
source = "what if"
[peak_flops]
bf16 = 1e15
[scale_up]
bandwidth = 400e9
effective = 300e9
[scale_out]
like = "roce_400g"
"""
BASED = 'name = "mine"\nbased_on = "h800"\n'


@pytest.fixture
def write(tmp_path):
    def one(text: str):
        (tmp_path / "mine.toml").write_text(text)
        return tmp_path / "mine.toml"
    return one


def test_all_of_it(write):
    mine = load_hardware(write(WHOLE))
    assert (mine.name, mine.kind, mine.torus, mine.devices_per_chip, mine.largest_scale_up) == ("mine", "gpu", 0, 1, 64)
    assert (mine.hbm_bytes, mine.hbm_bandwidth, mine.peak_flops) == (141_000_000_000, 4.8e12, {"bf16": 1e15})
    assert (mine.scale_up.bandwidth, mine.scale_up.effective, mine.scale_up.latency) == (400e9, 300e9, None)
    assert mine.scale_out == LINKS["roce_400g"]


def test_the_example_of_the_module_can_be_read(write):
    """Indented by four, between the first and the last paragraph."""
    lines = hardware_file.__doc__.splitlines()
    mine = load_hardware(write("\n".join(line[4:] for line in lines if line.startswith("    "))))
    assert mine.scale_out.bandwidth == mine.scale_out.effective == 100e9
    assert mine.scale_out.name == "RoCE 400G"
    assert mine.largest_scale_up == hardware("h100").largest_scale_up


def test_what_a_file_does_not_give_is_as_of_its_base(write):
    h800 = hardware("h800")
    assert load_hardware(write(BASED)).scale_up == h800.scale_up
    faster = load_hardware(write(BASED + "[scale_out]\nbandwidth = 100e9\n"))
    # What H800 reaches of 50 GB/s says nothing of 100.
    assert (faster.scale_out.bandwidth, faster.scale_out.effective) == (100e9, 100e9)
    assert faster.scale_out.latency == h800.scale_out.latency
    assert load_hardware(write(BASED + "[scale_out]\neffective = 45e9\n")).scale_out.effective == 45e9
    assert load_hardware(write(BASED + "[peak_flops]\nbf16 = 1e15\n")).peak_flops == {"bf16": 1e15}


@pytest.mark.parametrize(("text", "message"), [
    ("name = ", r"is not TOML: "),
    (WHOLE.replace("4.8e12", "-1"), r"hbm_bandwidth (-1) must be positive, in bytes/s"),
    (WHOLE.replace("4.8e12", "4800"), r"hbm_bandwidth (4800) is too little to be in bytes/s: write at least 1e+06"),
    (WHOLE.replace("4.8e12", "inf"), r"hbm_bandwidth (inf) must be a number of bytes/s"),
    (WHOLE.replace("4.8e12", "true"), r"hbm_bandwidth (True) must be a number of bytes/s"),
    (WHOLE.replace("141e9", "0"), r"hbm_bytes (0) must be positive, in bytes"),
    (WHOLE.replace("1e15", "989"), r"peak_flops.bf16 (989) is too little to be in FLOP/s"),
    (WHOLE.replace("bf16", "fp8"), r"peak_flops.bf16 is missing: give a number of FLOP/s"),
    (WHOLE.replace("bf16", "fp16"), r"peak_flops.fp16 (1000000000000000.0) is no field; did you mean bf16?"),
    (WHOLE.replace("300e9", "500e9"), r"scale_up.effective (500000000000.0) must not exceed the nominal bandwidth"),
    (WHOLE.replace("effective", "efective"), r"scale_up.efective (300000000000.0) is no field; did you mean eff"),
    (WHOLE.replace("effective = 300e9", "latency = 3"), r"scale_up.latency (3) is too much to be in seconds"),
    (WHOLE.replace("effective = 300e9", "latency = -1"), r"scale_up.latency (-1) must be positive, in seconds"),
    (WHOLE.replace("largest_scale_up = 64", "largest_scale_up = 0"), r"largest_scale_up (0) must be a whole number of"),
    (WHOLE.replace("largest_scale_up = 64", "largest_scale_up = 3\ndevices_per_chip = 2"),
     r"largest_scale_up (3) must be a multiple of devices_per_chip (2)"),
    (WHOLE.replace("kind", "knd"), r"knd ('gpu') is no field; did you mean kind?"),
    (WHOLE.replace('"gpu"', '"tpu"'), r"torus (0) must be 0 for a gpu"),
    (WHOLE.replace("roce_400g", "roce"), r"scale_out.like roce is unknown; did you mean roce_400g?"),
    (WHOLE.replace('"mine"', '"my gpu"'), r"name ('my gpu') must be of letters, digits and _"),
    (WHOLE.replace('"mine"', '"h800"'), r"name ('h800') is taken: call yours differently, such as h800_mine"),
    (WHOLE.replace('name = "mine"', ""), r"name is missing: give a text"),
    (BASED.replace("h800", "h900"), r"based_on h900 is unknown; did you mean h"),
    (BASED + 'kind = "tpu"', r"kind ('tpu') must be that of based_on (h800), gpu: leave it out"),
    (BASED + "scale_up = 3", r"scale_up (3) must be a table: write [scale_up]")])
def test_nonsense_is_refused(write, text, message):
    path = write(text)
    with pytest.raises(ConfigError, match="^" + re.escape(f"{path}: ") + ".*" + re.escape(message)):
        load_hardware(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"mine.toml: cannot be read \(No such file or directory\): name a TOML file"):
        load_hardware(tmp_path / "mine.toml")


def test_pods_of_it(write):
    mine = load_hardware(write(WHOLE))
    assert parse_pod("mine:4x64", mine).devices == 256
    assert parse_pod("h800:4x8", mine).hardware.name == "h800"
    with pytest.raises(ConfigError, match="hardware mine is unknown"):
        parse_pod("mine:4x64")
    with pytest.raises(ConfigError, match="no compiler knows mine; write based_on = the nearest of h800, "):
        pod_devices(parse_pod("mine:4x8", mine))


def test_what_is_based_on_a_chip_compiles_as_that(write):
    mine = load_hardware(write(BASED + "hbm_bytes = 50e9\n"))
    assert len(pod_devices(parse_pod("mine:2x8", mine))) == 16


def test_links_of_paper_1():
    """160 lanes of PCIe 5.0 carry 640 GB/s, coding included (section 6.2); latencies of table 5."""
    assert 10 * LINKS["pcie5_x16"].bandwidth * 130 / 128 == pytest.approx(640e9)
    assert LINKS["pcie5_x16"].bandwidth == 2 * LINKS["pcie4_x16"].bandwidth
    assert (LINKS["roce_400g"].latency, LINKS["ib_cx7"].latency) == (5.6e-6, 3.7e-6)
    assert all(0 < link.effective <= link.bandwidth for link in LINKS.values())
