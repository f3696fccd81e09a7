"""Text generation by running the model over the whole window for each new token.

Exact and simple, and quick enough for samples while training; it keeps no cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError, RunConfig
from dsv3_jax.mesh import batch_sharding, batch_shards
from dsv3_jax.training.state import model_structure
from dsv3_jax.training.step import weights_for_compute


class Generator:
    """Continues a prompt token by token, with one compiled program for every length."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._window = config.batch.sequence_length
        self._rows = batch_shards(mesh)
        structure = model_structure(config)

        def next_token(params: nnx.State, router_bias: nnx.State, tokens: jax.Array, length: jax.Array,
                       key: jax.Array, temperature: jax.Array) -> jax.Array:
            model = nnx.merge(structure, weights_for_compute(params, config), router_bias)
            hidden = model(tokens, mtp=False, execution=config.execution).hidden_BTD[:, length - 1]
            logits_V = model.logits(hidden)[0]
            drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
            return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V))
        self._next_token = jax.jit(next_token, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, params: nnx.State, router_bias: nnx.State, prompt: np.ndarray, new_tokens: int, *, seed: int,
                 temperature: float = 0.8, stop: int | None = None) -> Iterator[int]:
        """Yields up to `new_tokens` ids after the prompt; 0 temperature takes the likeliest.

        The model sees the last `batch.sequence_length` tokens. Ends early after yielding `stop`. Every process of a
        run must call it alike.

        Raises:
          ConfigError: an empty prompt, or ids outside the vocabulary.
        """
        vocab = self._config.model.vocab_size
        if len(prompt) == 0:
            raise ConfigError("the prompt has no tokens: give at least one")
        if prompt.min() < 0 or prompt.max() >= vocab:
            raise ConfigError(f"the prompt has token {prompt.max()} outside model.vocab_size ({vocab}): use the "
                              "tokenizer the model was trained with")
        ids = [int(token) for token in prompt]
        key = jax.random.key(seed)
        for index in range(new_tokens):
            token = int(self._step(params, router_bias, ids, jax.random.fold_in(key, index), temperature))
            ids.append(token)
            yield token
            if token == stop:
                return

    def _step(self, params: nnx.State, router_bias: nnx.State, ids: list[int], key: jax.Array,
              temperature: float) -> jax.Array:
        seen = ids[-self._window:]
        row = np.zeros((self._rows, self._window), np.int32)
        row[:, :len(seen)] = seen
        with jax.set_mesh(self._mesh):
            tokens = jax.make_array_from_callback(row.shape, batch_sharding(self._mesh), lambda index: row[index])
            return self._next_token(params, router_bias, tokens, np.int32(len(seen)), key, np.float32(temperature))
