"""Attention of a few queries a row to a paged cache of latents, with the projections absorbed."""

from pallas_kernels.mla_decode.api import mla_decode
from pallas_kernels.mla_decode.reference import Attended, QuantizedPages, merge

__all__ = ["Attended", "QuantizedPages", "merge", "mla_decode"]
