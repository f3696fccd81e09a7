"""The oracle: a padded all-to-all of all slots, and one gather of rows for each copy."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.peers import Axis, Route, swap


def combine(slots_SD: jax.Array, route: Route, weights_RK: jax.Array | None, axis: Axis,
            dtype: jnp.dtype) -> jax.Array:
    """See `api.all_to_all_combine`."""
    return sum_of_copies(swap(slots_SD, axis), route.slot_RK, weights_RK, dtype)


def sum_of_copies(returned_SD: jax.Array, slot_RK: jax.Array, weights_RK: jax.Array | None,
                  dtype: jnp.dtype) -> jax.Array:
    """[S, D] -> [R, D]: the float32 sum over k of slots slot_RK[:, k], rounded once."""
    total = jnp.zeros((slot_RK.shape[0], returned_SD.shape[1]), jnp.float32)
    for k in range(slot_RK.shape[1]):
        slot_R1 = slot_RK[:, k, None]
        rows = returned_SD[jnp.maximum(slot_R1[:, 0], 0)].astype(jnp.float32)
        if weights_RK is not None:
            rows *= weights_RK[:, k, None]
        total += jnp.where(slot_R1 >= 0, rows, 0)
    return total.astype(dtype)
