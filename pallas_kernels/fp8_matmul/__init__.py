"""Products of float8 tiles with float32 scales: 1x128 beside 128x128."""

from pallas_kernels.fp8_matmul.api import fp8_matmul

__all__ = ["fp8_matmul"]
