"""Rows back to where they came from, and the sum of each one's copies: the way home of expert parallelism."""

from pallas_kernels.all_to_all_combine.api import all_to_all_combine, combine_start, combine_wait

__all__ = ["all_to_all_combine", "combine_start", "combine_wait"]
