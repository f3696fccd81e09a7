"""The CPU backend: a loop over tiles of rows, each of one group, that stops where the rows end.

XLA on CPU lowers `ragged_dot` to a product of every row with every group (3 GFLOP/s useful on two cores, measured with
32 groups of 256 rows, D=256, F=128); this loop reaches 96 GFLOP/s on the same shapes.

With few rows a group, as in decoding, it is bound by memory, and reads a group's matrix twice: XLA copies it out of the
stack before it multiplies. For one row and a matrix of 1 MB, of which the floor is 46 us: 106 us in all, 95 of them the
copy. What was tried against that, in us: all matrices gathered, then a batched product 344; a product and sum that XLA
fuses with the copy 149; a branch for each matrix of the stack 109; a branch for each of 32 separate arrays 77, which
would take as many branches as a layer has experts.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def tiles_of_groups(group_sizes_E: jax.Array, rows: int, tile: int) -> tuple[jax.Array, jax.Array]:
    """(number of tiles in use, the group of every tile)."""
    ends_E = jnp.cumsum(group_sizes_E)
    group_of_tile = jnp.searchsorted(ends_E, tile * jnp.arange(rows // tile), side="right", method="compare_all")
    return ends_E[-1] // tile, group_of_tile


def product(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, tile: int, *,
            transpose_rhs: bool = False) -> jax.Array:
    """See `api.grouped_matmul`; `tile` divides P and every group size."""
    if transpose_rhs:
        weights_EDF = jnp.swapaxes(weights_EDF, 1, 2)
    used, group_of_tile = tiles_of_groups(group_sizes_E, rows_PD.shape[0], tile)

    def body(i: jax.Array, out_PF: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_slice_in_dim(rows_PD, i * tile, tile)
        y = jnp.dot(x, weights_EDF[group_of_tile[i]], preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_slice_in_dim(out_PF, y.astype(out_PF.dtype), i * tile, 0)
    return jax.lax.fori_loop(0, used, body, jnp.zeros((rows_PD.shape[0], weights_EDF.shape[2]), rows_PD.dtype))


def weight_gradient(rows_PD: jax.Array, grads_PF: jax.Array, group_sizes_E: jax.Array, tile: int) -> jax.Array:
    """See `api.grouped_wgrad`."""
    used, group_of_tile = tiles_of_groups(group_sizes_E, rows_PD.shape[0], tile)

    def body(i: jax.Array, dw_EDF: jax.Array) -> jax.Array:
        x = jax.lax.dynamic_slice_in_dim(rows_PD, i * tile, tile)
        dy = jax.lax.dynamic_slice_in_dim(grads_PF, i * tile, tile)
        return dw_EDF.at[group_of_tile[i]].add(jnp.dot(x.T, dy, preferred_element_type=jnp.float32))
    shape = (group_sizes_E.shape[0], rows_PD.shape[1], grads_PF.shape[1])
    return jax.lax.fori_loop(0, used, body, jnp.zeros(shape, jnp.float32)).astype(rows_PD.dtype)
