"""The oracle: every row times every group's matrix, and a mask. E times the necessary work."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def product(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, alignment: int = 1) -> jax.Array:
    """See `api.grouped_matmul`."""
    del alignment
    ends_E = jnp.cumsum(group_sizes_E)
    row_P = jnp.arange(rows_PD.shape[0])[:, None]
    member_PE = (row_P >= ends_E - group_sizes_E) & (row_P < ends_E)
    products_PEF = jnp.einsum("pd,edf->pef", rows_PD, weights_EDF, preferred_element_type=jnp.float32)
    return jnp.sum(jnp.where(member_PE[..., None], products_PEF, 0), axis=1).astype(rows_PD.dtype)


def gradients(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, grads_PF: jax.Array,
              alignment: int = 1) -> tuple[jax.Array, jax.Array]:
    """With respect to rows and weights."""
    del alignment
    _, pull = jax.vjp(lambda x, w: product(x, w, group_sizes_E), rows_PD, weights_EDF)
    return pull(grads_PF)
