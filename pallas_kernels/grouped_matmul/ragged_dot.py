"""XLA's own: a ragged kernel on TPU, its gradients too; on CPU and NVIDIA a product of every row with every group."""

from __future__ import annotations

import jax


def product(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, alignment: int = 1, *,
            transpose_rhs: bool = False) -> jax.Array:
    """See `api.grouped_matmul`."""
    del alignment
    if not transpose_rhs:
        return jax.lax.ragged_dot(rows_PD, weights_EDF, group_sizes_E)
    given = jax.ShapeDtypeStruct((rows_PD.shape[0], weights_EDF.shape[1]), rows_PD.dtype)
    (out_PD,) = jax.linear_transpose(lambda x: jax.lax.ragged_dot(x, weights_EDF, group_sizes_E), given)(rows_PD)
    return out_PD


def weight_gradient(rows_PD: jax.Array, grads_PF: jax.Array, group_sizes_E: jax.Array,
                    alignment: int = 1) -> jax.Array:
    """See `api.grouped_wgrad`."""
    del alignment
    shape = group_sizes_E.shape[0], rows_PD.shape[1], grads_PF.shape[1]
    (out_EDF,) = jax.linear_transpose(lambda w: jax.lax.ragged_dot(rows_PD, w, group_sizes_E),
                                      jax.ShapeDtypeStruct(shape, rows_PD.dtype))(grads_PF)
    return out_EDF
