"""Machines that decode for one person: PCs with an AI system on chip, and a server with a consumer GPU (paper 1,
section 2.2.2). Bytes and bytes/s. One's own come from a TOML file:

    name = "workstation"
    source = "12 channels of DDR5-6400, one RTX 5090"

    [memory]                  # what holds all weights that the GPU has no room for
    bytes = 768e9
    bandwidth = 614.4e9
    effective = 500e9         # reached in practice; nominal if not given

    [gpu]                     # may be left out
    bytes = 34.3e9
    bandwidth = 1792e9
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsv3_jax.codesign.checks import positive
from dsv3_jax.codesign.hardware_file import LEAST_BANDWIDTH, LEAST_BYTES
from dsv3_jax.codesign.toml_fields import Fields
from dsv3_jax.config import ConfigError, named

_GIB = 2 ** 30


@dataclass(frozen=True)
class Memory:
    """Memory and how fast its processor reads it."""

    bytes: float
    bandwidth: float
    """Nominal."""
    effective: float
    """Reached in practice; the nominal figure where none is published."""

    def __post_init__(self) -> None:
        positive(bytes=self.bytes, bandwidth=self.bandwidth, effective=self.effective)
        if self.effective > self.bandwidth:
            raise ConfigError(f"effective ({self.effective:g}) must not exceed the nominal bandwidth "
                              f"({self.bandwidth:g})")


class LocalMachine(NamedTuple):
    """A machine without a network."""

    name: str
    memory: Memory
    """Of the system on chip, or of the processors."""
    gpu: Memory | None
    """A card's own."""
    source: str


LOCAL_MACHINES: dict[str, LocalMachine] = {
    # 256 bits of LPDDR5X-8000; 212 GB/s of the 256 reached by rocm_bandwidth_test (llm-tracker.info, Strix Halo).
    "ryzen_ai_max": LocalMachine("AMD Ryzen AI Max+ 395", Memory(128 * _GIB, 32 * 8000e6, 212e9), None,
                                 "AMD product page; llm-tracker.info"),
    # What is reached is not published for the next two.
    "dgx_spark": LocalMachine("NVIDIA DGX Spark", Memory(128 * _GIB, 273e9, 273e9), None, "NVIDIA product page"),
    "m4_max": LocalMachine("Apple M4 Max", Memory(128 * _GIB, 546e9, 546e9), None, "Apple technical specifications"),
    # KTransformers' own machine, of about 10,000 dollars in paper 1: two Xeon Gold 6454S with eight channels of
    # DDR5-4800 each, 1 TB, and an RTX 4090 of 384 bits of GDDR6X at 21 Gbit/s. What they reach is not published.
    "ktransformers_server": LocalMachine(
        "2x 8 channels DDR5-4800 + RTX 4090", Memory(1024 * _GIB, 2 * 8 * 8 * 4800e6, 2 * 8 * 8 * 4800e6),
        Memory(24 * _GIB, 384 / 8 * 21e9, 384 / 8 * 21e9),
        "kvcache-ai/ktransformers, doc/en/DeepseekR1_V3_tutorial.md; NVIDIA RTX 4090 specifications"),
    "ktransformers_one_socket": LocalMachine(
        "8 channels DDR5-4800 + RTX 4090", Memory(512 * _GIB, 8 * 8 * 4800e6, 8 * 8 * 4800e6),
        Memory(24 * _GIB, 384 / 8 * 21e9, 384 / 8 * 21e9), "the same with one socket"),
}


def find_machine(name: str) -> LocalMachine:
    """The entry of that name, or of the file of that name if it ends in .toml: what a script's --machine takes."""
    return load_machine(name) if name.endswith(".toml") else named(LOCAL_MACHINES, name, "machine")


def load_machine(path: Path | str) -> LocalMachine:
    """The machine in a file, see above.

    Raises:
      ConfigError: names the file, the field, its value and the remedy.
    """
    fields = Fields.of_file(Path(path), ("name", "source", "memory", "gpu"))
    return LocalMachine(fields.text("name"), _memory(fields, "memory"),
                        _memory(fields, "gpu") if "gpu" in fields.values else None, fields.text("source", str(path)))


def _memory(fields: Fields, table: str) -> Memory:
    inner = fields.within(table, ("bytes", "bandwidth", "effective"))
    bandwidth = inner.quantity("bandwidth", "bytes/s", LEAST_BANDWIDTH)
    effective = inner.quantity("effective", "bytes/s", LEAST_BANDWIDTH, bandwidth)
    if effective > bandwidth:
        raise inner.wrong("effective", effective, f"must not exceed the nominal bandwidth ({bandwidth:g})")
    return Memory(inner.quantity("bytes", "bytes", LEAST_BYTES), bandwidth, effective)
