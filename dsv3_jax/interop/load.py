"""From any store to live parameters on any mesh, each device reading its own slices; and live parameters as a store."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.interop.float8 import BLOCK, E4M3, scale_shape
from dsv3_jax.interop.names import SCALE, TensorSpec, published_tensors
from dsv3_jax.interop.store import Bounds, Store, row_blocks
from dsv3_jax.interop.tree import TreeStore
from dsv3_jax.mesh import shardings
from dsv3_jax.nn.model import split_model
from dsv3_jax.precision.quantised import Quantised
from dsv3_jax.precision.recipe import in_float8

Part = tuple[tuple[int, ...], int | None]
"""Of a stacked array: layer and expert, and which half of the last dimension."""
Piece = tuple[np.ndarray, tuple[int, ...]]
"""Values, and where they start in the slice they belong to."""
Reader = Callable[[int, TensorSpec, Bounds], np.ndarray]
"""(which of a variable's arrays, published tensor, what of it as ours lies) -> values."""
HOST_BYTES = 2 ** 26
"""Of an array, what a device holds is put together on the host if it is no more, since each array's shape wants a
program on each device otherwise."""
_NO_ROW = np.iinfo(np.int32).max


def load(store: Store, mesh: Mesh, dtype: Any = jnp.float32, allow_different_copies: bool = False,
         float8: bool = False, say: Callable[[str], None] = print) -> tuple[nnx.State, nnx.State]:
    """(parameters, router biases) of `store`, laid out like a new training state on `mesh`.

    Published tensors go to the devices one by one, of each the slices that a device holds, so the host needs room for
    one in `dtype`, and HOST_BYTES. Every process of a run must load; each reads what its devices hold.

    Args:
      dtype: of the parameters; float8 is multiplied by its scales in float32 first. Norms, routers and biases are
        float32 whatever it is, as in training.
      allow_different_copies: go on, with a line to `say`, if a prediction module's copy of embedding or head differs
        from the main one. The main one is used: the model here holds it once.
      float8: keep float8 for what `precision.recipe.inference_weights` would make float8, codes and scales as stored.

    Raises:
      ConfigError: a tensor is missing, extra, misshapen, unreadable or not finite, or copies differ.
    """
    specs = published_tensors(store.config, store.format())
    _check_copies(store, specs, allow_different_copies, say)
    by_path: dict[str, dict[Part, TensorSpec]] = {}
    for spec in specs:
        if spec.copy_of is None and spec.scale_of is None:
            by_path.setdefault(spec.place.path, {})[spec.place.at, spec.place.half] = spec
    params, router_bias = jax.eval_shape(lambda: split_model(store.config)[1:])

    def one(path: Any, variable: nnx.Variable) -> nnx.Variable:
        parts = by_path.get(jax.tree_util.keystr(path, simple=True, separator="/"), {})
        if float8 and variable.get_metadata("float8", False) and _stored_in_blocks(parts):
            return _load_float8(store, parts, variable, mesh)
        kind = jnp.float32 if variable.get_metadata("float32", True) else dtype
        wanted = variable.replace(jax.ShapeDtypeStruct(variable.get_value().shape, kind))
        return _load_variable(parts, wanted, mesh, lambda _, spec, ours: _read(store, spec, ours, kind), half_axis=-1)

    def fill(state: nnx.State) -> nnx.State:
        return jax.tree_util.tree_map_with_path(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return fill(params), fill(router_bias)


def _stored_in_blocks(parts: Mapping[Part, TensorSpec]) -> bool:
    """Whether the stored blocks are those of our array: two halves side by side must meet between blocks."""
    return all(spec.dtype == E4M3 and (half is None or spec.shape[0] % BLOCK == 0)
               for (_, half), spec in parts.items())


def _load_float8(store: Store, parts: Mapping[Part, TensorSpec], variable: nnx.Variable, mesh: Mesh) -> nnx.Variable:
    """The variable as `inference_weights` has it. Published matrices are the transposes it asks for."""
    *leading, width_in, width_out = variable.get_value().shape
    matrix = width_out, width_in
    values: Any = jax.ShapeDtypeStruct((*leading, *matrix), jnp.float8_e4m3fn)
    scales: Any = jax.ShapeDtypeStruct((*leading, *scale_shape(matrix)), jnp.float32)
    wanted = in_float8(variable, Quantised(values, scales, (BLOCK, BLOCK)))

    def read(leaf: int, spec: TensorSpec, ours: Bounds) -> np.ndarray:
        return store.read(spec.name + ("" if leaf == 0 else SCALE), tuple(slice(*span) for span in ours))
    return _load_variable(parts, wanted, mesh, read, half_axis=-2)


def _load_variable(parts: Mapping[Part, TensorSpec], wanted: nnx.Variable, mesh: Mesh, read: Reader,
                   half_axis: int) -> nnx.Variable:
    """`wanted`, whose value says shapes and dtypes, with what `read` gives for each of its arrays."""
    leaves, structure = jax.tree.flatten(wanted.get_value())
    layouts = jax.tree.leaves(shardings(nnx.State({"": wanted}), mesh))
    arrays = []
    for i, (leaf, layout) in enumerate(zip(leaves, layouts, strict=True)):
        pieces = functools.partial(_pieces, parts, leaf.shape, half_axis, functools.partial(read, i))
        arrays.append(_on_devices(leaf, layout, pieces))
    return wanted.replace(jax.tree.unflatten(structure, arrays))


def _on_devices(wanted: jax.ShapeDtypeStruct, sharding: NamedSharding,
                pieces: Callable[[Bounds], Iterator[Piece]]) -> jax.Array:
    """The array made of `pieces` (of a slice); without pieces it is zero, like the bias of V2's routers."""
    devices: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(wanted.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), wanted.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        shape = tuple(last - first for first, last in bounds)
        assemble = _on_host if math.prod(shape) * wanted.dtype.itemsize <= HOST_BYTES else _piece_by_piece
        arrays += jax.block_until_ready(assemble(shape, wanted.dtype, holders, pieces(bounds)))
    return jax.make_array_from_single_device_arrays(wanted.shape, sharding, arrays)


def _on_host(shape: tuple[int, ...], dtype: Any, holders: list[jax.Device], pieces: Iterator[Piece]) -> list[jax.Array]:
    whole = np.zeros(shape, dtype)
    for values, starts in pieces:
        lead = len(shape) - values.ndim
        whole[starts[:lead]][tuple(slice(start, start + size) for start, size
                                   in zip(starts[lead:], values.shape, strict=True))] = values
    return [jax.device_put(whole, device) for device in holders]


def _piece_by_piece(shape: tuple[int, ...], dtype: Any, holders: list[jax.Device],
                    pieces: Iterator[Piece]) -> list[jax.Array]:
    arrays = [jnp.zeros(shape, dtype, device=device) for device in holders]
    for values, starts in pieces:
        block = values.reshape((1,) * (len(shape) - values.ndim) + values.shape)
        arrays = [_placed(array, jax.device_put(block, device), starts)
                  for array, device in zip(arrays, holders, strict=True)]
        jax.block_until_ready(arrays)  # or the host would hold more than one
    return arrays


@functools.partial(jax.jit, donate_argnums=0)
def _placed(array: jax.Array, values: jax.Array, starts: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, values, starts)


def _pieces(parts: Mapping[Part, TensorSpec], shape: tuple[int, ...], half_axis: int,
            read: Callable[[TensorSpec, Bounds], np.ndarray], bounds: Bounds) -> Iterator[Piece]:
    """What of each published tensor lies in a slice of one of our arrays, and where in the slice."""
    for (index, half), spec in parts.items():
        lead, inner = bounds[:len(index)], list(bounds[len(index):])
        if not all(first <= i < last for i, (first, last) in zip(index, lead, strict=True)):
            continue
        starts = [0] * len(inner)
        if half is not None:
            width = shape[half_axis] // 2
            (first, last), offset = inner[half_axis], half * width
            inner[half_axis] = (max(first - offset, 0), min(last - offset, width))
            starts[half_axis] = max(offset - first, 0)
        if all(first < last for first, last in inner):
            at = [i - first for i, (first, _) in zip(index, lead, strict=True)]
            yield read(spec, tuple(inner)), (*at, *starts)


def _read(store: Store, spec: TensorSpec, ours: Bounds, dtype: Any) -> np.ndarray:
    """The slice `ours` of our [in, out] matrix, or vector, from its published tensor, by blocks."""
    theirs = ours[::-1] if spec.place.transposed else ours
    (begin, end), *columns = theirs
    rest = tuple(slice(*span) for span in columns)
    out = np.empty([last - first for first, last in ours], dtype)
    for rows in row_blocks((end - begin, *spec.shape[1:])):
        values = store.read_float32(spec, (slice(begin + rows.start, begin + rows.stop), *rest))
        if spec.place.transposed:
            out[:, rows] = values.T
        else:
            out[rows] = values
    return out


def _check_copies(store: Store, specs: tuple[TensorSpec, ...], allow: bool, say: Callable[[str], None]) -> None:
    """Compares repeated tensors with the main ones."""
    copies = [spec for spec in specs if spec.copy_of is not None]
    for spec, row in zip(copies, _first_differences(store, copies), strict=True):
        if row == _NO_ROW:
            continue
        message = (f"{store.where}: tensor {spec.name} differs from {spec.copy_of} (first in row {row}), and the model "
                   "here holds it once")
        if not allow:
            raise ConfigError(f"{message}: fetch the model again, or allow it, to use {spec.copy_of} for both")
        say(f"WARNING: {message}; using {spec.copy_of} for both")


def _first_differences(store: Store, copies: list[TensorSpec]) -> np.ndarray:
    """int32: the first row of each that is not as in the main tensor, or _NO_ROW.

    The processes of a run share the rows, and tell each other: if one stopped alone, the others would wait for it.
    """
    first = np.full(len(copies), _NO_ROW, np.int32)
    for i, spec in enumerate(copies):
        for rows in itertools.islice(row_blocks(spec.shape), jax.process_index(), None, jax.process_count()):
            copy, main = store.read(spec.name, (rows,)), store.read(str(spec.copy_of), (rows,))
            different = np.flatnonzero((copy != main).any(axis=tuple(range(1, copy.ndim))))
            if len(different):
                first[i] = rows.start + different[0]
                break
    return multihost_utils.process_allgather(first).min(axis=0) if jax.process_count() > 1 and copies else first


class LiveWeights(TreeStore):
    """Parameters in memory as published tensors, for `convert`; see `Store`."""

    def __init__(self, config: ModelConfig, params: nnx.State, router_bias: nnx.State, bos: int | None = None,
                 eos: int | None = None, companions: tuple[Path, ...] = ()):
        """Takes hold of `params` and `router_bias`, on any mesh of this process.

        Raises:
          ConfigError: other processes hold a part of them.
        """
        self.where, self.config, self.companions = Path("(parameters in memory)"), config, companions
        leaves = itertools.chain(*(jax.tree_util.tree_leaves_with_path(
            state, is_leaf=lambda x: isinstance(x, nnx.Variable)) for state in (params, router_bias)))
        self._leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): variable.get_value()
                        for path, variable in leaves}
        for path, value in self._leaves.items():
            if not value.is_fully_addressable:
                raise ConfigError(f"parameter {path} is spread over several processes: save a checkpoint, and convert "
                                  "the run folder with experiments/convert_checkpoint.py")
        self.bos, self.eos = bos, eos
        self._offer()

    def _leaf(self, spec: TensorSpec, bounds: Bounds) -> np.ndarray:
        """Gathers the slice from the devices that hold pieces of it; no device and no host sees the whole array."""
        value = self._leaves[spec.place.path]
        out = np.empty([last - first for first, last in bounds], np.float32)
        for shard in value.addressable_shards:
            if shard.replica_id:
                continue
            held = tuple(part.indices(size)[:2] for part, size in zip(shard.index, value.shape, strict=True))
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(held, bounds, strict=True))
            if any(first >= last for first, last in common):
                continue
            starts = tuple(first - base for (first, _), (base, _) in zip(common, held, strict=True))
            sizes = tuple(last - first for first, last in common)
            inside = tuple(slice(first - base, last - base)
                           for (first, last), (base, _) in zip(common, bounds, strict=True))
            out[inside] = _slice_of_shard(shard.data, starts, sizes)
        return out


def _slice_of_shard(x: jax.Array, starts: tuple[int, ...], sizes: tuple[int, ...]) -> np.ndarray:
    """A slice of what one device holds. A CPU's arrays are seen in place, without a program for every shape."""
    if next(iter(x.devices())).platform == "cpu":
        return np.asarray(x)[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]
    return np.asarray(_sliced(x, starts, sizes))


@functools.partial(jax.jit, static_argnums=2)
def _sliced(x: jax.Array, starts: tuple[int, ...], sizes: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(x, starts, sizes).astype(jnp.float32)

