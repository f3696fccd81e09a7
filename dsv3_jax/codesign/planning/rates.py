"""Speeds that kernels reach, as others measured and published them: all that predictions are calibrated on.

Nothing of the papers' own training or serving times is in here, so those can be predicted. Every number is of a kernel
alone on a quiet device. Two sets: what was public about when the papers were written, and the best published since.
For other hardware than it was measured on, a kernel is taken to reach the same share of the peak.

Units: FLOP/s and bytes/s of one device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_jax.codesign.hardware import HARDWARE, Hardware
from dsv3_jax.config import ConfigError, named

_T = 1e12


class Rate(NamedTuple):
    """A speed, and where it is from."""

    value: float
    source: str


class Attention(NamedTuple):
    """A kernel for attention's core."""

    flops: float
    """FLOP/s, counting what it computes: causal halves, padding included."""
    one_width: bool
    """Values are padded to the width of keys."""
    source: str

    def computed(self, key_width: int, value_width: int) -> float:
        """What it computes over what the model asks for."""
        return 2 * max(key_width, value_width) / (key_width + value_width) if self.one_width else 1.0


@dataclass(frozen=True, eq=False)
class KernelRates:
    """Of one time, on one Hopper."""

    name: str
    measured_on: str
    """An entry of `HARDWARE`."""
    fp8: dict[tuple[int, int], float]
    """By (N, K), at 4096 rows: activations in 1x128 tiles, weights in 128x128 blocks."""
    fp8_grouped: dict[tuple[int, int], float]
    """By (N, K), groups of thousands of rows."""
    fp8_weight: float
    """Weight gradients: both in 1x128 tiles, added in float32."""
    fp8_source: str
    bf16: Rate
    attention: Attention
    attention_backward: Attention
    memory: Rate
    """Share of the nominal bandwidth of HBM that a kernel reaches which does little else than read and write."""

    def product(self, hardware: Hardware, fp8: bool, n: int, k: int, grouped: bool) -> Rate:
        """Of rows [*, k] by weights [k, n]: of the measured shape that is nearest in ratio of both sizes."""
        if not fp8:
            return Rate(self.bf16.value * self._peak_ratio(hardware, "bf16"), self.bf16.source)
        table = self.fp8_grouped if grouped else self.fp8
        nearest = min(table, key=lambda shape: math.hypot(math.log(shape[0] / n), math.log(shape[1] / k)))
        alike = "" if nearest == (n, k) else f"; that of N, K = {nearest[0]}, {nearest[1]}"
        return Rate(table[nearest] * self._peak_ratio(hardware, "fp8"), self.fp8_source + alike)

    def weight_gradient(self, hardware: Hardware, fp8: bool) -> Rate:
        """Of a product over rows."""
        if not fp8:
            return Rate(self.bf16.value * self._peak_ratio(hardware, "bf16"), self.bf16.source)
        return Rate(self.fp8_weight * self._peak_ratio(hardware, "fp8"), self.fp8_source)

    def core(self, hardware: Hardware, backward: bool) -> Attention:
        """Attention's core on that hardware."""
        kernel = self.attention_backward if backward else self.attention
        return kernel._replace(flops=kernel.flops * self._peak_ratio(hardware, "bf16"))

    def bytes_per_second(self, hardware: Hardware) -> Rate:
        """Of HBM."""
        return Rate(self.memory.value * hardware.hbm_bandwidth, self.memory.source)

    def _peak_ratio(self, hardware: Hardware, kind: str) -> float:
        if kind not in hardware.peak_flops:
            raise ConfigError(f"precision (fp8) needs float8 products, which {hardware.name} has not: take bf16")
        return hardware.peak_flops[kind] / HARDWARE[self.measured_on].peak_flops[kind]

    def taken_over(self, hardware: Hardware) -> str:
        """A remark for hardware that nothing was measured on; else none."""
        same = hardware.peak_flops == HARDWARE[self.measured_on].peak_flops
        return "" if same else (f"kernels are taken to reach the share of {hardware.name}'s peaks that they reach of "
                                f"{self.measured_on}'s")


_CUBLAS = Rate(716 * _T, "cuBLAS, bf16, 8192 cubed, H100 SXM: P. Shankhdhar, Outperforming cuBLAS on H100 (2024)")
_HBM = Rate(3.0 / 3.35, "FlashMLA's README: 3000 GB/s on H800")
_FA3 = "FlashAttention-3 (arXiv 2407.08608), causal, width 128, 4k tokens, H100"
_FA2 = "FlashAttention-2 on H100, width 128, 4k tokens, as arXiv 2407.08608 measures it"

# When DeepSeek-V3 was trained no public kernel for Hopper took values of another width than keys: flash-attention
# issue 1487 has the forward appear in February 2025 and no backward; FlashAttention-3's backward ended at width 128.
PAPER = KernelRates(
    "paper", "h800",
    fp8={(2112, 7168): 1058 * _T, (24576, 1536): 990 * _T, (32768, 512): 590 * _T, (7168, 16384): 1358 * _T,
         (4096, 7168): 1304 * _T, (7168, 2048): 1025 * _T},
    fp8_grouped={(4096, 7168): 1297 * _T, (7168, 2048): 1099 * _T},
    fp8_weight=950 * _T,  # 900 to 1044, weight gradients of the later release: the first had none
    fp8_source="DeepGEMM's README of February 2025, H800 (weight gradients: of May 2025)",
    bf16=_CUBLAS, attention=Attention(579 * _T, True, _FA3 + ", values padded to keys"),
    attention_backward=Attention(310 * _T, True, _FA2 + ", values padded to keys"), memory=_HBM)

LATEST = KernelRates(
    "latest", "h800",
    fp8={(2112, 7168): 1127 * _T, (24576, 1536): 1212 * _T, (32768, 512): 775 * _T, (7168, 16384): 1520 * _T,
         (4096, 7168): 1410 * _T, (7168, 2048): 1168 * _T},
    fp8_grouped={(4096, 7168): 1346 * _T, (7168, 2048): 1214 * _T},
    fp8_weight=950 * _T, fp8_source="DeepGEMM's README since May 2025, H800",
    bf16=_CUBLAS, attention=Attention(579 * _T, False, _FA3),
    attention_backward=Attention(542 * _T, True, "FlashAttention-3 (arXiv 2407.08608), width 128, 4k tokens, H100; "
                                 "values padded to keys"), memory=_HBM)

RATES: dict[str, KernelRates] = {"paper": PAPER, "latest": LATEST}


def kernel_rates(name: str) -> KernelRates:
    """The set of that name.

    Raises:
      ConfigError: there is none.
    """
    return named(RATES, name, "kernels")
