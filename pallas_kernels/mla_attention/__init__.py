"""Causal attention of whole sequences whose heads share the rotated part of their keys, and its gradient."""

from pallas_kernels.mla_attention.api import mla_attention

__all__ = ["mla_attention"]
