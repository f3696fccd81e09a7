"""LogFMT-nBit: numbers on a ladder of equal steps in the logarithm, one ladder for each 128 numbers."""

from pallas_kernels.logfmt.api import decode, encode

__all__ = ["decode", "encode"]
