"""The oracle: dequantised to float32, one product."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.fp8_matmul.reference import dequantised


def gradient(x_AM: jax.Array, x_scales: jax.Array, y_BM: jax.Array, y_scales: jax.Array,
             accumulate_AB: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `api.fp8_wgrad`."""
    out_AB = jax.lax.dot_general(dequantised(x_AM, x_scales), dequantised(y_BM, y_scales), (((1,), (1,)), ((), ())),
                                 precision="highest", preferred_element_type=jnp.float32)
    return (out_AB if accumulate_AB is None else out_AB + accumulate_AB).astype(dtype)
