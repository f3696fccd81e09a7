"""The latent cache: what each layer remembers of each token (paper 1, section 2.1.2 and table 1).

`Storage` is the one place that knows how entries lie in memory. The model's code writes entries by position and reads
them back by layer, so another format is another class with the same `write` and `read`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.mesh import BATCH_AXES

CacheFormat = Literal["bf16", "float32"]
_DTYPES = {"bf16": jnp.bfloat16, "float32": jnp.float32}


class Storage(Protocol):
    """Entries of W = kv_lora_rank + qk_rope_head_dim values for each layer, row and position; a pytree."""

    @property
    def capacity(self) -> int:
        """N: positions of a row."""

    def write(self, layer: jax.Array | int, entries_BQW: jax.Array, positions_BQ: jax.Array) -> Self:
        """Keeps entries of one layer at int32 positions of their rows; those outside [0, N) are dropped."""

    def read(self, layer: jax.Array | int, dtype: jnp.dtype) -> jax.Array:
        """All entries of one layer, [B, N, W]; what was never written may be anything."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlainStorage:
    """Entries as they are, in one floating-point type; see `Storage`."""

    values_LBNW: jax.Array

    @property
    def capacity(self) -> int:
        return self.values_LBNW.shape[2]

    def write(self, layer: jax.Array | int, entries_BQW: jax.Array, positions_BQ: jax.Array) -> PlainStorage:
        return PlainStorage(write_rows(self.values_LBNW, layer, entries_BQW, positions_BQ))

    def read(self, layer: jax.Array | int, dtype: jnp.dtype) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(self.values_LBNW, layer, keepdims=False).astype(dtype)


def write_rows(values_LBNW: jax.Array, layer: jax.Array | int, rows_BQW: jax.Array,
               positions_BQ: jax.Array) -> jax.Array:
    """`values[layer, b, positions[b, q]] = rows[b, q]`, in place where the buffer may be; positions outside [0, N) are
    dropped. Rows stay on the devices that hold them."""
    index_BQ2 = jnp.stack([jnp.full_like(positions_BQ, layer), positions_BQ], axis=-1)
    # Spelt out, because B is a batch dimension of both sides: by `values.at[...]` it would be an index like another,
    # and the partitioner would gather the cache.
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(2,), inserted_window_dims=(0, 2), scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,), scatter_indices_batching_dims=(0,))
    return _spread(jax.lax.scatter(values_LBNW, index_BQ2, rows_BQW.astype(values_LBNW.dtype), dimensions,
                                   mode=jax.lax.GatherScatterMode.FILL_OR_DROP))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Entries of every layer, and how many each row has: a pytree of static capacity."""

    storage: Storage
    """Layers in order, then one for each multi-token-prediction module."""
    lengths_B: jax.Array
    """int32: tokens of each row that the main model has seen."""

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.storage.capacity

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, capacity: int, kind: CacheFormat = "bf16",
              mtp: bool = True) -> LatentCache:
        """A cache of `rows` sequences with nothing in it, rows spread over the mesh in use.

        Args:
          mtp: whether to make room for the multi-token-prediction modules.
        """
        shape = (cached_layers(config, mtp), rows, capacity, entry_width(config))
        return cls(PlainStorage(_spread(jnp.zeros(shape, _DTYPES[kind]))), jnp.zeros((rows,), jnp.int32))


def entry_width(config: ModelConfig) -> int:
    """W: values of one token in one layer, 576 in V3."""
    return config.kv_lora_rank + config.qk_rope_head_dim


def cached_layers(config: ModelConfig, mtp: bool = True) -> int:
    """Layers with a cache."""
    return config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)


def bytes_per_token(config: ModelConfig, kind: CacheFormat = "bf16", mtp: bool = True) -> int:
    """Bytes of one token in all layers: 70,272 for V3 in bf16 without its prediction module (paper 1, table 1)."""
    return cached_layers(config, mtp) * entry_width(config) * jnp.dtype(_DTYPES[kind]).itemsize


def _spread(x_LBNW: jax.Array) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x_LBNW
    return jax.lax.with_sharding_constraint(x_LBNW, PartitionSpec(None, BATCH_AXES))
