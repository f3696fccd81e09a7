"""float8 values with one scale for each tile, and the transposes and products that come fused with the cast."""

from pallas_kernels.quantise.api import dequantise, quantise, quantise_both, quantise_transposed, swiglu_quantise

__all__ = ["dequantise", "quantise", "quantise_both", "quantise_transposed", "swiglu_quantise"]
