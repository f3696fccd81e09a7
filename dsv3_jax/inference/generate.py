"""Text generation: prompts of different lengths in one batch, token ids streamed as they are made.

A generator compiles one program to read prompts and one to make tokens, for each batch size and each rounded length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError, Execution, ModelConfig, Precision
from dsv3_jax.inference.cache import CacheFormat, LatentCache
from dsv3_jax.inference.forward import decode, prefill, prefill_ahead, unstacked
from dsv3_jax.inference.sampling import TARGET, RowSampling, Sampling, draw, probabilities, sampling_rows
from dsv3_jax.inference.speculative import Window, speculative_step, window_of, window_size, with_token
from dsv3_jax.mesh import AXES, batch_sharding, batch_shards, gather_for_compute, shardings
from dsv3_jax.nn.block import gathered
from dsv3_jax.nn.model import model_structure, split_model
from dsv3_jax.precision.recipe import COMPUTE_FORMAT, compute_weights, inference_weights

SMALLEST_SIZE = 32
"""Prompts and caches have this many tokens, or a power of two times it, up to the model's window."""


class DecodeState(NamedTuple):
    """What lies on the devices between steps; donated to the next."""

    cache: LatentCache
    last_B: jax.Array
    """int32: the last token of each row, not in the cache yet."""
    seen_BV: jax.Array
    """bool: tokens that each row has, prompt included."""
    window: Window | None
    """For the prediction modules; None in plain decoding."""


class Generator:
    """Makes text with one model on one mesh.

    Args:
      model: the architecture.
      mesh: `dsv3_jax.mesh.make_mesh`'s. Its context axis counts as part of scale_up: a decoding step has no sequence to
        share.
      precision: of weights and activations.
      cache: format of the cache (`LatentCache.empty`); None: that of `precision`.
      speculative: whether to draft with the multi-token-prediction modules.
      spread: leave weights spread over devices and gather each layer's when it runs (`MeshConfig.zero` "full").

    Attributes:
      structure: static half of the model whose state `prepare` returns, for `nnx.merge`.

    Raises:
      ConfigError: `speculative` for a model without prediction modules.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, *, precision: Precision = "bf16",
                 cache: CacheFormat | None = None, speculative: bool = False, spread: bool = False):
        if speculative and not model.num_nextn_predict_layers:
            raise ConfigError("speculative decoding needs model.num_nextn_predict_layers of 1 or more; this model has "
                              "none: decode without it")
        self.model, self.mesh, self._moved = model, _without_context(mesh), mesh.shape["context"] > 1
        self.speculative = speculative
        self._precision, self._cache, self._spread = precision, cache or COMPUTE_FORMAT[precision], spread
        # A few tokens a device need little room even in the worst case, and to know the rounds costs a collective.
        self._execution = Execution(capacity_factor=float(self.mesh.size))
        # On CPU a loop over a stack of layers would copy them; see `forward.unstacked`.
        self._layers_apart = not spread and self.mesh.devices.flat[0].platform == "cpu"
        self.structure = _structure(model, precision, self._layers_apart)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        self._prepare = jax.jit(self._prepared)
        self._first: Any = jax.jit(self._read_prompts, static_argnames="capacity",
                                   out_shardings=(None, everywhere))
        self._next: Any = jax.jit(self._advance, donate_argnames="state",
                                  out_shardings=(None, everywhere, everywhere))

    def prepare(self, params: nnx.State, router_bias: nnx.State) -> nnx.State:
        """Weights as decoding uses them, once for many generations: in compute precision, in float8 where products read
        that, gathered, and on CPU layer by layer (see `forward.unstacked`). `params` is not changed."""
        if self._moved:
            params, router_bias = (jax.device_put(x, shardings(x, self.mesh)) for x in (params, router_bias))
        with jax.set_mesh(self.mesh):
            return self._prepare(params, router_bias)

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

    def _prepared(self, params: nnx.State, router_bias: nnx.State) -> nnx.State:
        weights = compute_weights(params, self._precision)
        weights = inference_weights(weights if self._spread else gather_for_compute(weights), self._precision)
        model = nnx.merge(model_structure(self.model, self._precision), weights, router_bias)
        return nnx.state(unstacked(model) if self._layers_apart else model)

    def _read_prompts(self, weights: nnx.State, tokens_BT: jax.Array, lengths_B: jax.Array, rows: RowSampling, *,
                      capacity: int) -> tuple[DecodeState, jax.Array]:
        """The state after the prompts, and int32 [B], the first new token of each row."""
        model = nnx.merge(self.structure, weights)
        cache = LatentCache.empty(self.model, tokens_BT.shape[0], capacity, self._cache, mtp=self.speculative)
        out = prefill(model, tokens_BT, lengths_B, cache)
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
            cache = prefill_ahead(model, out.mtp_input_BQD, tokens_BT, cache)
            following_BT = jnp.where(column_T == last, token_B[:, None], jnp.roll(tokens_BT, -1, axis=1))
            window = window_of(out.mtp_input_BQD, following_BT, window_size(self.model), lengths_B)
        return DecodeState(cache, token_B, with_token(seen_BV, token_B), window), token_B

    def _advance(self, weights: nnx.State, state: DecodeState, active_B: jax.Array,
                 rows: RowSampling) -> tuple[DecodeState, jax.Array, jax.Array]:
        """The state one step on, int32 [B, Q] new tokens and int32 [B], how many of them each row got."""
        model = nnx.merge(self.structure, weights)
        cache, last_B, seen_BV, window = state
        if window is not None:
            verified, window, seen_BV, cache = speculative_step(model, window, seen_BV, cache, active_B, rows,
                                                                self._execution)
            return (DecodeState(cache, window.tokens_BW[:, -1], seen_BV, window), verified.tokens_BQ,
                    jnp.where(active_B, verified.accepted_B + 1, 0))
        out = decode(model, last_B[:, None], cache, active_B, self._execution)
        logits_BV = gathered(model.lm_head)(out.hidden_BQD[:, 0])
        token_B = draw(probabilities(logits_BV, seen_BV, rows), rows.seed, out.cache.lengths_B, TARGET)
        token_B = jnp.where(active_B, token_B, last_B)
        return (DecodeState(out.cache, token_B, with_token(seen_BV, token_B), None), token_B[:, None],
                active_B.astype(jnp.int32))

    def _start(self, weights: nnx.State, prompts: Sequence[np.ndarray], new_tokens: int,
               rows: RowSampling) -> tuple[DecodeState, np.ndarray]:
        longest = max(len(prompt) for prompt in prompts)
        tokens = np.zeros((len(prompts), rounded(longest, self.window)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, :len(prompt)] = prompt
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        with jax.set_mesh(self.mesh):
            state, first = self._first(weights, self._place(tokens), self._place(lengths), rows,
                                       capacity=rounded(longest + new_tokens, self.window))
        return state, np.asarray(first)

    def _step(self, weights: nnx.State, state: DecodeState, active: np.ndarray,
              rows: RowSampling) -> tuple[DecodeState, np.ndarray, np.ndarray]:
        with jax.set_mesh(self.mesh):
            state, tokens, counts = self._next(weights, state, self._place(active), rows)
        return state, np.asarray(tokens), np.asarray(counts)

    def _place(self, x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, batch_sharding(self.mesh), lambda index: x[index])


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


@functools.cache
def _structure(config: ModelConfig, precision: Precision, layers_apart: bool) -> nnx.GraphDef:
    """Found once: as a static argument of each step it would be hashed each time, for a millisecond."""
    structure = []

    def trace() -> None:
        structure.append(nnx.graphdef(unstacked(nnx.merge(*split_model(config, precision=precision)))))
    if not layers_apart:
        return model_structure(config, precision)
    jax.eval_shape(trace)
    return structure[0]


def _without_context(mesh: Mesh) -> Mesh:
    """The same devices in the same order, context counted as part of scale_up."""
    shape: dict[str, Any] = dict(mesh.shape)
    shape["scale_up"] *= shape["context"]
    shape["context"] = 1
    return Mesh(mesh.devices.reshape([shape[axis] for axis in AXES]), AXES, axis_types=mesh.axis_types)
