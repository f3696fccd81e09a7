"""The TPU backend: its kernels take groups, and the dense operations are those of one group."""

from pallas_kernels.fp8_matmul.tpu import grouped_product as product
from pallas_kernels.fp8_wgrad.tpu import grouped_gradient as gradient

__all__ = ["gradient", "product"]
