"""Networks and buses: what one device can send into each, one way. Bytes/s and seconds."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_jax.codesign.checks import not_negative, positive
from dsv3_jax.config import ConfigError, named


@dataclass(frozen=True)
class Link:
    """What one JAX device can send into one network."""

    bandwidth: float
    """Bytes/s in one direction, all links of the device together, nominal."""
    effective: float
    """Bytes/s reached in practice; the nominal figure where none is published."""
    latency: float | None
    """Seconds for a small message from end to end; on a torus between neighbours, so once for each hop."""
    name: str

    def __post_init__(self) -> None:
        positive(bandwidth=self.bandwidth, effective=self.effective)
        not_negative(latency=self.latency or 0.0)
        if self.effective > self.bandwidth:
            raise ConfigError(f"effective ({self.effective:g}) must not exceed the nominal bandwidth "
                              f"({self.bandwidth:g})")


LINKS: dict[str, Link] = {
    # One ConnectX-7 NIC of 400 Gbit/s a GPU: H800 in paper 1 section 4.1; DGX H100, H200 and B200 (eight a system) in
    # NVIDIA's DGX BasePOD reference architecture; DGX GB200 (four a tray of four GPUs) in its user guide. 40 GB/s
    # reached: paper 1 section 4.1, on H800; taken for the others, which have the same NIC. 3.7 us across leaves (2.8 us
    # on one leaf): paper 1 table 5.
    "ib_cx7": Link(50e9, 40e9, 3.7e-6, "InfiniBand CX7 400G"),
    # The storage network's NIC of the same rate (paper 1 section 5.1); 5.6 us across leaves, 3.6 us on one: table 5.
    # What all-to-alls reach on it: not published.
    "roce_400g": Link(50e9, 50e9, 5.6e-6, "RoCE 400G"),
    # H800: 400 GB/s both ways, about 160 of the 200 one way reached (paper 1 section 4.1); 3.33 us (table 5).
    "nvlink4_h800": Link(200e9, 160e9, 3.33e-6, "NVLink 4"),
    # H100, H200: 900 GB/s both ways, 18 links (datasheets); about 370 of the 450 one way reached by all-reduces on
    # eight H100 (jax-ml scaling book, part 12). Latency: none published, H800's, which has the same generation at fewer
    # bytes/s.
    "nvlink4": Link(450e9, 370e9, 3.33e-6, "NVLink 4"),
    # B200, GB200: 1.8 TB/s both ways, 18 links (datasheets; paper 1 section 2.3.2 has 900 GB/s one way for NVL72). What
    # is reached and the latency: not published.
    "nvlink5": Link(900e9, 900e9, None, "NVLink 5"),
    # 16 lanes of 32 GT/s with 128 bits of 130 for data (PCI Express base specification 5.0); so 160 lanes have the
    # 640 GB/s of paper 1 section 6.2, less the coding. Reached: 52.8 GB/s from an H100 to its host (NVIDIA/nvbandwidth,
    # issue 24). Latency: none published.
    "pcie5_x16": Link(16 * 32e9 * 128 / 130 / 8, 52.8e9, None, "PCIe 5.0 x16"),
    # 16 GT/s a lane. Reached: 25.1 GB/s from its host to an A100 (NVIDIA/nvbandwidth, issue 42).
    "pcie4_x16": Link(16 * 16e9 * 128 / 130 / 8, 25.1e9, None, "PCIe 4.0 x16"),
}


def link(name: str) -> Link:
    """The entry of that name.

    Raises:
        ConfigError: there is none.
    """
    return named(LINKS, name, "link")
