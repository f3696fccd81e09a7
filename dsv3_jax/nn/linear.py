"""Weights, linear layers, embeddings and the SwiGLU feed-forward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float,
                 float32: bool = False) -> nnx.Param:
    """A normally distributed float32 weight. `axes` names its dimensions for `dsv3_jax.mesh`; `float32` keeps it in
    float32 when compute weights are bf16."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes, float32=float32)


class Linear(nnx.Module):
    """y = x W without bias; `weight` is [in, out] (the published files hold [out, in])."""

    def __init__(self, width_in: int, width_out: int, axes: tuple[str, str], std: float, rngs: nnx.Rngs):
        self.weight = normal_param(rngs, (width_in, width_out), axes, std)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., out], in x's dtype."""
        return x @ self.weight[...]


class Embedding(nnx.Module):
    """A table of token vectors, [V, D]."""

    def __init__(self, vocab_size: int, width: int, std: float, rngs: nnx.Rngs):
        self.weight = normal_param(rngs, (vocab_size, width), ("vocab", "embed"), std)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int [...] -> [..., D] in the table's dtype."""
        return jnp.take(self.weight[...], tokens, axis=0)


class OutputHead(nnx.Module):
    """Logits from hidden states; `weight` is [V, D] like the embedding's, as published.

    (On CPU this layout spares the gradient a transposed copy of all the logits.)
    """

    def __init__(self, vocab_size: int, width: int, std: float, rngs: nnx.Rngs):
        self.weight = normal_param(rngs, (vocab_size, width), ("vocab", "embed"), std)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        return jnp.einsum("...d,vd->...v", hidden, self.weight[...], preferred_element_type=jnp.float32)


def swiglu(gate_up: jax.Array) -> jax.Array:
    """[..., 2F] -> [..., F]: silu(gate) * up, with the gate in the first half."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)): the dense layers and the shared experts."""

    def __init__(self, width: int, inner: int, std: float, rngs: nnx.Rngs):
        self.gate_proj = Linear(width, inner, ("embed", "mlp"), std, rngs)
        self.up_proj = Linear(width, inner, ("embed", "mlp"), std, rngs)
        self.down_proj = Linear(inner, width, ("mlp", "embed"), std, rngs)

    @jax.named_scope("feed_forward")
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        gate = checkpoint_name(self.gate_proj(x), "ffn_inner")
        up = checkpoint_name(self.up_proj(x), "ffn_inner")
        return self.down_proj(jax.nn.silu(gate) * up)
