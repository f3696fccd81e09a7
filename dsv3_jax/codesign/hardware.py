"""The machines that plans, compilations and network models are made for, one JAX device at a time.

One's own come from a file (`hardware_file`), networks and buses by name are in `links`, PCs and servers that decode for
one person in `local_machines`.

Units: bytes, bytes/s, FLOP/s (integer operations/s for int8) and seconds. A rate of a link is one way. Datasheets
that print a chip, a node, both directions, Gbit/s or structured sparsity are converted where the number stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dsv3_jax.codesign.checks import at_least, positive
from dsv3_jax.codesign.links import LINKS, Link
from dsv3_jax.config import ConfigError, named

_GIB = 2 ** 30


@dataclass(frozen=True)
class Hardware:
    """One JAX device of a machine, and the two networks it sits on."""

    name: str
    """The key in `HARDWARE`, as given to `--pod`."""
    kind: Literal["gpu", "tpu"]
    device_kind: str
    """What `device.device_kind` begins with in JAX."""
    hbm_bytes: int
    """What a program can have. TPU: the limit the compiler keeps to; GPU: the total CUDA reports. Both are less than
    the chip carries, and a GPU process loses some hundred MiB more to its CUDA context."""
    hbm_bandwidth: float
    peak_flops: Mapping[str, float] = field(hash=False)
    """Dense peak by format: "bf16" always, "fp8" and "int8" where the chip multiplies them."""
    scale_up: Link
    scale_out: Link
    torus: int
    """Dimensions of the ICI torus; 0 where the fast network is switched."""
    devices_per_chip: int
    """JAX devices on a chip."""
    largest_scale_up: int
    """Most JAX devices one fast domain holds."""
    source: str
    compiles_as: str | None = None
    """The entry of `HARDWARE` whose compiler target serves a machine of one's own; None: the one of this name."""

    def __post_init__(self) -> None:
        positive(hbm_bytes=self.hbm_bytes, hbm_bandwidth=self.hbm_bandwidth,
                 **{f"peak_flops.{name}": peak for name, peak in self.peak_flops.items()})
        at_least(1, devices_per_chip=self.devices_per_chip, largest_scale_up=self.largest_scale_up)


# Hopper's tensor cores, SXM module, in H800, H100 and H200 alike: NVIDIA's H100 architecture white paper, without
# sparsity. H800's cuts are FP64 and NVLink (paper 1 section 4.1); its MFU is against 988 TFLOP/s (table 4, 432 at
# 43.73%).
_HOPPER_FLOPS = {"bf16": 989.4e12, "fp8": 1978.9e12, "int8": 1978.9e12}


def _ici(bandwidth: float, effective: float) -> Link:
    # About 1 us for each hop: jax-ml scaling book, part 2, question 5 (stated for v5e; none published for the others).
    return Link(bandwidth, effective, 1e-6, "ICI")


def _dcn(bandwidth: float) -> Link:
    # Host to host: a device's share of its host's NICs. What is reached and the latency: not published.
    return Link(bandwidth, bandwidth, None, "DCN")


_ALL = (
    Hardware(
        name="h800", kind="gpu", device_kind="NVIDIA H800",
        hbm_bytes=84_942_979_072,  # not published; H100's, which has the same 80 GB of HBM3
        hbm_bandwidth=3.35e12,  # likewise
        peak_flops=_HOPPER_FLOPS, scale_up=LINKS["nvlink4_h800"], scale_out=LINKS["ib_cx7"], torus=0,
        devices_per_chip=1, largest_scale_up=8,  # paper 1 section 4.1
        source="arXiv 2505.09343 section 4.1 and table 5; NVIDIA H100 datasheet and white paper for what H800 shares"),
    Hardware(
        name="h100", kind="gpu", device_kind="NVIDIA H100",
        hbm_bytes=84_942_979_072,  # OpenXLA target_config/specs/h100_sxm (81,559 MiB before the driver's part)
        hbm_bandwidth=3.35e12,  # datasheet, SXM
        peak_flops=_HOPPER_FLOPS, scale_up=LINKS["nvlink4"], scale_out=LINKS["ib_cx7"], torus=0, devices_per_chip=1,
        largest_scale_up=8,  # DGX and HGX H100
        source="NVIDIA H100 datasheet (SXM) and white paper; DGX BasePOD; OpenXLA GPU specs; scaling book part 12"),
    Hardware(
        name="h200", kind="gpu", device_kind="NVIDIA H200",
        # 139.80 GiB is the total in out-of-memory reports of PyTorch. Of the 141 GB of the datasheet nvidia-smi shows
        # 143,771 MiB. OpenXLA's h200 spec has 141 GiB, more than a process can have.
        hbm_bytes=int(139.80 * _GIB),
        hbm_bandwidth=4.8e12,  # datasheet, SXM
        peak_flops=_HOPPER_FLOPS, scale_up=LINKS["nvlink4"], scale_out=LINKS["ib_cx7"], torus=0, devices_per_chip=1,
        largest_scale_up=8,  # DGX and HGX H200
        source="NVIDIA H200 datasheet (SXM); DGX BasePOD; capacity as CUDA reports it"),
    Hardware(
        name="b200", kind="gpu", device_kind="NVIDIA B200",
        hbm_bytes=191_514_411_008,  # OpenXLA target_config/specs/b200; the datasheet says 180 GB
        hbm_bandwidth=8.0e12,  # DGX B200 datasheet: 64 TB/s for eight
        # HGX B200 datasheet at 1,000 W; its figures with sparsity, halved.
        peak_flops={"bf16": 2250e12, "fp8": 4500e12, "int8": 4500e12},
        scale_up=LINKS["nvlink5"], scale_out=LINKS["ib_cx7"], torus=0, devices_per_chip=1,
        largest_scale_up=8,  # DGX and HGX B200
        source="NVIDIA HGX B200 and DGX B200 datasheets; DGX BasePOD; OpenXLA GPU specs"),
    Hardware(
        name="gb200", kind="gpu", device_kind="NVIDIA GB200",
        hbm_bytes=197_897_748_480,  # OpenXLA target_config/specs/gb200; the datasheet says 186 GB
        hbm_bandwidth=8.0e12,  # datasheet: 576 TB/s for 72
        # Datasheet: 360, 720 and 720 P(FL)OP/s with sparsity for 72; halved.
        peak_flops={"bf16": 2500e12, "fp8": 5000e12, "int8": 5000e12},
        scale_up=LINKS["nvlink5"], scale_out=LINKS["ib_cx7"], torus=0, devices_per_chip=1,
        largest_scale_up=72,  # one rack
        source="NVIDIA GB200 NVL72 datasheet; DGX GB200 user guide; OpenXLA GPU specs"),
    # TPU: Google Cloud's system page of each. hbm_bytes is the "available HBM" of libtpu's out-of-memory error when
    # compiling for the chip (November 2026). ICI is printed both ways for a chip, so halved; `effective` is the
    # scaling book's rate of a link (part 2) times the links: 45 GB/s for v5e, 90 for v5p and v6e.
    Hardware(
        name="v5e", kind="tpu", device_kind="TPU v5 lite",
        hbm_bytes=int(15.75 * _GIB),  # of 16
        hbm_bandwidth=819e9,  # another edition of the page says 800 GiB/s
        # No rate for fp8 is published.
        peak_flops={"bf16": 197e12, "int8": 393e12},
        scale_up=_ici(400e9 / 2, 4 * 45e9),
        scale_out=_dcn(2 * 100e9 / 8 / 8),  # two NICs of 100 Gbit/s for a host of eight chips
        torus=2, devices_per_chip=1, largest_scale_up=256,
        source="Google Cloud, TPU v5e system architecture; libtpu; scaling book part 2"),
    Hardware(
        name="v5p", kind="tpu", device_kind="TPU v5",
        hbm_bytes=int(95.73 * _GIB),  # the page says 95
        hbm_bandwidth=2765e9,
        # The page prints bf16's rate for fp8 too, JAX's own table has none: fp8 brings no speed here. int8: JAX's
        # table and scaling book part 2; the page has none.
        peak_flops={"bf16": 459e12, "int8": 918e12},
        scale_up=_ici(1200e9 / 2, 6 * 90e9),
        scale_out=_dcn(50e9 / 8),  # 50 Gbit/s a chip
        torus=3, devices_per_chip=1,
        largest_scale_up=8960,  # the pod; the largest job is 16x16x24 = 6,144
        source="Google Cloud, TPU v5p system architecture; libtpu; scaling book part 2"),
    Hardware(
        name="v6e", kind="tpu", device_kind="TPU v6 lite",
        hbm_bytes=int(31.24 * _GIB),  # of 32
        hbm_bandwidth=1638e9,
        # fp8: the TPU7x page's column for v6e, and JAX's table; the rate of bf16.
        peak_flops={"bf16": 918e12, "fp8": 918e12, "int8": 1836e12},
        scale_up=_ici(800e9 / 2, 4 * 90e9),
        scale_out=_dcn(100e9 / 8),  # 100 Gbit/s a chip
        torus=2, devices_per_chip=1, largest_scale_up=256,
        source="Google Cloud, TPU v6e and TPU7x system architecture; libtpu; scaling book part 2"),
    # A chip is two JAX devices, so every rate of the page is halved again. The two share the chip's six ICI links and
    # a faster one of their own, which is not counted.
    Hardware(
        name="tpu7x", kind="tpu", device_kind="TPU7x",
        hbm_bytes=int(94.74 * _GIB),  # of 192 a chip
        hbm_bandwidth=7380e9 / 2,
        # No rate for int8 is published.
        peak_flops={"bf16": 2307e12 / 2, "fp8": 4614e12 / 2},
        scale_up=_ici(1200e9 / 2 / 2, 1200e9 / 2 / 2),  # what is reached: not published
        scale_out=_dcn(100e9 / 8 / 2),  # 100 Gbit/s a chip
        torus=3, devices_per_chip=2, largest_scale_up=2 * 9216,
        source="Google Cloud, TPU7x (Ironwood) system architecture; libtpu"),
)

HARDWARE: dict[str, Hardware] = {entry.name: entry for entry in _ALL}

# bf16 peaks of devices that have no entry, or an entry for another module or by another name. A100 and H100 NVL and
# PCIe: NVIDIA datasheets without sparsity (H800 PCIe and H200 NVL by their likeness); TPU v4: Google Cloud's page.
# JAX takes "TPU v5e" and "TPU v6e" for the same chips as the names above.
_OTHER_BF16_FLOPS = {
    "NVIDIA A100": 312e12, "NVIDIA H100 PCIe": 756.5e12, "NVIDIA H800 PCIe": 756.5e12, "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H200 NVL": 835.5e12, "TPU v4": 275e12, "TPU v5e": HARDWARE["v5e"].peak_flops["bf16"],
    "TPU v6e": HARDWARE["v6e"].peak_flops["bf16"],
}


def hardware(name: str) -> Hardware:
    """The entry of that name.

    Raises:
        ConfigError: there is none.
    """
    return named(HARDWARE, name, "hardware")


def peak_bf16_flops(device_kind: str) -> float | None:
    """FLOP/s of one device in bf16, or None for a device without a known peak, such as a CPU. The longest name that
    `device_kind` begins with decides."""
    peaks = {entry.device_kind: entry.peak_flops["bf16"] for entry in HARDWARE.values()} | _OTHER_BF16_FLOPS
    known = [name for name in peaks if device_kind.startswith(name)]
    return peaks[max(known, key=len)] if known else None


def all_to_all_hops(shape: tuple[int, ...]) -> float:
    """Mean number of ICI links a byte of an all-to-all crosses on a torus of `shape` with every dimension wrapped.

    Every device sends equally to all, itself included, by a shortest path; so the mean is the sum over dimensions of
    a ring's mean distance: n/4 for even n, (n*n - 1)/(4n) for odd.

    Raises:
        ConfigError: a size is less than 1.
    """
    if any(n < 1 for n in shape):
        raise ConfigError(f"torus {'x'.join(map(str, shape))} must have sizes of at least 1")
    return sum((n * n - n % 2) / (4 * n) for n in shape)
