"""Weight gradients of float8 tiles with float32 scales: 1x128 beside 1x128, along the tokens."""

from pallas_kernels.fp8_wgrad.api import fp8_wgrad

__all__ = ["fp8_wgrad"]
