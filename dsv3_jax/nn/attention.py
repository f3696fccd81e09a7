"""Multi-head Latent Attention (paper 2, section 2.1.1, equations 1-11)."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from dsv3_jax.config import AttentionBy, ModelConfig
from dsv3_jax.mesh import SPREAD, TOKENS, context_size, copy_for_each_device, on_each_device
from dsv3_jax.nn.causal import in_reach, over_query_chunks, sees
from dsv3_jax.nn.linear import Linear
from dsv3_jax.nn.norm import RMSNorm
from dsv3_jax.nn.rope import apply_rope, softmax_scale
from dsv3_jax.precision.recipe import PrecisionRecipe
from pallas_kernels.mla_attention import mla_attention

QUERY_CHUNK = 512
"""Queries whose scores are in memory at once. Longer sequences go chunk by chunk, scores recomputed in the backward."""


class MultiHeadLatentAttention(nnx.Module):
    """Causal attention whose keys and values come from a latent of kv_lora_rank + qk_rope_head_dim values a token.

    With `q_lora_rank=None` the query is projected straight from the hidden state, as in V2-Lite and Moonlight.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, recipe: PrecisionRecipe = PrecisionRecipe()):
        self.config = config
        c, std, heads = config, config.initializer_range, config.num_attention_heads
        if c.q_lora_rank is None:
            self.q_proj = Linear(c.hidden_size, heads * c.qk_head_dim, ("embed", "heads"), std, rngs,
                                 recipe.linear)
        else:
            self.q_a_proj = Linear(c.hidden_size, c.q_lora_rank, ("embed", "latent"), std, rngs, recipe.linear)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, "latent", c.latent_norm_eps)
            self.q_b_proj = Linear(c.q_lora_rank, heads * c.qk_head_dim, ("latent", "heads"), std, rngs,
                                   recipe.linear)
        self.kv_a_proj_with_mqa = Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim,
                                         ("embed", "latent"), std, rngs, recipe.linear)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, "latent", c.latent_norm_eps)
        self.kv_b_proj = Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim),
                                ("latent", "heads"), std, rngs, recipe.linear, float8=False)  # decoding absorbs it
        self.o_proj = Linear(heads * c.v_head_dim, c.hidden_size, ("heads", "embed"), std, rngs,
                             recipe.after_attention)

    def query(self, hidden_BTD: jax.Array, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """q^C [B, T, H, qk_nope_head_dim] and the rotated q^R [B, T, H, qk_rope_head_dim] (equations 6-9)."""
        c = self.config
        if c.q_lora_rank is None:
            q = checkpoint_name(self.q_proj(hidden_BTD), "latent")
        else:
            q = self.q_b_proj(self.q_a_layernorm(checkpoint_name(self.q_a_proj(hidden_BTD), "latent")))
        q = q.reshape(*q.shape[:-1], c.num_attention_heads, c.qk_head_dim)
        q_nope, q_rope = jnp.split(q, [c.qk_nope_head_dim], axis=-1)
        return q_nope, apply_rope(q_rope, positions_T, c)

    def latent(self, hidden_BTD: jax.Array, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a cache holds: the normed c^KV [B, T, C] and the rotated shared key k^R [B, T, qk_rope_head_dim]."""
        joint = checkpoint_name(self.kv_a_proj_with_mqa(hidden_BTD), "latent")
        latent_BTC, key = jnp.split(joint, [self.config.kv_lora_rank], axis=-1)
        key = apply_rope(key[..., None, :], positions_T, self.config)[..., 0, :]
        return self.kv_a_layernorm(latent_BTC), key

    @jax.named_scope("attention")
    def __call__(self, hidden_BTD: jax.Array, positions_T: jax.Array, by: AttentionBy = "xla") -> jax.Array:
        """[B, T, D] -> [B, T, D]; token t attends to tokens 0..t of its row, or to the last of them (a window)."""
        c = self.config
        chex.assert_axis_dimension(hidden_BTD, 2, c.hidden_size)
        q_nope, q_rope = self.query(hidden_BTD, positions_T)
        latent_BTC, k_rope = self.latent(hidden_BTD, positions_T)
        attend = _attend_over_context if context_size() > 1 else project_and_attend
        out = attend(c, self.kv_b_proj, q_nope, q_rope, latent_BTC, k_rope, by=by)
        return self.o_proj(out.reshape(*out.shape[:2], -1), keep="attention_out")


def project_and_attend(config: ModelConfig, kv_b_proj: Linear, q_nope: jax.Array, q_rope: jax.Array,
                       latent_BTC: jax.Array, k_rope: jax.Array, start: jax.Array | int = 0,
                       by: AttentionBy = "xla") -> jax.Array:
    """`causal_attention` of queries [B, Q, ...] on keys and values projected up from the latent [B, T, C]."""
    kv = kv_b_proj(latent_BTC)
    kv = kv.reshape(*kv.shape[:-1], config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim)
    if by == "kernels":
        run = functools.partial(mla_attention, start=start, scale=softmax_scale(config))
        with jax.named_scope("attention_core"):
            return on_each_device(run, (TOKENS,) * 4, TOKENS)(q_nope, q_rope, kv, k_rope)
    k_nope, value = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
    return causal_attention(q_nope, q_rope, k_nope, k_rope, value, softmax_scale(config), start, QUERY_CHUNK,
                            config.attention_window)


def _attend_over_context(config: ModelConfig, kv_b_proj: Linear, q_nope: jax.Array, q_rope: jax.Array,
                         latent_BTC: jax.Array, k_rope: jax.Array, by: AttentionBy = "xla") -> jax.Array:
    """`project_and_attend` where devices share a sequence: each attends from its own stretch of it, to all of it.

    What travels is the latent, kv_lora_rank + qk_rope_head_dim values a token (576 in V3), and in the backward its
    gradient; keys and values would be 32,768 a token, and as much again for their gradient. In return each device
    projects the whole sequence up: at context 2, 2.9% more FLOPs in a layer of V3.
    """
    graphdef, weights = nnx.split(kv_b_proj)

    def local(copy: nnx.State, q_nope: jax.Array, q_rope: jax.Array, latent_BQC: jax.Array,
              k_rope: jax.Array) -> jax.Array:
        latent_BTC, k_rope = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (latent_BQC, k_rope))
        start = jax.lax.axis_index("context") * q_nope.shape[1]
        own = nnx.merge(graphdef, jax.tree.map(lambda w: w[0], copy))
        return project_and_attend(config, own, q_nope, q_rope, latent_BTC, k_rope, start, by)
    return on_each_device(local, (PartitionSpec(SPREAD), TOKENS, TOKENS, TOKENS, TOKENS), TOKENS)(
        copy_for_each_device(weights), q_nope, q_rope, latent_BTC, k_rope)


@jax.named_scope("attention_core")
def causal_attention(q_nope: jax.Array, q_rope: jax.Array, k_nope: jax.Array, k_rope: jax.Array, value: jax.Array,
                     scale: float, start: jax.Array | int = 0, chunk: int = QUERY_CHUNK,
                     window: int | None = None) -> jax.Array:
    """softmax(scale * (q^C.k^C + q^R.k^R)) v with a causal mask and a float32 softmax (equation 10).

    Args:
      q_nope: [B, Q, H, qk_nope_head_dim]; k_nope: [B, T, H, qk_nope_head_dim].
      q_rope: [B, Q, H, qk_rope_head_dim]; k_rope: [B, T, qk_rope_head_dim], shared by all heads.
      value: [B, T, H, v_head_dim].
      start: position of the first query among the keys.
      chunk: queries whose scores are held at once; memory is B*H*chunk*T scores instead of B*H*Q*T.
      window: tokens that a query sees, its own included; None: all before it.

    Returns:
      [B, Q, H, v_head_dim] in value's dtype.
    """
    def attend(q_nope: jax.Array, q_rope: jax.Array, start: jax.Array | int) -> jax.Array:
        (key, key_rope, own_value), first = in_reach((k_nope, k_rope, value), start, q_nope.shape[1], window)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q_nope, key, preferred_element_type=jnp.float32)
        scores += jnp.einsum("bqhd,bkd->bhqk", q_rope, key_rope, preferred_element_type=jnp.float32)
        seen = sees(start + jnp.arange(q_nope.shape[1])[:, None], first + jnp.arange(key.shape[1])[None, :], window)
        weights = jax.nn.softmax(jnp.where(seen, scores * scale, -jnp.inf), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), own_value)
    return over_query_chunks(attend, (q_nope, q_rope), start, chunk)
