"""From any store to live parameters on any mesh, each device reading its own slices; and live parameters as a store."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.interop.names import TensorSpec, published_tensors
from dsv3_jax.interop.store import Bounds, Store, row_blocks
from dsv3_jax.interop.tree import TreeStore
from dsv3_jax.mesh import shardings
from dsv3_jax.nn.model import split_model

Part = tuple[tuple[int, ...], int | None]
"""Of a stacked array: layer and expert, and which half of the last dimension."""
_NO_ROW = np.iinfo(np.int32).max


def load(store: Store, mesh: Mesh, dtype: Any = jnp.float32, allow_different_copies: bool = False,
         say: Callable[[str], None] = print) -> tuple[nnx.State, nnx.State]:
    """(parameters, router biases) of `store`, laid out like a new training state on `mesh`.

    A device's part of an array is assembled on the host from the slices of published tensors that lie in it, and
    handed over before the next is begun. Every process of a run must load; each reads what its devices hold.

    Args:
      dtype: of the parameters; float8 is multiplied by its scales in float32 first. Norms, routers and biases are
        float32 whatever it is, as in training.
      allow_different_copies: go on, with a line to `say`, if a prediction module's copy of embedding or head differs
        from the main one. The main one is used: the model here holds it once.

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

    def fill(state: nnx.State) -> nnx.State:
        def one(path: Any, variable: nnx.Variable, sharding: nnx.Variable) -> nnx.Variable:
            parts = by_path.get(jax.tree_util.keystr(path, simple=True, separator="/"), {})
            shape = variable.get_value().shape
            kind = jnp.float32 if variable.get_metadata("float32", True) else dtype
            return variable.replace(_on_devices(
                shape, sharding.get_value(), lambda bounds: _assemble(store, parts, shape, bounds).astype(kind)))
        return jax.tree_util.tree_map_with_path(one, state, shardings(state, mesh),
                                                is_leaf=lambda x: isinstance(x, nnx.Variable))
    return fill(params), fill(router_bias)


def _on_devices(shape: tuple[int, ...], sharding: NamedSharding,
                make: Callable[[Bounds], np.ndarray]) -> jax.Array:
    """The array whose slices `make` gives; one slice at a time is on the host, also where devices hold the same."""
    devices: dict[Bounds, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        values = make(bounds)
        arrays += [jax.device_put(values, device) for device in holders]
        jax.block_until_ready(arrays[-len(holders):])
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _assemble(store: Store, parts: Mapping[Part, TensorSpec], shape: tuple[int, ...], bounds: Bounds) -> np.ndarray:
    """float32: the slice of one of our arrays. Without published parts (the bias of V2's routers) it is zero."""
    out = np.zeros([last - first for first, last in bounds], np.float32)
    for (index, half), spec in parts.items():
        lead, inner = bounds[:len(index)], bounds[len(index):]
        if not all(first <= i < last for i, (first, last) in zip(index, lead, strict=True)):
            continue
        offset = 0 if half is None else half * spec.shape[0]
        width = shape[-1] if half is None else spec.shape[0]
        first, last = max(inner[-1][0], offset), min(inner[-1][1], offset + width)
        if first >= last:
            continue
        ours = (*inner[:-1], (first - offset, last - offset))
        target = out[tuple(i - start for i, (start, _) in zip(index, lead, strict=True))]
        _copy(store, spec, ours, target[..., first - inner[-1][0]:last - inner[-1][0]])
    return out


def _copy(store: Store, spec: TensorSpec, ours: Bounds, out: np.ndarray) -> None:
    """Reads the slice `ours` of our [in, out] matrix, or vector, from its published tensor into `out`, by blocks."""
    theirs = ours[::-1] if spec.place.transposed else ours
    (begin, end), *columns = theirs
    rest = tuple(slice(*span) for span in columns)
    for rows in row_blocks((end - begin, *spec.shape[1:])):
        values = store.read_float32(spec, (slice(begin + rows.start, begin + rows.stop), *rest))
        if spec.place.transposed:
            out[:, rows] = values.T
        else:
            out[rows] = values


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

