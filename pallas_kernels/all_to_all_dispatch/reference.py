"""The oracle: rows copied into slots, and a padded all-to-all of the slots, empty ones included."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.peers import Axis, Route, swap
from pallas_kernels.quantise import reference as casts
from pallas_kernels.quantise.reference import TILE


def dispatch(rows: tuple[jax.Array, ...], route: Route, axis: Axis, cast: bool) -> tuple[jax.Array, ...]:
    """See `api.all_to_all_dispatch`; `rows` is one array, or float8 values and scales."""
    if cast:
        rows = casts.quantise(rows[0], (1, TILE), True)
    used_S1, source_S = route.source_S[:, None] >= 0, jnp.maximum(route.source_S, 0)
    return tuple(swap(jnp.where(used_S1, part[source_S], jnp.zeros((), part.dtype)), axis) for part in rows)
