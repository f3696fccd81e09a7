"""Picks the backend of the grouped matrix product, and joins it to its gradient."""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import ragged_dot, reference, tiled
from pallas_kernels.targets import nvidia_is_hopper

Backend = Literal["reference", "tiled", "ragged_dot", "hopper", "megablox"]

_HOPPER_NEEDS = "bfloat16, an alignment divisible by 64 that divides the rows, and widths divisible by 128"
_log = logging.getLogger(__name__)


@jax.named_scope("grouped_matmul")
def grouped_matmul(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, *, alignment: int = 1,
                   backend: Backend | None = None) -> jax.Array:
    """rows of group e times weights[e], for every group.

    Args:
      rows_PD: [P, D], sorted by group; rows past the last group are ignored.
      weights_EDF: [E, D, F] of the same dtype.
      group_sizes_E: int32 [E]; a group may be empty. The sum is at most P.
      alignment: a number that divides P and every group size, if the caller padded them so.
      backend: None picks by the platform that the program is compiled for, which need not be the one it is traced on.
        On TPU v5p that is `ragged_dot`, a ragged kernel there. Elsewhere XLA multiplies every row with every group, so
        it is what works tile by tile: on other TPUs JAX's `megablox`, on NVIDIA the Hopper kernels, if they serve the
        shape and card; else a loop over aligned tiles, or over rows where they are fewer than groups. Where none of
        these can, the reference on CPU and `ragged_dot` on accelerators.

    Returns:
      [P, F] in rows' dtype, accumulated in float32; zero past the last group.

    Raises:
      ValueError: `backend` is "hopper" and does not serve the shape, alignment or dtype.
    """
    chex.assert_equal(rows_PD.shape[1], weights_EDF.shape[1])
    chex.assert_equal(rows_PD.dtype, weights_EDF.dtype)
    chex.assert_shape(group_sizes_E, (weights_EDF.shape[0],))
    _, width, inner = weights_EDF.shape
    shape = _Shape(rows_PD.shape[0], weights_EDF.shape[0], width, inner, alignment, rows_PD.dtype)
    if backend == "hopper" and not shape.fits_hopper:
        raise ValueError(f"no Hopper kernel for {shape}: it needs {_HOPPER_NEEDS}; backend=None takes one that serves")
    return _differentiable(rows_PD, weights_EDF, group_sizes_E, shape, backend)


class _Shape(NamedTuple):
    """What the choice of a backend depends on."""

    rows: int
    groups: int
    width: int
    inner: int
    alignment: int
    dtype: jnp.dtype

    @property
    def fits_hopper(self) -> bool:
        """Whether `gpu` computes the product and both gradients."""
        return (self.dtype == jnp.bfloat16 and self.alignment % 64 == 0 and self.rows % self.alignment == 0
                and self.rows > 0 and self.width % 128 == 0 and self.inner % 128 == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _differentiable(rows_PD, weights_EDF, group_sizes_E, shape: _Shape, backend: Backend | None) -> jax.Array:
    return grouped_product(rows_PD, weights_EDF, group_sizes_E, shape, backend)


def _backward(shape, backend, residuals, grads_PF):
    # The choice is made again here rather than differentiated: the derivative of a conditional would save what every
    # branch needs, on every platform.
    rows_PD, weights_EDF, group_sizes_E = residuals
    return (grouped_product(grads_PF, weights_EDF, group_sizes_E, shape, backend, transpose_rhs=True),
            grouped_wgrad(rows_PD, grads_PF, group_sizes_E, shape, backend), None)


_differentiable.defvjp(lambda *operands: (_differentiable(*operands), operands[:3]), _backward)


# Both are calls of their own, so that `expert_parallel.operations` sees one product in each, whatever the backend.

@functools.partial(jax.jit, static_argnames=("shape", "backend", "transpose_rhs"), inline=True)
def grouped_product(rows_PD: jax.Array, weights_EDF: jax.Array, group_sizes_E: jax.Array, shape: _Shape,
                    backend: Backend | None, transpose_rhs: bool = False) -> jax.Array:
    """rows of group e times weights[e], or times its transpose."""
    def run(name: Backend, *operands: jax.Array) -> jax.Array:
        return _module(name).product(*operands, shape.alignment, transpose_rhs=transpose_rhs)
    return _dispatch(run, shape, backend, rows_PD, weights_EDF, group_sizes_E)


@functools.partial(jax.jit, static_argnames=("shape", "backend"), inline=True)
def grouped_wgrad(rows_PD: jax.Array, grads_PF: jax.Array, group_sizes_E: jax.Array, shape: _Shape,
                  backend: Backend | None) -> jax.Array:
    """x^T dy of each group, [E, D, F], summed in float32 and rounded once to rows' dtype; zero for an empty group."""
    def run(name: Backend, *operands: jax.Array) -> jax.Array:
        return _module(name).weight_gradient(*operands, shape.alignment)
    return _dispatch(run, shape, backend, rows_PD, grads_PF, group_sizes_E)


def _dispatch(run, shape: _Shape, backend: Backend | None, *operands: jax.Array):
    """`run(name, *operands)` with the backend of that name, or the one that the platform takes."""
    if backend is not None:
        return run(backend, *operands)
    loops = shape.alignment > 1 or shape.rows <= shape.groups
    aligned: Backend | None = "tiled" if loops else None
    on_nvidia: Backend = "hopper" if shape.fits_hopper and nvidia_is_hopper() else aligned or "ragged_dot"
    on_tpu: Backend = ("ragged_dot" if _tpu_is_v5p() else
                       "megablox" if _megablox_serves(shape) else aligned or "ragged_dot")
    if on_nvidia != "hopper":
        _tell_once(shape, on_nvidia)
    return jax.lax.platform_dependent(
        *operands,
        cpu=functools.partial(run, aligned or "reference"),
        cuda=functools.partial(run, on_nvidia),
        default=functools.partial(run, on_tpu))


def _tpu_is_v5p() -> bool:
    """Whether to compile for v5p when compiling for TPU: so says the mesh, or else the TPU at hand."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device if device is not None else jax.devices()[0]).device_kind == "TPU v5"


def _megablox_serves(shape: _Shape) -> bool:
    """Whether `megablox` computes the product and both gradients."""
    return _module("megablox").serves(shape.rows, shape.dtype)


@functools.cache
def _tell_once(shape: _Shape, instead: Backend) -> None:
    """Tracing does not know yet what it is for, so this is a warning only where a GPU is what programs run on."""
    level = logging.WARNING if jax.default_backend() == "gpu" else logging.DEBUG
    _log.log(level, "on NVIDIA GPUs the grouped product of %s takes the slower %r: the kernel needs Hopper, %s", shape,
             instead, _HOPPER_NEEDS)


def _module(backend: Backend) -> ModuleType:
    """Each has `product(rows, weights, group_sizes, alignment, transpose_rhs=False)` and `weight_gradient(rows, grads,
    group_sizes, alignment)`."""
    if backend == "hopper":
        from pallas_kernels.grouped_matmul import gpu  # a quarter of a second that a small CPU run need not pay
        return gpu
    if backend == "megablox":
        from pallas_kernels.grouped_matmul import megablox
        return megablox
    return {"reference": reference, "tiled": tiled, "ragged_dot": ragged_dot}[backend]
