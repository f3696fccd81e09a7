"""XLA's own: a ragged kernel on TPU, its gradients too; on CPU and NVIDIA a product of every row with every group."""

from __future__ import annotations

import jax


def product(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, alignment: int = 1) -> jax.Array:
    """See `api.grouped_matmul`."""
    del alignment
    return jax.lax.ragged_dot(rows_PD, weights_EDF, group_sizes_E)


def gradients(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, grads_PF: jax.Array,
              alignment: int = 1) -> tuple[jax.Array, jax.Array]:
    """With respect to rows and weights."""
    del alignment
    _, pull = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, group_sizes_E), rows_PD, weights_EDF)
    return pull(grads_PF)
