"""Peak rates of devices, by the name JAX gives them."""

from __future__ import annotations

# Dense bf16 FLOP/s of one JAX device. NVIDIA: datasheets without sparsity (H100/H800 SXM 989.4, H200 SXM 989.4, A100
# 312, B200 2250 TFLOP/s). TPU: Google Cloud's system pages (v4 275, v5e 197, v5p 459, v6e 918 TFLOP/s a chip; Ironwood
# 2307 a chip, two JAX devices each). Matched by prefix, longest first.
PEAK_BF16_FLOPS = {
    "NVIDIA H100": 989.4e12, "NVIDIA H800": 989.4e12, "NVIDIA H200": 989.4e12, "NVIDIA A100": 312e12,
    "NVIDIA B200": 2250e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12,
    "TPU v5": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 2307e12 / 2,
}


def peak_bf16_flops(device_kind: str) -> float | None:
    """FLOP/s of one device in bf16, or None for a device without a known peak, such as a CPU."""
    known = [name for name in PEAK_BF16_FLOPS if device_kind.startswith(name)]
    return PEAK_BF16_FLOPS[max(known, key=len)] if known else None
