"""Float8 rows sorted by group, each group times its own matrix; and the gradient of those matrices."""

from pallas_kernels.grouped_fp8_matmul.api import grouped_fp8_matmul, grouped_fp8_wgrad

__all__ = ["grouped_fp8_matmul", "grouped_fp8_wgrad"]
