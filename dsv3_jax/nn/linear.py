"""Weights, linear layers, embeddings and the SwiGLU feed-forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.mesh import on_own_tokens
from dsv3_jax.precision.deferral import later
from dsv3_jax.precision.linear import linear, swiglu_linear
from dsv3_jax.precision.quantised import Quantised
from dsv3_jax.precision.recipe import LinearRecipe, PrecisionRecipe


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float, float32: bool = False,
                 float8: bool = False) -> nnx.Param:
    """A normally distributed float32 weight. `axes` names its dimensions for `dsv3_jax.mesh`; `float32` keeps it in
    float32 when compute weights are bf16; `float8` allows `precision.recipe.inference_weights` to hold it in float8."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes, float32=float32,
                     float8=float8)


class Linear(nnx.Module):
    """y = x W without bias; `weight` is [in, out] (the published files hold [out, in])."""

    def __init__(self, width_in: int, width_out: int, axes: tuple[str, str], std: float, rngs: nnx.Rngs,
                 recipe: LinearRecipe | None = None, float8: bool = True):
        self.weight = normal_param(rngs, (width_in, width_out), axes, std, float8=float8)
        self.recipe = recipe

    def __call__(self, x: jax.Array, *, keep: str | None = None, after_swiglu: bool = False) -> jax.Array:
        """[B, T, in] -> [B, T, out], in x's dtype.

        Args:
          keep: name for what the backward needs of x; see `block.recomputed`.
          after_swiglu: x is SwiGLU's input, [B, T, 2 in].
        """
        product = swiglu_linear if after_swiglu else linear
        if self.recipe is None:
            return product(x, self.weight[...], None, keep=keep)

        def local(weight: jax.Array | Quantised, x: jax.Array) -> jax.Array:
            rows = product(x.reshape(-1, x.shape[-1]), weight, self.recipe, keep=keep)
            return rows.reshape(*x.shape[:-1], -1)
        return on_own_tokens(local, self.weight.get_value(), x)


class Embedding(nnx.Module):
    """A table of token vectors, [V, D]."""

    def __init__(self, vocab_size: int, width: int, std: float, rngs: nnx.Rngs):
        self.weight = normal_param(rngs, (vocab_size, width), ("vocab", "embed"), std)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int [B, T, ...] -> [B, T, ..., D] in the table's dtype."""
        return on_own_tokens(_rows, self.weight[...], tokens)


@jax.custom_vjp
def _rows(table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take(table_VD, tokens, axis=0)


def _rows_backward(saved: tuple[jax.Array, jax.Array], grads: jax.Array) -> tuple[jax.Array, None]:
    """What a token gets at all its places is summed in float32, and put into the table once: sums in bf16 stop growing
    at some 256 addends, which spaces and commas have."""
    table_VD, tokens = saved
    tokens_N, grads_ND = tokens.reshape(-1), later(grads).reshape(tokens.size, -1)
    place_N = jnp.arange(tokens.size)
    first_N = jnp.full(table_VD.shape[0], tokens.size).at[tokens_N].min(place_N)[tokens_N]
    sums_ND = jnp.zeros(grads_ND.shape, jnp.float32).at[first_N].add(grads_ND.astype(jnp.float32))
    rows_N = jnp.where(first_N == place_N, tokens_N, table_VD.shape[0])
    return jnp.zeros_like(table_VD).at[rows_N].set(sums_ND.astype(table_VD.dtype), mode="drop"), None


_rows.defvjp(lambda table, tokens: (_rows(table, tokens), (table, tokens)), _rows_backward)


class OutputHead(nnx.Module):
    """Logits from hidden states; `weight` is [V, D] like the embedding's, as published.

    (On CPU this layout spares the gradient a transposed copy of all the logits.)
    """

    def __init__(self, vocab_size: int, width: int, std: float, rngs: nnx.Rngs):
        self.weight = normal_param(rngs, (vocab_size, width), ("vocab", "embed"), std)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        return jnp.einsum("...d,vd->...v", hidden, self.weight[...], preferred_element_type=jnp.float32)


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)): the dense layers and the shared experts."""

    def __init__(self, width: int, inner: int, std: float, rngs: nnx.Rngs,
                 recipe: PrecisionRecipe = PrecisionRecipe()):
        self.gate_proj = Linear(width, inner, ("embed", "mlp"), std, rngs, recipe.linear)
        self.up_proj = Linear(width, inner, ("embed", "mlp"), std, rngs, recipe.linear)
        self.down_proj = Linear(inner, width, ("mlp", "embed"), std, rngs, recipe.down)

    @jax.named_scope("feed_forward")
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        gate_up = jnp.concatenate([self.gate_proj(x), self.up_proj(x)], axis=-1)
        return self.down_proj(gate_up, keep="ffn_inner", after_swiglu=True)
