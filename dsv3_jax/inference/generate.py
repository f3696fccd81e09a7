"""Text generation: prompts of different lengths in one batch, token ids streamed as they are made.

A generator compiles one program to read prompts and one to make tokens, for each batch size and each rounded length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.inference.cache import LatentCache
from dsv3_jax.inference.decode_state import DecodeState, advance
from dsv3_jax.inference.forward import prefill, prefill_ahead
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.sampling import TARGET, RowSampling, Sampling, draw, probabilities, sampling_rows
from dsv3_jax.inference.speculative import window_of, window_size, with_token
from dsv3_jax.mesh import batch_shards
from dsv3_jax.nn.block import gathered

SMALLEST_SIZE = 32
"""Prompts and caches have this many tokens, or a power of two times it, up to the model's window."""


class Generator:
    """Makes text with one model on one mesh.

    Args:
      model, mesh and options: as of `ModelOnMesh`.

    Attributes:
      structure: static half of the model whose state `prepare` returns, for `nnx.merge`.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, **options: Any):
        self._on_mesh = ModelOnMesh(model, mesh, **options)
        self.model, self.mesh, self.structure = model, self._on_mesh.mesh, self._on_mesh.structure
        self.speculative, self.prepare = self._on_mesh.speculative, self._on_mesh.prepare
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        self._first: Any = jax.jit(self._read_prompts, static_argnames="capacity",
                                   out_shardings=(None, everywhere))
        self._next: Any = jax.jit(self._advance, donate_argnames="state",
                                  out_shardings=(None, everywhere, everywhere))

    def generate(self, weights: nnx.State, prompts: Sequence[np.ndarray], new_tokens: int,
                 sampling: Sampling | Sequence[Sampling] = Sampling(), stop_ids: Sequence[int] = ()) -> Generation:
        """Starts a batch of rows; iterate over the result for their tokens. Every process of a run must do so alike.

        Args:
          prompts: int ids of each row, at least one each.
          new_tokens: most new tokens of each row.
          sampling: for all rows, or one a row.
          stop_ids: tokens that end a row; the one that did is the row's last.

        Raises:
          ConfigError: no rows, an empty prompt, ids outside the vocabulary, or more tokens than the model's window.
        """
        rows = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(rows) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts need as many samplings, or one for all; got {len(rows)}")
        self._check(prompts, new_tokens)
        return Generation(self, weights, [np.asarray(prompt, np.int32) for prompt in prompts], new_tokens, rows,
                          frozenset(stop_ids))

    @property
    def window(self) -> int:
        """Most tokens of a row, prompt and answer together."""
        return self.model.max_position_embeddings

    def compilations(self) -> tuple[int, int]:
        """Programs compiled so far to read prompts and to make tokens."""
        return self._first._cache_size(), self._next._cache_size()

    def _check(self, prompts: Sequence[np.ndarray], new_tokens: int) -> None:
        if not prompts or new_tokens < 1:
            raise ConfigError(f"nothing to generate: {len(prompts)} prompts, {new_tokens} new tokens; give one or more")
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ConfigError(f"prompt {row} has no tokens: give at least one, such as the tokenizer's begin token")
            low, high = int(np.min(prompt)), int(np.max(prompt))
            if low < 0 or high >= self.model.vocab_size:
                raise ConfigError(f"prompt {row} has token {high if low >= 0 else low} outside model.vocab_size "
                                  f"({self.model.vocab_size}): use the tokenizer the model was trained with")
            if len(prompt) + new_tokens > self.window:
                shorter, fewer = self.window - new_tokens, self.window - len(prompt)
                remedies = [f"shorten the prompt to {shorter} tokens"] * (shorter > 0)
                remedies += [f"ask for at most {fewer} new ones"] * (fewer > 0)
                raise ConfigError(
                    f"prompt {row} has {len(prompt)} tokens and {new_tokens} new ones are asked for, but the model's "
                    f"window (model.max_position_embeddings) is {self.window}: "
                    f"{', or '.join(remedies) or 'shorten both'}")

    def _read_prompts(self, weights: nnx.State, tokens_BT: jax.Array, lengths_B: jax.Array, rows: RowSampling, *,
                      capacity: int) -> tuple[DecodeState, jax.Array]:
        """The state after the prompts, and int32 [B], the first new token of each row."""
        model = nnx.merge(self.structure, weights)
        cache = LatentCache.empty(self.model, tokens_BT.shape[0], capacity, self._on_mesh.cache, mtp=self.speculative)
        out = prefill(model, tokens_BT, lengths_B, cache, self._on_mesh.reading)
        last = (lengths_B - 1)[:, None]
        logits_BV = gathered(model.lm_head)(jnp.take_along_axis(out.hidden_BQD, last[..., None], axis=1)[:, 0])
        column_T = jnp.arange(tokens_BT.shape[1])
        # Padding repeats the row's first token, which it has anyway.
        ids_BT = jnp.where(column_T < lengths_B[:, None], tokens_BT, tokens_BT[:, :1])
        row_B = jnp.arange(tokens_BT.shape[0])[:, None]
        seen_BV = jnp.zeros(logits_BV.shape, bool).at[row_B, ids_BT].set(True)
        token_B = draw(probabilities(logits_BV, seen_BV, rows), rows.seed, lengths_B, TARGET)
        cache, window = out.cache, None
        if self.speculative:
            cache = prefill_ahead(model, out.mtp_input_BQD, tokens_BT, cache, self._on_mesh.reading)
            following_BT = jnp.where(column_T == last, token_B[:, None], jnp.roll(tokens_BT, -1, axis=1))
            window = window_of(out.mtp_input_BQD, following_BT, window_size(self.model), lengths_B)
        return DecodeState(cache, token_B, with_token(seen_BV, token_B), window), token_B

    def _advance(self, weights: nnx.State, state: DecodeState, active_B: jax.Array,
                 rows: RowSampling) -> tuple[DecodeState, jax.Array, jax.Array]:
        return advance(nnx.merge(self.structure, weights), state, active_B, rows, self._on_mesh.execution)

    def _start(self, weights: nnx.State, prompts: Sequence[np.ndarray], new_tokens: int,
               rows: RowSampling) -> tuple[DecodeState, np.ndarray]:
        longest = max(len(prompt) for prompt in prompts)
        tokens = np.zeros((len(prompts), rounded(longest, self.window)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, :len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        with jax.set_mesh(self.mesh):
            state, first = self._first(weights, self._on_mesh.place(tokens), self._on_mesh.place(lengths), rows,
                                       capacity=rounded(longest + new_tokens, self.window))
        return state, np.asarray(first)

    def _step(self, weights: nnx.State, state: DecodeState, active: np.ndarray,
              rows: RowSampling) -> tuple[DecodeState, np.ndarray, np.ndarray]:
        with jax.set_mesh(self.mesh):
            state, tokens, counts = self._next(weights, state, self._on_mesh.place(active), rows)
        return state, np.asarray(tokens), np.asarray(counts)


class Generation:
    """A batch being generated. Iterating gives, a step at a time, the new ids of each row; rows that ended get none.

    Attributes:
      tokens: new ids of each row so far.
      steps: passes of the main model since the prompts were read.
      drafted, accepted: drafts that were verified and drafts that were kept, over all rows.
    """

    def __init__(self, generator: Generator, weights: nnx.State, prompts: list[np.ndarray], new_tokens: int,
                 sampling: list[Sampling], stop_ids: frozenset[int]):
        self._generator, self._weights, self._prompts = generator, weights, prompts
        self._new_tokens, self._sampling, self._stop_ids = new_tokens, sampling, stop_ids
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.steps = self.drafted = self.accepted = 0
        self._row_steps = self._decoded = 0
        self._active = np.ones(len(prompts), bool)

    def finish(self, row: int) -> None:
        """Ends a row from outside, such as at a stop sequence of text."""
        self._active[row] = False

    @property
    def acceptance(self) -> float | None:
        """Share of drafts kept; None in plain decoding."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_step(self) -> float | None:
        """New tokens of a row from one pass of the main model, the one that read the prompt not counted."""
        return self._decoded / self._row_steps if self._row_steps else None

    def __iter__(self) -> Iterator[list[list[int]]]:
        shards = batch_shards(self._generator.mesh)
        spare = -len(self._prompts) % shards
        # Rows that only fill up the mesh; they never become active.
        rows = sampling_rows(self._sampling + [Sampling(temperature=0)] * spare)
        state, first = self._generator._start(self._weights, self._prompts + [np.zeros(1, np.int32)] * spare,
                                              self._new_tokens, rows)
        yield [self._keep(row, [int(first[row])]) for row in range(len(self._prompts))]
        while self._active.any():
            active = np.pad(self._active, (0, spare))
            state, tokens, counts = self._generator._step(self._weights, state, active, rows)
            self.steps += 1
            new = []
            for row in range(len(self._prompts)):
                if self._active[row]:
                    self._row_steps += 1
                    self.drafted += tokens.shape[1] - 1
                    self.accepted += int(counts[row]) - 1
                new.append(self._keep(row, tokens[row, :counts[row]].tolist()))
                self._decoded += len(new[-1])
            yield new

    def run(self) -> list[list[int]]:
        """Generates to the end and returns `tokens`."""
        for _ in self:
            pass
        return self.tokens

    def _keep(self, row: int, ids: list[int]) -> list[int]:
        """Those of `ids` that the row still takes."""
        ids = ids[:self._new_tokens - len(self.tokens[row])]
        stop = next((index for index, token in enumerate(ids) if token in self._stop_ids), None)
        if stop is not None:
            ids = ids[:stop + 1]
        self.tokens[row] += ids
        if stop is not None or len(self.tokens[row]) >= self._new_tokens:
            self._active[row] = False
        return ids


def rounded(tokens: int, window: int) -> int:
    """The smallest size that holds `tokens`: a power of two times SMALLEST_SIZE, or the window itself."""
    size = SMALLEST_SIZE
    while size < tokens:
        size *= 2
    return min(size, window)

