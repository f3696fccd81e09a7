"""Which type each weight has while it is used."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

Precision = Literal["bf16", "float32"]
COMPUTE_DTYPE = {"bf16": jnp.bfloat16, "float32": jnp.float32}


def compute_weights(params: Any, precision: Precision) -> Any:
    """float32 master weights as the types the layers compute with.

    Weights marked `float32` (router and norm gains; paper 2, section 3.3.1) stay as they are. Activations follow the
    embedding's type; norms, softmax, router and losses convert to float32 themselves.
    """
    def cast(variable: nnx.Variable) -> nnx.Variable:
        keep = variable.get_metadata("float32")
        return variable if keep else variable.replace(variable.get_value().astype(COMPUTE_DTYPE[precision]))
    return jax.tree.map(cast, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
