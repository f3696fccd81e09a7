"""The cache: what each layer remembers of each token, MLA's latent or others' keys and values (paper 1, section 2.1.2
and table 1). How that is kept is `entry_format`'s, and where `storage`'s.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from dsv3_jax.config import ModelConfig
from dsv3_jax.inference.entry_format import EightBitFormat, EntryFormat, EntryLayout, PlainFormat
from dsv3_jax.inference.storage import RowStorage, Storage

CacheFormat = Literal["bf16", "float32", "float8", "int8"]
_PLAIN = {"bf16": jnp.dtype(jnp.bfloat16), "float32": jnp.dtype(jnp.float32)}
_QUANTIZED = {"float8": jnp.dtype(jnp.float8_e4m3fn), "int8": jnp.dtype(jnp.int8)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Entries of every layer, and how many each row has: a pytree of static capacity."""

    storage: Storage
    """Layers in order, then one for each multi-token-prediction module."""
    lengths_B: jax.Array
    """int32: tokens of each row that the main model has seen."""
    sent_HLS: jax.Array | None = None
    """int32: tokens that passes over this cache had for the slots of experts (see `nn.replicated`), by the device that
    they came from; the last layers are the prediction modules'. None: nobody counts."""

    @property
    def capacity(self) -> int:
        """Entries that a row can hold: all its tokens, or the last of them (`ModelConfig.attention_window`)."""
        return self.storage.capacity

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, capacity: int, kind: CacheFormat = "bf16",
              mtp: bool = True, layout: EntryLayout | None = None) -> LatentCache:
        """A cache of `rows` sequences with nothing in it, rows spread over the mesh in use.

        Args:
          capacity: tokens of a row; a model with a window keeps no more entries than that needs.
          kind: bf16 and float32 keep entries as they are; float8 (e4m3) and int8 have a scale a tile of 128 values.
          mtp: whether to make room for the multi-token-prediction modules.
          layout: which parts of an entry float8 and int8 are for; None: `entry_layout`'s.
        """
        shape = cached_layers(config, mtp), rows, cached_entries(config, capacity, mtp)
        return cls(RowStorage.empty(shape, entry_format(config, kind, layout)), jnp.zeros((rows,), jnp.int32))


def entry_format(config: ModelConfig, kind: CacheFormat, layout: EntryLayout | None = None) -> EntryFormat:
    """How entries are kept; arguments as those of `LatentCache.empty`."""
    layout = layout or entry_layout(config)
    return EightBitFormat(layout, _QUANTIZED[kind]) if kind in _QUANTIZED else PlainFormat(layout.width, _PLAIN[kind])


def entry_layout(config: ModelConfig) -> EntryLayout:
    """MLA: the latent, and the rotary key that all heads share; gqa and mqa: keys, then values.

    MLA's rotary key stays in bf16 whatever the latent's format, as in DeepSeek-V3.2: it is a ninth of V3's values, and
    no norm bounds it. On a trained quickstart float8 of the latent costs 5e-6 bits a byte of held-out text, of both
    2.7e-4; int8 2.5e-5 and 4.6e-5 (experiments/kv_cache.py --quality).
    """
    if config.attention == "mla":
        return EntryLayout((config.kv_lora_rank,), config.qk_rope_head_dim)
    return EntryLayout((config.kv_heads * config.kv_head_dim,) * 2)


def entry_width(config: ModelConfig) -> int:
    """W: values of one token in one layer, 576 in V3."""
    return entry_layout(config).width


def cached_layers(config: ModelConfig, mtp: bool = True) -> int:
    """Layers with a cache."""
    return config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)


def cached_entries(config: ModelConfig, tokens: int, mtp: bool = True) -> int:
    """N: entries that a row of `tokens` needs, the window's at most.

    K prediction modules need K entries more: where drafts were rejected a pass begins up to K positions before the last
    that was written (see `speculative`), in the place of entries which it still sees.
    """
    window = config.attention_window
    if window is None:
        return tokens
    return min(tokens, window) + (config.num_nextn_predict_layers if mtp else 0)


def bytes_per_token(config: ModelConfig, kind: CacheFormat = "bf16", mtp: bool = True) -> int:
    """Bytes of one token in all layers: 70,272 for V3 in bf16 without its prediction module (paper 1, table 1)."""
    entry = sum(width * dtype.itemsize for width, dtype in entry_format(config, kind).arrays)
    return cached_layers(config, mtp) * entry
