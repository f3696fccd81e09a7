"""Flows run to their end at max-min fair rates."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse

from dsv3_jax.codesign.checks import not_negative
from dsv3_jax.codesign.networks.max_min import limiting_links, max_min_rates


class Completion(NamedTuple):
    """How flows ended."""

    seconds_F: np.ndarray
    """float64 [F], from the common start."""
    bound: float
    """Seconds that the busiest link needs for its bytes: no sharing of links does better on these ways."""
    rounds: int
    """Times that rates were computed."""

    @property
    def seconds(self) -> float:
        """Of the last."""
        return float(self.seconds_F.max(initial=0.0))


def complete(matrix_LF: sparse.csc_matrix, capacity_L: np.ndarray, bytes_F: np.ndarray,
             resolution: float | None = 0.0) -> Completion:
    """Starts all flows at once.

    Args:
      matrix_LF: the part of each flow that each link carries.
      capacity_L: bytes/s.
      bytes_F: of each flow.
      resolution: rates are computed anew when a flow has ended: after each for 0; else flows that end within this part
        of `bound` after the next one end at their present rates first. None: never, so that what ended flows had stays
        unused.
    """
    bound = float(np.max(matrix_LF @ bytes_F / capacity_L, initial=0.0))
    seconds_F = np.zeros(len(bytes_F))
    limits_L = limiting_links(matrix_LF, capacity_L)
    matrix_LF, capacity_L = matrix_LF[limits_L], capacity_L[limits_L]
    if resolution is None:
        return Completion(bytes_F / max_min_rates(matrix_LF, capacity_L), bound, 1)
    not_negative(resolution=resolution)
    rest_F, active, now, rounds = bytes_F.astype(float), np.arange(len(bytes_F)), 0.0, 0
    while len(active):
        rate = max_min_rates(matrix_LF, capacity_L)
        lasts = rest_F[active] / rate
        step = min(lasts.min() + resolution * bound, lasts.max())
        ends = lasts <= step + 1e-9 * (now + step)  # with those that end together but for rounding
        seconds_F[active[ends]] = now + lasts[ends]
        rest_F[active] = np.maximum(rest_F[active] - rate * step, 0.0)
        now, rounds = now + step, rounds + 1
        active, matrix_LF = active[~ends], matrix_LF[:, ~ends]
    return Completion(seconds_F, bound, rounds)
