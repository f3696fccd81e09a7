"""Max-min fair rates: no flow can have more without taking from one that has no more than it.

Progressive filling raises all rates together and stops those on a link when it is full. Here every link that is full
before any other link of its flows is closed in the same round, wherever it is: the least share of a link's rest that
an unstopped flow can expect only grows while others stop, so such a link's flows end at its present share whatever
happens elsewhere. Rounds are then as many as bottlenecks depend on each other in a row, not as many as there are.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from dsv3_jax.config import ConfigError

_SAME = 1e-9
"""Relative difference of two shares that are one but for rounding."""


def max_min_rates(matrix_LF: sparse.csc_matrix, capacity_L: np.ndarray) -> np.ndarray:
    """float64 [F], bytes/s.

    Args:
      matrix_LF: the part of each flow that each link carries; every flow has at least one link.
      capacity_L: bytes/s of each link.

    Raises:
      ConfigError: a capacity that is not positive, or a flow without a link.
    """
    if not np.all(capacity_L > 0):
        raise ConfigError(f"capacity_L must be positive; link {np.argmin(capacity_L)} has {capacity_L.min()}")
    matrix_LF = sparse.csc_matrix(matrix_LF)
    if np.any(np.diff(matrix_LF.indptr) == 0):
        raise ConfigError(f"matrix_LF: flow {np.argmin(np.diff(matrix_LF.indptr))} is on no link")
    rate_F, rest_L = np.zeros(matrix_LF.shape[1]), capacity_L.astype(float)
    active = np.arange(matrix_LF.shape[1])
    while len(active):
        weight_L = matrix_LF @ np.ones(len(active))
        share_L = np.divide(np.maximum(rest_L, 0), weight_L, out=np.full(len(rest_L), np.inf), where=weight_L > 0)
        share_N = share_L[matrix_LF.indices]
        least_F = np.minimum.reduceat(share_N, matrix_LF.indptr[:-1])
        least_N = np.repeat(least_F, np.diff(matrix_LF.indptr))
        tight_N = share_N <= least_N * (1 + _SAME)
        bottleneck_L = np.ones(len(rest_L), bool)
        bottleneck_L[matrix_LF.indices[~tight_N]] = False
        stops_F = np.logical_or.reduceat(bottleneck_L[matrix_LF.indices], matrix_LF.indptr[:-1])
        rate_F[active[stops_F]] = least_F[stops_F]
        rest_L -= matrix_LF @ np.where(stops_F, least_F, 0.0)
        active, matrix_LF = active[~stops_F], matrix_LF[:, ~stops_F]
    return rate_F


def limiting_links(matrix_LF: sparse.csc_matrix, capacity_L: np.ndarray) -> np.ndarray:
    """bool [links]: false for those that others keep from ever being full, so that rates are the same without them.

    A link's flows come through some NICs. If each NIC, full, puts at most so much of that on the link, and all of them
    together no more than it carries, the link need not be looked at: with packets over all ways of a fat tree, none of
    its cables. Any one link of each flow can take the NIC's place here; its first two in order are tried.
    """
    matrix_LF = sparse.csc_matrix(matrix_LF)
    matrix_LF.sort_indices()
    count_F = np.diff(matrix_LF.indptr)
    if not len(count_F):
        return np.zeros(len(capacity_L), bool)
    limits_L = np.ones(len(capacity_L), bool)
    anchors = []
    for place in (0, 1):
        at_F = matrix_LF.indptr[:-1] + np.minimum(place, count_F - 1)
        anchor_F, part_F = matrix_LF.indices[at_F], matrix_LF.data[at_F]
        anchors.append(anchor_F)
        limits_L &= _most_through(matrix_LF, anchor_F, part_F, capacity_L) > capacity_L * (1 + _SAME)
    limits_L[np.concatenate(anchors)] = True
    return limits_L


def _most_through(matrix_LF: sparse.csc_matrix, anchor_F: np.ndarray, part_F: np.ndarray,
                  capacity_L: np.ndarray) -> np.ndarray:
    """float64 [links], bytes/s: what a link gets if each anchor is full of the flow of which the link gets most."""
    order = np.argsort(anchor_F, kind="stable")
    rows = matrix_LF[:, order].tocsr()
    rows.sort_indices()
    anchor_N = anchor_F[order][rows.indices]
    link_N = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    first_N = np.ones(len(link_N), bool)
    first_N[1:] = (np.diff(link_N) != 0) | (np.diff(anchor_N) != 0)
    start = np.flatnonzero(first_N)
    most = np.maximum.reduceat(rows.data / part_F[order][rows.indices], start)
    return np.bincount(link_N[start], weights=most * capacity_L[anchor_N[start]], minlength=rows.shape[0])
