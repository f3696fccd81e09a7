"""The one table between the model's parameters and the published tensors.

`published_tensors` lists, for any model and format, every tensor of the published files and where it lives in our
parameter tree. Loading, exporting, checking and dry runs all read this list. Published linear weights are [out, in],
ours [in, out]; ours hold all layers of a kind in one stack, all experts of a layer in one array, and an expert's gate
and up projections side by side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.interop.float8 import E4M3, scale_shape
from dsv3_jax.interop.published_config import Format

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32 = np.dtype(np.float32)
SCALE = "_scale_inv"
"""What follows a weight's name in the name of its scales."""


class Place(NamedTuple):
    """Where a published tensor lives in our tree."""

    path: str
    """Of the variable, as 'moe_layers/mlp/experts/gate_up_proj'."""
    at: tuple[int, ...] = ()
    """Layer in the stack, then expert: what to take of the leading dimensions."""
    half: int | None = None
    """0 for the gate and 1 for the up projection, where the variable's last dimension holds both."""
    transposed: bool = False
    """Whether the published matrix is the transpose of ours."""
    router_bias: bool = False
    """Whether it is state of the router and not a parameter."""


class TensorSpec(NamedTuple):
    """One published tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    place: Place
    scale_of: str | None = None
    """The float8 weight that these scales belong to."""
    copy_of: str | None = None
    """The tensor that must hold the same values: prediction modules repeat embedding and head."""

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


_Named = tuple[TensorSpec, bool]
"""A tensor, and whether the float8 format holds it in float8."""


@functools.lru_cache(maxsize=8)
def published_tensors(config: ModelConfig, fmt: Format) -> tuple[TensorSpec, ...]:
    """Every published tensor of `config` in `fmt`: embedding, layers, final norm, head, prediction modules; a float8
    weight's scales follow it."""
    specs: list[TensorSpec] = []
    for spec, in_blocks in _weights(config):
        if spec.place.router_bias:
            specs.append(spec)
        elif fmt == "float8" and in_blocks:
            specs.append(spec._replace(dtype=E4M3))
            specs.append(TensorSpec(spec.name + SCALE, scale_shape(spec.shape), FLOAT32, spec.place, spec.name))
        else:
            specs.append(spec._replace(dtype=FLOAT32 if fmt == "float32" else BFLOAT16))
    return tuple(specs)


def _weights(c: ModelConfig) -> Iterator[_Named]:
    table = (c.vocab_size, c.hidden_size)
    gain = (c.hidden_size,)
    yield _plain("model.embed_tokens.weight", table, Place("embed_tokens/weight"))
    for layer in range(c.num_hidden_layers):
        dense = layer < c.first_k_dense_replace
        stack, index = ("dense_layers", layer) if dense else ("moe_layers", layer - c.first_k_dense_replace)
        yield from _block(c, f"model.layers.{layer}", stack, (index,), dense)
    yield _plain("model.norm.weight", gain, Place("norm/weight"))
    yield _plain("lm_head.weight", table, Place("lm_head/weight"))
    for k in range(c.num_nextn_predict_layers):
        prefix, path = f"model.layers.{c.num_hidden_layers + k}", f"mtp/{k}"
        yield _plain(f"{prefix}.embed_tokens.weight", table, Place("embed_tokens/weight"), "model.embed_tokens.weight")
        for norm in ("enorm", "hnorm"):
            yield _plain(f"{prefix}.{norm}.weight", gain, Place(f"{path}/{norm}/weight"))
        yield _plain(f"{prefix}.eh_proj.weight", (c.hidden_size, 2 * c.hidden_size),
                     Place(f"{path}/eh_proj/weight", transposed=True))
        yield from _block(c, prefix, f"{path}/block", (), dense=False)
        yield _plain(f"{prefix}.shared_head.norm.weight", gain, Place(f"{path}/norm/weight"))
        yield _plain(f"{prefix}.shared_head.head.weight", table, Place("lm_head/weight"), "lm_head.weight")


def _plain(name: str, shape: tuple[int, ...], place: Place,
           copy_of: str | None = None) -> _Named:
    return TensorSpec(name, shape, FLOAT32, place, copy_of=copy_of), False


def _block(c: ModelConfig, prefix: str, path: str, index: tuple[int, ...],
           dense: bool) -> Iterator[_Named]:
    """One layer; `path` and `index` say where ours is."""
    def linear(name: str, width_in: int, width_out: int) -> _Named:
        place = Place(f"{path}/{name.replace('.', '/')}/weight", index, transposed=True)
        return TensorSpec(f"{prefix}.{name}.weight", (width_out, width_in), FLOAT32, place), True

    def norm(name: str, width: int) -> _Named:
        return _plain(f"{prefix}.{name}.weight", (width,), Place(f"{path}/{name.replace('.', '/')}/weight", index))

    def feed_forward(name: str, inner: int) -> Iterator[_Named]:
        yield linear(f"{name}.gate_proj", c.hidden_size, inner)
        yield linear(f"{name}.up_proj", c.hidden_size, inner)
        yield linear(f"{name}.down_proj", inner, c.hidden_size)

    heads = c.num_attention_heads
    yield norm("input_layernorm", c.hidden_size)
    if c.attention != "mla":  # not published by DeepSeek; the names are those of other models of the kind
        yield linear("self_attn.q_proj", c.hidden_size, heads * c.kv_head_dim)
        yield linear("self_attn.k_proj", c.hidden_size, c.kv_heads * c.kv_head_dim)
        yield linear("self_attn.v_proj", c.hidden_size, c.kv_heads * c.kv_head_dim)
        yield linear("self_attn.o_proj", heads * c.kv_head_dim, c.hidden_size)
    else:
        yield from _latent_attention(c, linear, norm)
    yield norm("post_attention_layernorm", c.hidden_size)
    if dense:
        yield from feed_forward("mlp", c.intermediate_size)
        return
    yield _plain(f"{prefix}.mlp.gate.weight", (c.n_routed_experts, c.hidden_size),
                 Place(f"{path}/mlp/gate/weight", index, transposed=True))
    # Only noaux_tc adds the bias; V2's routers have none, and ours stays at zero.
    if c.topk_method == "noaux_tc":
        yield _plain(f"{prefix}.mlp.gate.e_score_correction_bias", (c.n_routed_experts,),
                     Place(f"{path}/mlp/gate/e_score_correction_bias", index, router_bias=True))
    yield from _experts(c, f"{prefix}.mlp.experts", f"{path}/mlp/experts", index)
    if c.n_shared_experts:
        yield from feed_forward("mlp.shared_experts", c.n_shared_experts * c.moe_intermediate_size)


def _latent_attention(c: ModelConfig, linear: Callable[[str, int, int], _Named],
                      norm: Callable[[str, int], _Named]) -> Iterator[_Named]:
    heads = c.num_attention_heads
    if c.q_lora_rank is None:
        yield linear("self_attn.q_proj", c.hidden_size, heads * c.qk_head_dim)
    else:
        yield linear("self_attn.q_a_proj", c.hidden_size, c.q_lora_rank)
        yield norm("self_attn.q_a_layernorm", c.q_lora_rank)
        yield linear("self_attn.q_b_proj", c.q_lora_rank, heads * c.qk_head_dim)
    yield linear("self_attn.kv_a_proj_with_mqa", c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
    yield norm("self_attn.kv_a_layernorm", c.kv_lora_rank)
    yield linear("self_attn.kv_b_proj", c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
    yield linear("self_attn.o_proj", heads * c.v_head_dim, c.hidden_size)


def _experts(c: ModelConfig, prefix: str, path: str, index: tuple[int, ...]) -> Iterator[_Named]:
    inner, width = c.moe_intermediate_size, c.hidden_size
    for expert in range(c.n_routed_experts):
        at = (*index, expert)
        for half, name in enumerate(("gate_proj", "up_proj")):
            place = Place(f"{path}/gate_up_proj", at, half, transposed=True)
            yield TensorSpec(f"{prefix}.{expert}.{name}.weight", (inner, width), FLOAT32, place), True
        place = Place(f"{path}/down_proj", at, transposed=True)
        yield TensorSpec(f"{prefix}.{expert}.down_proj.weight", (width, inner), FLOAT32, place), True
