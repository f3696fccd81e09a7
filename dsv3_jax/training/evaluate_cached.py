"""Bits per byte on held-out text read through a cache: what a cache's format or a window costs in quality."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import RunConfig
from dsv3_jax.inference.cache import CacheFormat, LatentCache
from dsv3_jax.inference.entry_format import EntryLayout
from dsv3_jax.inference.forward import decode
from dsv3_jax.nn.block import gathered
from dsv3_jax.nn.model import model_structure
from dsv3_jax.training.batches import validation_windows
from dsv3_jax.training.loss import negative_log_likelihood
from dsv3_jax.training.step import weights_for_compute
from dsv3_jax.training.tokens import TokenSplit

CHUNK = 16
"""Tokens of a row decoded at once. Every token reads entries as they are stored, its own too, so this changes speed
alone."""
ROWS = 32


@dataclasses.dataclass(frozen=True)
class CacheChoice:
    """How a trained model is read."""

    kind: CacheFormat
    window: int | None = None
    """`ModelConfig.attention_window`, whatever the model was trained with."""
    layout: EntryLayout | None = None
    """Which parts of an entry the 8-bit formats are for; None: as `inference.cache.entry_layout` says."""


def cached_quality(config: RunConfig, params: nnx.State, router_bias: nnx.State, split: TokenSplit, mesh: Mesh,
                   choice: CacheChoice) -> dict[str, float]:
    """Loss of the main model on a whole split, every token but the first predicted once, by decoding.

    Args:
      config: of the run that made the weights, on a mesh of one device.

    Returns:
      loss (nats a token), bits_per_byte where the text is known, and bytes_per_token: those of the cache that was
      allocated, over the tokens of its rows.
    """
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention_window=choice.window))
    length, structure = config.batch.sequence_length, model_structure(config.model, config.precision)
    chunk = math.gcd(length, CHUNK)

    def empty() -> LatentCache:
        return LatentCache.empty(config.model, ROWS, length, choice.kind, mtp=False, layout=choice.layout)

    def total_nll(params: nnx.State, router_bias: nnx.State, cache: LatentCache, tokens: jax.Array,
                  weights: jax.Array) -> jax.Array:
        model = nnx.merge(structure, weights_for_compute(params, config), router_bias)

        def step(cache: LatentCache, xs: tuple[jax.Array, ...]) -> tuple[LatentCache, jax.Array]:
            inputs, targets, weights = xs
            out = decode(model, inputs, cache, execution=config.execution)
            nll = negative_log_likelihood(gathered(model.lm_head), out.hidden_BQD, targets)
            return out.cache, jnp.sum(nll * weights)
        pieces = [x.reshape(ROWS, -1, chunk).swapaxes(0, 1) for x in (tokens[:, :-1], tokens[:, 1:], weights)]
        return jnp.sum(jax.lax.scan(step, cache, tuple(pieces))[1])
    program, total = jax.jit(total_nll), 0.0
    inputs, weights = validation_windows(split.tokens, length, 1)
    with jax.set_mesh(mesh):
        cache = empty()
        for start in range(0, len(inputs), ROWS):
            missing = max(0, start + ROWS - len(inputs))
            batch = [np.pad(x[start:start + ROWS], ((0, missing), (0, 0))) for x in (inputs, weights)]
            total += float(program(params, router_bias, cache, *batch))
    held = sum(x.nbytes for x in jax.tree.leaves(cache.storage))
    result = {"loss": total / float(weights.sum()), "bytes_per_token": held / (ROWS * length)}
    if split.text_bytes:
        result["bits_per_byte"] = total / math.log(2) / split.text_bytes
    return result
