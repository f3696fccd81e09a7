"""The oracle: every row times every group's matrix, and a mask. E times the necessary work."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def product(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, alignment: int = 1, *,
            transpose_rhs: bool = False) -> jax.Array:
    """See `api.grouped_matmul`."""
    del alignment
    contracted = "pd,efd->pef" if transpose_rhs else "pd,edf->pef"
    products_PEF = jnp.einsum(contracted, rows_PD, weights_EDF, preferred_element_type=jnp.float32)
    members_PE = _members(group_sizes_E, rows_PD.shape[0])
    return jnp.sum(jnp.where(members_PE[..., None], products_PEF, 0), axis=1).astype(rows_PD.dtype)


def weight_gradient(rows_PD: jax.Array, grads_PF: jax.Array, group_sizes_E: jax.Array,
                    alignment: int = 1) -> jax.Array:
    """See `api.grouped_wgrad`."""
    del alignment
    rows_PED = jnp.where(_members(group_sizes_E, rows_PD.shape[0])[..., None], rows_PD[:, None], 0)
    return jnp.einsum("ped,pf->edf", rows_PED, grads_PF, preferred_element_type=jnp.float32).astype(rows_PD.dtype)


def _members(group_sizes_E: jax.Array, rows: int) -> jax.Array:
    """bool [P, E]: which rows are of which group."""
    ends_E = jnp.cumsum(group_sizes_E)
    row_P = jnp.arange(rows)[:, None]
    return (row_P >= ends_E - group_sizes_E) & (row_P < ends_E)
