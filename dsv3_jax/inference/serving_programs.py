"""What the engine runs on the devices: a chunk of prompts into the pages, and a step of all rows.

Both read and write the same pages and rows, which stay on the devices. Shapes are few (sizes of chunks, widths of page
tables) and known ahead, so all programs are compiled before the first request.

Names: R rows of all devices, b lanes of a program (rows it works on, equally many a device, some of them idle), C
tokens of a chunk, K prediction modules in use, J pages of a row that a program sees, W = K + 1 positions that modules
look back at.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import Execution
from dsv3_jax.inference.cache import LatentCache, cached_layers, entry_format
from dsv3_jax.inference.decode_state import DecodeState, advance
from dsv3_jax.inference.forward import CachedOutput, Span, decode, predict_ahead
from dsv3_jax.inference.model_on_mesh import ModelOnMesh
from dsv3_jax.inference.paged_storage import PAGES, ROWS, PagedStorage
from dsv3_jax.inference.sampling import TARGET, RowSampling, Sampling, draw, probabilities, sampling_rows
from dsv3_jax.inference.speculative import Window, window_of, window_size, with_token
from dsv3_jax.mesh import DEVICES, batch_shards, compiler_options, on_each_device
from dsv3_jax.nn.block import gathered
from dsv3_jax.nn.model import DeepSeekV3


class ServingState(NamedTuple):
    """What stays on the devices; donated to each program."""

    storage: PagedStorage
    """Of no rows: programs are given tables."""
    lengths_R: jax.Array
    """int32: tokens in the cache."""
    last_R: jax.Array
    """int32: the last token, not in the cache yet."""
    seen_RV: jax.Array
    """bool: tokens that the row has."""
    window: Window | None
    """For the prediction modules, [R, W, ...]."""
    sent_HLS: jax.Array | None
    """`LatentCache.sent_HLS`; None without a placement of experts."""

    @property
    def rows(self) -> tuple[Any, ...]:
        """What each row has: its length, last token, seen tokens and window."""
        return self.lengths_R, self.last_R, self.seen_RV, self.window

    def changed(self, storage: PagedStorage, place_b: jax.Array, rows_b: tuple[Any, ...],
                sent_HLS: jax.Array | None) -> ServingState:
        """With the rows that lanes name replaced."""
        lengths_R, last_R, seen_RV, window = _with_rows(place_b, self.rows, rows_b)
        return ServingState(storage, lengths_R, last_R, seen_RV, window, sent_HLS)


class Chunk(NamedTuple):
    """Tokens of prompts to read, equally many lanes a device; NumPy arrays that become jax.Arrays."""

    place_b: Any
    """int32: which of its device's rows; -1 for a lane that has nothing to do."""
    tokens_bX: Any
    """int32 [b, C + K]: of the chunk, and those that follow it; -1 for one that is not known yet."""
    start_b: Any
    """int32: position of the first."""
    count_b: Any
    """int32: real ones of the C."""
    first_b: Any
    """bool: whether the row begins here."""
    table_bJ: Any
    """int32: pages of the row."""


class Arrival(NamedTuple):
    """Rows that other engines have read, a lane a device; NumPy arrays that become jax.Arrays."""

    place_b: Any
    """int32: which of its device's rows; -1 for none."""
    table_bJ: Any
    """int32: pages for it."""
    arrays_bLJSx: tuple[Any, ...]
    """What they hold."""
    lengths_b: Any
    last_b: Any
    seen_bV: Any
    window: Window | None


class ServingPrograms:
    """The programs for one model on one mesh.

    Args:
      rows: of each device.
      pages: of each device.

    Attributes:
      devices: how many there are for rows; those that share rows (`mesh.context`) count as one, here and in the engine.
      options: for the compiler.
    """

    def __init__(self, on_mesh: ModelOnMesh, rows: int, pages: int, page_size: int):
        self.on_mesh, self.devices = on_mesh, batch_shards(on_mesh.mesh)
        self.ahead = on_mesh.model.num_nextn_predict_layers if on_mesh.speculative else 0
        self.options = compiler_options(on_mesh.mesh) if on_mesh.execution.dual else {}
        self._rows, self._pages, self._page_size = rows * self.devices, pages * self.devices, page_size
        everywhere, of_pages, of_rows, of_devices = (NamedSharding(on_mesh.mesh, spec)
                                                     for spec in (PartitionSpec(), PAGES, ROWS, DEVICES))
        with jax.set_mesh(on_mesh.mesh):
            self._shapes = jax.eval_shape(self._nothing)
        storage, sent_HLS = self._shapes.storage, self._shapes.sent_HLS
        # Said in full: a state that came back laid out in other words would be a reason to compile again.
        self._layout = layout = jax.tree.map(lambda x: of_rows, self._shapes)._replace(
            storage=dataclasses.replace(storage, arrays_LPSx=(of_pages,) * len(storage.arrays_LPSx),
                                        table_BJ=everywhere),
            sent_HLS=jax.tree.map(lambda x: of_devices, sent_HLS))
        self._take: Any = jax.jit(self._taken)
        self._adopt: Any = jax.jit(self._adopted, donate_argnames="state", out_shardings=layout)
        self._takes: dict[int, Any] = {}
        self._adopts: dict[int, Any] = {}
        self._reads: dict[tuple[int, int, int], Any] = {}
        self._steps: dict[tuple[int, int], Any] = {}
        self._empty = jax.jit(self._nothing, out_shardings=layout)
        self._read: Any = jax.jit(self._read_chunk, donate_argnames="state", out_shardings=(layout, everywhere))
        self._step: Any = jax.jit(self._advance, donate_argnames="state",
                                  out_shardings=(layout, everywhere, everywhere))

    def empty(self) -> ServingState:
        """Pages and rows with nothing in them."""
        with jax.set_mesh(self.on_mesh.mesh):
            return self._empty()

    def compile(self, weights: nnx.State, state: ServingState, chunks: Sequence[tuple[int, int]], rows: Sequence[int],
                widths: Sequence[int]) -> int:
        """Compiles all programs for these chunks (lanes of a device, tokens of a lane), rows of a device in a step, and
        widths of tables; how many there are."""
        for width in widths:
            for lanes, size in chunks:
                lowered = self.lower_read(weights, state, size, width, lanes)
                self._reads[lanes, size, width] = lowered.compile(self.options)
            for count in rows:
                self._steps[count, width] = self.lower_step(weights, state, count, width).compile(self.options)
        return len(self._reads) + len(self._steps)

    def lower_read(self, weights: nnx.State, state: ServingState, size: int, width: int, lanes: int = 1) -> Any:
        """The program that reads `size` tokens in each of a device's lanes, rows having `width` pages; of shapes alone
        if need be."""
        return self._lowered(self._read, weights, state, self.idle_chunk(size, width, lanes),
                             sampling_rows([Sampling()] * lanes * self.devices))

    def lower_step(self, weights: nnx.State, state: ServingState, count: int, width: int) -> Any:
        """The program of a step of `count` rows of each device."""
        lanes = count * self.devices
        return self._lowered(self._step, weights, state, np.zeros(lanes, np.int32), np.zeros((lanes, width), np.int32),
                             sampling_rows([Sampling()] * lanes))

    def shapes(self) -> tuple[nnx.State, ServingState]:
        """Of weights and state, laid out: what the lowering of programs for devices that are not there takes."""
        state = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                             self._shapes, self._layout)
        return self.on_mesh.shapes(), state

    def _lowered(self, program: Any, weights: nnx.State, state: ServingState, *arrays: Any) -> Any:
        of_rows = NamedSharding(self.on_mesh.mesh, ROWS)
        given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=of_rows), arrays)
        with jax.set_mesh(self.on_mesh.mesh):
            return program.lower(weights, state, *given)

    def compile_handover(self, state: ServingState, widths: Sequence[int], gives: bool, takes: bool) -> int:
        """Compiles what gives rows to other engines, or takes theirs; how many programs there are."""
        with jax.set_mesh(self.on_mesh.mesh):
            for width in widths:
                if gives:
                    place, table = np.zeros(self.devices, np.int32), np.zeros((self.devices, width), np.int32)
                    self._takes[width] = self._take.lower(state, *self._placed((place, table))).compile()
                if takes:
                    self._adopts[width] = self._adopt.lower(state, self._placed(self.no_arrival(width))).compile()
        return len(self._takes) + len(self._adopts)

    def take(self, state: ServingState, device: int, place: int, pages: Sequence[int],
             width: int) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, np.ndarray] | None]:
        """What these pages of one row hold, [L, pages, S, x] each, and its window."""
        place_b, table_bJ = np.full(self.devices, -1, np.int32), np.zeros((self.devices, width), np.int32)
        place_b[device], table_bJ[device, :len(pages)] = place, pages
        arrays, window = self._takes[width](state, *self._placed((place_b, table_bJ)))

        def of_device(x: jax.Array) -> np.ndarray:
            return np.asarray(x[device])
        return (tuple(of_device(x)[:, :len(pages)] for x in arrays),
                None if window is None else (of_device(window[0]), of_device(window[1])))

    def no_arrival(self, width: int) -> Arrival:
        """Lanes without a row, for tables of so many pages."""
        lanes, config = self.devices, self.on_mesh.model
        state = self._shapes
        arrays = tuple(np.zeros((lanes, x.shape[0], width, *x.shape[2:]), x.dtype) for x in state.storage.arrays_LPSx)
        window: Any = jax.tree.map(lambda x: np.zeros((lanes, *x.shape[1:]), x.dtype), state.window)
        last_b, lengths_b = np.zeros((2, lanes), np.int32)
        return Arrival(np.full(lanes, -1, np.int32), np.full((lanes, width), -1, np.int32), arrays, lengths_b, last_b,
                       np.zeros((lanes, config.vocab_size), bool), window)

    def adopt(self, state: ServingState, arrival: Arrival) -> ServingState:
        """The state with rows that have arrived."""
        return self._adopts[arrival.table_bJ.shape[1]](state, self._placed(arrival))

    def idle_chunk(self, size: int, width: int, lanes: int = 1) -> Chunk:
        """Of `size` tokens in each of a device's lanes, and tables of `width` pages; no lane has anything to do."""
        lanes *= self.devices
        start_b, count_b = np.zeros((2, lanes), np.int32)
        return Chunk(np.full(lanes, -1, np.int32), np.full((lanes, size + self.ahead), -1, np.int32), start_b, count_b,
                     np.zeros(lanes, bool), np.full((lanes, width), -1, np.int32))

    def read(self, weights: nnx.State, state: ServingState, chunk: Chunk,
             rows: RowSampling) -> tuple[ServingState, np.ndarray]:
        """Reads a chunk (of NumPy arrays); int32 [b], the token that follows it."""
        lanes, width = chunk.table_bJ.shape
        run = self._reads[lanes // self.devices, chunk.tokens_bX.shape[1] - self.ahead, width]
        state, tokens = run(weights, state, self._placed(chunk), self._placed(rows))
        return state, np.asarray(tokens)

    def step(self, weights: nnx.State, state: ServingState, place_b: np.ndarray, table_bJ: np.ndarray,
             rows: RowSampling) -> tuple[ServingState, np.ndarray, np.ndarray]:
        """A step of some rows, equally many of each device; int32 [b, Q] new tokens and int32 [b], how many each got.

        Args:
          place_b: int32, which of its device's rows; -1 for none.
          table_bJ: int32, the pages of each; -1 for none.
        """
        run = self._steps[len(place_b) // self.devices, table_bJ.shape[1]]
        state, tokens, counts = run(weights, state, *self._placed((place_b, table_bJ)), self._placed(rows))
        return state, np.asarray(tokens), np.asarray(counts)

    def _placed(self, arrays: Any) -> Any:
        return jax.tree.map(self.on_mesh.place, arrays)

    def _nothing(self) -> ServingState:
        config = self.on_mesh.model
        storage = PagedStorage.empty(cached_layers(config, self.on_mesh.speculative), self._pages, self._page_size,
                                     entry_format(config, self.on_mesh.cache))
        zeros = functools.partial(jnp.zeros, dtype=jnp.int32)
        window = None
        if self.ahead:
            size = window_size(config)
            hidden = jnp.zeros((self._rows, size, config.hidden_size), self.on_mesh.activations)
            window = Window(hidden, zeros((self._rows, size)))
        placement = self.on_mesh.placement
        sent = None if placement is None else zeros((self.on_mesh.mesh.size, *placement.expert_LS.shape))
        return ServingState(storage, zeros(self._rows), zeros(self._rows),
                            jnp.zeros((self._rows, config.vocab_size), bool), window, sent)

    def _taken(self, state: ServingState, place_b: jax.Array, table_bJ: jax.Array) -> tuple[Any, Any]:
        def local(arrays: tuple[jax.Array, ...], table_bJ: jax.Array) -> tuple[jax.Array, ...]:
            return tuple(jnp.moveaxis(array[:, table_bJ], 1, 0) for array in arrays)
        arrays = on_each_device(local, (PAGES, ROWS), ROWS)(state.storage.arrays_LPSx, table_bJ)
        return arrays, _rows_of(place_b, state.window)

    def _adopted(self, state: ServingState, arrival: Arrival) -> ServingState:
        pages = self._pages // self.devices

        def local(arrays: tuple[jax.Array, ...], new: tuple[jax.Array, ...],
                  table_bJ: jax.Array) -> tuple[jax.Array, ...]:
            at_bJ = jnp.where(table_bJ < 0, pages, table_bJ)  # outside: dropped
            return tuple(array.at[:, at_bJ].set(jnp.moveaxis(x, 0, 1), mode="drop")
                         for array, x in zip(arrays, new, strict=True))
        arrays = on_each_device(local, (PAGES, ROWS, ROWS), PAGES)(state.storage.arrays_LPSx, arrival.arrays_bLJSx,
                                                                   arrival.table_bJ)
        changed = arrival.lengths_b, arrival.last_b, arrival.seen_bV, arrival.window
        return state.changed(dataclasses.replace(state.storage, arrays_LPSx=arrays), arrival.place_b, changed,
                             state.sent_HLS)

    def _advance(self, weights: nnx.State, state: ServingState, place_b: jax.Array, table_bJ: jax.Array,
                 rows: RowSampling) -> tuple[ServingState, jax.Array, jax.Array]:
        model = nnx.merge(self.on_mesh.structure, weights)
        lengths_b, *others = _rows_of(place_b, state.rows)
        cache = LatentCache(state.storage.of_rows(table_bJ), lengths_b, state.sent_HLS)
        after, tokens_bQ, counts_b = advance(model, DecodeState(cache, *others), place_b >= 0, rows,
                                             self.on_mesh.execution)
        changed = after.cache.lengths_B, after.last_B, after.seen_BV, after.window
        return (state.changed(_without_rows(after.cache), place_b, changed, after.cache.sent_HLS), tokens_bQ, counts_b)

    def _read_chunk(self, weights: nnx.State, state: ServingState, chunk: Chunk,
                    rows: RowSampling) -> tuple[ServingState, jax.Array]:
        model = nnx.merge(self.on_mesh.structure, weights)
        size = chunk.tokens_bX.shape[1] - self.ahead
        tokens_bC, column_C = jnp.maximum(chunk.tokens_bX[:, :size], 0), jnp.arange(size)
        last = jnp.maximum(chunk.count_b - 1, 0)[:, None]
        cache = LatentCache(state.storage.of_rows(chunk.table_bJ), chunk.start_b, state.sent_HLS)
        out = decode(model, tokens_bC, cache, chunk.count_b, self.on_mesh.reading)
        logits_bV = gathered(model.lm_head)(jnp.take_along_axis(out.hidden_BQD, last[..., None], axis=1)[:, 0])
        seen_bV, window = _rows_of(chunk.place_b, (state.seen_RV, state.window))
        # Padding repeats the chunk's first token, which the row has anyway.
        ids_bC = jnp.where(column_C <= last, tokens_bC, tokens_bC[:, :1])
        seen_bV = (seen_bV & ~chunk.first_b[:, None]).at[jnp.arange(len(ids_bC))[:, None], ids_bC].set(True)
        token_b = draw(probabilities(logits_bV, seen_bV, rows), rows.seed, out.cache.lengths_B, TARGET)
        cache = out.cache
        if window is not None:
            cache = _read_ahead(model, out, chunk, self.on_mesh.reading)
            following_bC = chunk.tokens_bX[:, 1:size + 1]
            following_bC = jnp.where(following_bC < 0, token_b[:, None], following_bC)
            window = window_of(jnp.concatenate([window.hidden_BWD, out.mtp_input_BQD], axis=1),
                               jnp.concatenate([window.tokens_BW, following_bC], axis=1), self.ahead + 1,
                               self.ahead + 1 + chunk.count_b)
        changed = (cache.lengths_B, token_b, with_token(seen_bV, token_b), window)
        return state.changed(_without_rows(cache), chunk.place_b, changed, cache.sent_HLS), token_b


def _read_ahead(model: DeepSeekV3, out: CachedOutput, chunk: Chunk, execution: Execution) -> LatentCache:
    """The cache with the prediction modules' entries of a chunk that the main model has read. Those that want tokens
    which are not known yet are computed again by the first step (see `speculative`)."""
    cache, hidden_bCD = out.cache, out.mtp_input_BQD
    size = hidden_bCD.shape[1]
    column_C = jnp.arange(size)
    span = Span(chunk.start_b[:, None] + column_C, column_C < chunk.count_b[:, None], cache.lengths_B, fresh=False)
    for depth in range(1, len(model.mtp) + 1):
        tokens_bC = jnp.maximum(chunk.tokens_bX[:, depth:depth + size], 0)
        hidden_bCD, cache = predict_ahead(model, depth, hidden_bCD, tokens_bC, span, cache, execution)
    return cache


def _without_rows(cache: LatentCache) -> PagedStorage:
    storage: Any = cache.storage
    return storage.of_rows(jnp.zeros((0, 0), jnp.int32))


def _rows_of(place_b: jax.Array, arrays: Any) -> Any:
    """The rows [b, ...] of arrays [R, ...] that lanes name, each among its device's; any row for -1."""
    def local(place_b: jax.Array, arrays: Any) -> Any:
        return jax.tree.map(lambda x: x[jnp.maximum(place_b, 0)], arrays)
    return on_each_device(local, (ROWS, ROWS), ROWS)(place_b, arrays)


def _with_rows(place_b: jax.Array, arrays: Any, new: Any) -> Any:
    """Arrays [R, ...] with the rows that lanes name replaced."""
    def local(place_b: jax.Array, arrays: Any, new: Any) -> Any:
        def put(x: jax.Array, row: jax.Array) -> jax.Array:
            return x.at[jnp.where(place_b < 0, len(x), place_b)].set(row, mode="drop")
        return jax.tree.map(put, arrays, new)
    return on_each_device(local, (ROWS, ROWS, ROWS), ROWS)(place_b, arrays, new)

