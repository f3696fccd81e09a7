"""The mesh is the hardware, and this is the only table from logical axes to mesh axes.

Mesh axes, slowest first:

    pipe       pipeline stages
    data       replicas of the expert-parallel group
    scale_out  nodes or slices, joined by the slow network (InfiniBand, DCN)
    scale_up   devices of one node or slice, joined by the fast network (NVLink, ICI)
    context    neighbours among those that share a sequence, each with its stretch of it

A batch is split over data, scale_out and scale_up alike, and the sequences themselves over context. Experts are split
over (scale_out, scale_up, context), so the groups of the node-limited router are the scale_out index; scale_up and
context together are one fast domain, or a part of it. No tensor parallelism (paper 1, section 4.2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import BatchConfig, ConfigError, MeshConfig

AXES = ("pipe", "data", "scale_out", "scale_up", "context")
BATCH_AXES = ("data", "scale_out", "scale_up")
FAST_AXES = ("scale_up", "context")
EXPERT_AXES = ("scale_out", *FAST_AXES)
TOKENS = PartitionSpec(BATCH_AXES, "context")
"""An array [B, T, ...] whose tokens are spread over all devices."""
DEVICES = PartitionSpec((*BATCH_AXES, "context"))
"""An array [devices, ...] of which each device has one part."""

# Logical axis -> mesh axes. `STORAGE` lays out master weights and optimizer state: every dimension offers itself, the
# first that divides takes an axis (ZeRO). `COMPUTE` lays out weights while they are used: only experts stay apart.
# The slowest network is the minor axis of storage, so that `gather_for_compute` can bring the small parts over it first
# and the whole over the fast one. Ranks of a pipeline store parts of all layers, and none has layers of its own until
# a step lays them out: what is stored does not depend on the schedule.
SPREAD = (*FAST_AXES, "scale_out", "data")
COMPUTE: dict[str, tuple[str, ...]] = {"expert": EXPERT_AXES}
STORAGE: dict[str, tuple[str, ...]] = COMPUTE | {
    name: ("pipe", *SPREAD) for name in ("embed", "vocab", "heads", "latent", "mlp")}


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes of `AXES`; data, where it is None, takes the devices that the others leave."""
    data = config.data or max(1, devices // (config.pipe * config.expert_parallel))
    return config.pipe, data, config.scale_out, config.scale_up, config.context


def fast_domain(device: Any) -> int:
    """Which group of devices joined by the fast network `device` is in: its slice as JAX tells it (of TPUs, or of GPU
    hosts that share NVLink), or else its host."""
    slice_index = getattr(device, "slice_index", None)
    if slice_index is None:
        return 0 if device.platform == "tpu" else device.process_index
    return slice_index


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None,
              domain_of: Callable[[Any], int] = fast_domain) -> Mesh:
    """The mesh of `config` over `devices` (default: all), with scale_up and context inside one fast domain.

    Args:
      domain_of: the fast domain of a device.

    Raises:
      ConfigError: too few devices, devices left over, scale_up*context that straddles fast domains, or a transport that
        these devices do not have.
    """
    devices = jax.devices() if devices is None else list(devices)
    if config.transport == "ragged" and devices[0].platform == "cpu":
        raise ConfigError("mesh.transport (ragged) needs what XLA for CPU has not, a ragged all-to-all: use padded")
    shape = mesh_shape(config, len(devices))
    needed = math.prod(shape)
    product = f"mesh {'*'.join(AXES)} ({'*'.join(map(str, shape))}={needed})"
    if needed > len(devices):
        raise ConfigError(
            f"{product} needs more than the {len(devices)} {devices[0].platform} device(s) found: make an axis smaller"
            + (f", or add --mesh.simulate-devices {needed} to split the CPU" if devices[0].platform == "cpu" else ""))
    if needed < len(devices):
        raise ConfigError(f"{product} leaves {len(devices) - needed} of {len(devices)} devices idle: leave mesh.data "
                          "unset, or make the axes' product equal the number of devices")
    return Mesh(_arrange(devices, shape, domain_of), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(devices: Sequence[Any], shape: tuple[int, ...],
             domain_of: Callable[[Any], int] = fast_domain) -> np.ndarray:
    domains: dict[int, list[Any]] = {}
    for device in sorted(devices, key=lambda d: (domain_of(d), d.id)):
        domains.setdefault(domain_of(device), []).append(device)
    size = len(devices) // len(domains)
    if any(len(members) != size for members in domains.values()):
        raise ConfigError(f"fast domains (hosts or slices) have unequal sizes "
                          f"{sorted(len(members) for members in domains.values())}: use equal hosts")
    # Domains are spent on the slow axes first: scale_out, then data, then pipe.
    outer, left = [1] * len(shape), len(domains)
    for axis in (2, 1, 0):
        outer[axis] = math.gcd(shape[axis], left)
        left //= outer[axis]
    if left != 1:
        up, context = shape[3:]
        fast = f"mesh.scale_up ({up})"
        if context > 1:
            fast = f"mesh.scale_up*mesh.context ({up}*{context}={up * context})"
        raise ConfigError(f"{fast} does not fit inside one fast domain of {size} devices: make it divide {size}")
    inner = tuple(whole // out for whole, out in zip(shape, outer, strict=True))
    blocks = np.empty(tuple(outer), dtype=object)
    for index, members in zip(np.ndindex(*outer), domains.values(), strict=True):
        on_torus = members[0].platform == "tpu"
        blocks[index] = (mesh_utils.create_device_mesh(inner, members, allow_split_physical_axes=True) if on_torus
                         else np.array(members, dtype=object).reshape(inner))
    return np.block(blocks.tolist())


def partition_spec(axes: Sequence[str], shape: Sequence[int], table: dict[str, tuple[str, ...]],
                   mesh: Any) -> PartitionSpec:
    """How a value of `shape` with logical `axes` is laid out on `mesh` by `table`.

    A value with one more dimension than names is a stack of layers. Each dimension takes the longest run of its mesh
    axes that are still free and whose product divides it; what does not divide stays whole.
    """
    names = ("layer", *axes) if len(shape) == len(axes) + 1 else tuple(axes)
    if len(names) != len(shape):
        raise ValueError(f"axes {tuple(axes)} do not name the dimensions of shape {tuple(shape)}")
    used: set[str] = set()
    spec: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        taken: list[str] = []
        for axis in table.get(name, ()):
            share = mesh.shape[axis]
            if axis not in used and share > 1 and size % (share * math.prod(mesh.shape[a] for a in taken)) == 0:
                taken.append(axis)
        used.update(taken)
        spec.append(tuple(taken) or None)
    return PartitionSpec(*spec)


def shardings(state: Any, mesh: Mesh | AbstractMesh, table: dict[str, tuple[str, ...]] = STORAGE) -> Any:
    """`NamedSharding`s for a tree of `nnx.Variable`s, each with `axes` metadata; the same tree structure.

    A value may be several arrays with these axes, as float8 and its scales; each is laid out for its own shape.
    """
    def one(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata("axes")
        return variable.replace(jax.tree.map(
            lambda x: NamedSharding(mesh, partition_spec(axes, x.shape, table, mesh)), variable.get_value()))
    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Parts that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch: BatchConfig, mesh: Mesh, dual: bool = False) -> None:
    """Raises `ConfigError` unless a micro-batch divides over the devices, and each one's part in two if `dual`."""
    shards = batch_shards(mesh)
    if batch.micro_batch % shards:
        raise ConfigError(
            f"batch.sequences/batch.micro_batches ({batch.sequences}/{batch.micro_batches}={batch.micro_batch}) must "
            f"be divisible by the {shards} devices that share a batch (the mesh's data*scale_out*scale_up): change "
            "batch.sequences, batch.micro_batches or the mesh (with mesh.context, devices share a sequence)")
    if dual and batch.micro_batch % (2 * shards):
        raise ConfigError(
            f"mesh.dual needs an even number of sequences on each device, and batch.sequences/batch.micro_batches "
            f"({batch.sequences}/{batch.micro_batches}={batch.micro_batch}) is {batch.micro_batch // shards} on each "
            f"of {shards}: make batch.sequences a multiple of {2 * shards * batch.micro_batches}, or change the mesh")


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of an array whose dimension number `leading` is the batch."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))


def context_size() -> int:
    """Devices that share a sequence on the mesh in use; 1 outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["context"]


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps `x` [B, T, ...] split over all devices, its rows over the batch axes and T, if it divides, over context;
    nothing where there is one device, or one device's part."""
    if is_one_device():
        return x
    return jax.lax.with_sharding_constraint(x, _spec_of_tokens(x))


def _spec_of_tokens(x: jax.Array) -> PartitionSpec:
    divides = x.ndim > 1 and x.shape[1] % context_size() == 0
    return TOKENS if divides else PartitionSpec(BATCH_AXES)


COMPILER_OPTIONS: dict[str, dict[str, bool | int]] = {
    # An all-to-all of a slice would be waited for; and a tenth of those that are not would end before their products.
    "tpu": {"xla_tpu_enable_async_all_to_all": True, "xla_tpu_use_aggressive_scheduling": True},
    # A pipeline's transfers are four permutations, which would run one by one. The scheduler would stay below 76% of
    # the memory, and compute things twice for that: it may use 92%. XLA has no estimate of a ragged exchange's time,
    # and with one in the program would use another scheduler, which hides nothing.
    "gpu": {"xla_gpu_experimental_parallel_collective_overlap_limit": 4, "xla_gpu_memory_limit_slop_factor": 115,
            "xla_gpu_enable_latency_hiding_scheduler": True}}


def compiler_options(mesh: Mesh) -> dict[str, bool | int]:
    """For programs whose exchanges are to run beside computing."""
    return COMPILER_OPTIONS.get(mesh.devices.flat[0].platform, {})


def on_each_device(function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`function` of one device's parts, run by every device of the mesh in use (`jax.shard_map`); without a mesh, or on
    one device, `function` itself.

    What enters whole, such as weights, has its gradient summed over the devices: hence check_vma is off.
    """
    if is_one_device():
        return function
    return jax.shard_map(function, axis_names=_automatic_axes(), in_specs=in_specs, out_specs=out_specs,
                         check_vma=False)


def _automatic_axes() -> set[str]:
    mesh = jax.sharding.get_abstract_mesh()
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}


def is_one_device() -> bool:
    """Whether the code that is traced sees one device's part only: no mesh, a mesh of one, or inside a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1 or not _automatic_axes()


def copy_for_each_device(state: Any) -> Any:
    """`state` with a leading dimension, one copy for each device, to enter `on_each_device` by PartitionSpec(SPREAD).

    The gradient of what enters whole is summed there by an all-reduce, always. That of copies is summed by the
    partitioner, which makes it a reduce-scatter where the gradient is stored spread, in the same order of axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in SPREAD)

    def one(x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(jnp.broadcast_to(x, (devices, *x.shape)), PartitionSpec(SPREAD))
    return jax.tree.map(one, state)


def on_own_tokens(function: Callable[[Any, jax.Array], jax.Array], weight: Any, x_BTD: jax.Array) -> jax.Array:
    """`function(weight, tokens)` by each device for its part of x [B, T, ...], which the result is split as.

    The gradient of the weight is summed as its storage asks, see `copy_for_each_device`.
    """
    if is_one_device():
        return function(weight, x_BTD)
    spec = _spec_of_tokens(x_BTD)

    def local(copy: Any, x_BTD: jax.Array) -> jax.Array:
        return function(jax.tree.map(lambda leaf: leaf[0], copy), x_BTD)
    return on_each_device(local, (PartitionSpec(SPREAD), spec), spec)(copy_for_each_device(weight), x_BTD)


def gather_for_compute(state: Any) -> Any:
    """`state` (variables with `axes` metadata) laid out for use; gradients go back in the storage layout.

    The forward all-gathers what ZeRO spread, one mesh axis after the other: slow networks first, while the parts are
    small. (XLA:TPU would turn one gather over all dimensions of a torus into an all-reduce, of twice the bytes.) The
    backward asks for the spread layout at once, so that the compiler emits a reduce-scatter where it can rather than an
    all-reduce and a slice.
    """
    if is_one_device():
        return state
    mesh = jax.sharding.get_abstract_mesh()

    def one(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata("axes")

        def laid_out(x: jax.Array) -> jax.Array:
            compute, storage = (partition_spec(axes, x.shape, table, mesh) for table in (COMPUTE, STORAGE))
            return _relayout(x, (*_gather_steps(storage, compute), compute), storage)
        return variable.replace(jax.tree.map(laid_out, variable.get_value()))
    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def keep_for_compute(state: Any) -> Any:
    """`gather_for_compute`'s result as what is stored from now on: its axes that only `STORAGE` splits lose their
    names, so that to gather it again is to do nothing. Otherwise each use would split it and gather it anew."""
    def one(variable: nnx.Variable) -> nnx.Variable:
        axes = tuple(name if name in COMPUTE else "whole" for name in variable.get_metadata("axes"))
        return variable.replace(variable.get_value(), axes=axes)
    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def axes_of(axes: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a `PartitionSpec`, which may be None, a name or several."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _gather_steps(storage: PartitionSpec, compute: PartitionSpec) -> Iterator[PartitionSpec]:
    """The layouts between storage and compute: `storage` without pipe, then without data, then without scale_out
    either, as far as `compute` does not use them."""
    used = {axis for axes in compute for axis in axes_of(axes)}
    spec = [axes_of(axes) for axes in storage]
    for axis in ("pipe", "data", "scale_out"):
        if axis not in used and any(axis in axes for axes in spec):
            spec = [tuple(name for name in axes if name != axis) for axes in spec]
            yield PartitionSpec(*(axes or None for axes in spec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _relayout(x: jax.Array, forward: tuple[PartitionSpec, ...], backward: PartitionSpec) -> jax.Array:
    for spec in forward:
        x = jax.lax.with_sharding_constraint(x, spec)
    return x


_relayout.defvjp(lambda x, forward, backward: (_relayout(x, forward, backward), None),
                 lambda forward, backward, _, g: (jax.lax.with_sharding_constraint(g, backward),))
