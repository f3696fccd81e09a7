"""y = x W and its gradients, for one matrix or for the matrices of experts, in the precision of a recipe.

In float8 the backward is not the derivative of the forward's arithmetic: quantisation counts as the identity, and each
of the three products reads operands quantised for it (paper 2, figure 6 and section 3.3.2).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.precision.accumulator import hopper_grouped_matmul, hopper_grouped_wgrad, hopper_matmul
from dsv3_jax.precision.deferral import later
from dsv3_jax.precision.quantised import BLOCK, COLUMN, ROW, Carried, Quantised, QuantisedE5M6
from dsv3_jax.precision.recipe import Cast, LinearRecipe
from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.fp8_wgrad import fp8_wgrad
from pallas_kernels.grouped_fp8_matmul import grouped_fp8_matmul, grouped_fp8_wgrad
from pallas_kernels.grouped_matmul import grouped_matmul

GROUP_ALIGNMENT = 128
"""Rows of a group in float8 are a multiple of this, so that no tile of 128 rows has two groups."""


Weight = jax.Array | Quantised
"""[K, N] of x's dtype, or [E, K, N] with groups. For inference, and only with a recipe, its transpose in float8."""


def linear(x_MK: jax.Array | Carried, weight: Weight, recipe: LinearRecipe | None, *, keep: str | None = None,
           group_sizes_E: jax.Array | None = None, alignment: int = 1) -> jax.Array:
    """[M, K] -> [M, N] in x's dtype.

    Args:
      x_MK: rows; of groups, sorted by group. They may be in float8 already, as the recipe's `input` makes them, if the
        recipe keeps that.
      weight: see `Weight`.
      recipe: None: in x's dtype.
      keep: name for what the backward needs of x, for a policy of recomputation.
      group_sizes_E: int32 [E], rows of each group, multiples of `alignment`; rows past them are ignored and give zero.
      alignment: a multiple of GROUP_ALIGNMENT where there are a recipe and groups.

    Raises:
      TypeError: rows in float8 that the recipe does not keep, or a weight in float8 without a recipe.
    """
    _check_float8(x_MK, weight, recipe, swiglu=False)
    if recipe is not None:
        return _run(x_MK, weight, None, group_sizes_E, _Static(recipe, keep, alignment, swiglu=False))
    return _plain(_named(x_MK, keep), weight, group_sizes_E, alignment)


def swiglu_linear(gate_up_M2K: jax.Array, weight: Weight, recipe: LinearRecipe | None, *,
                  scale_M: jax.Array | None = None, keep: str | None = None, group_sizes_E: jax.Array | None = None,
                  alignment: int = 1) -> jax.Array:
    """`linear` of silu(gate) * up, the halves of [M, 2K]. The backward computes SwiGLU again from what it keeps.

    `scale_M`, float32, multiplies rows before the product. As weights of experts it is cheaper there than after it: the
    backward needs no outputs, and gradients of outputs reach the products as they were sent.

    Raises:
      TypeError: rows in float8, or a weight in float8 without a recipe.
    """
    _check_float8(gate_up_M2K, weight, recipe, swiglu=True)
    if recipe is not None:
        return _run(gate_up_M2K, weight, scale_M, group_sizes_E, _Static(recipe, keep, alignment, swiglu=True))
    return _plain(_scaled(swiglu(_named(gate_up_M2K, keep)), scale_M), weight, group_sizes_E, alignment)


def swiglu(gate_up: jax.Array) -> jax.Array:
    """[..., 2F] -> [..., F]: silu(gate) * up, with the gate in the first half."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _scaled(x_MK: jax.Array, scale_M: jax.Array | None) -> jax.Array:
    return x_MK if scale_M is None else (x_MK.astype(jnp.float32) * scale_M[:, None]).astype(x_MK.dtype)


def _check_float8(x: jax.Array | Carried, weight: Weight, recipe: LinearRecipe | None, *, swiglu: bool) -> None:
    """Raises `TypeError` for an operand in float8 that is not read so."""
    if isinstance(weight, Quantised) and recipe is None:
        raise TypeError("weight (Quantised) is in float8, and recipe (None) reads none: give a recipe, or "
                        "weight.transposed.dequantise(dtype)")
    if isinstance(x, Carried) and swiglu:
        raise TypeError("gate_up_M2K (Carried) is in float8, which SwiGLU does not read: give it in bf16 or float32")
    if isinstance(x, Carried) and (recipe is None or recipe.kept != "input"):
        found = "recipe (None)" if recipe is None else f"recipe.kept ({recipe.kept!r})"
        raise TypeError(f"x_MK (Carried) is in float8, and {found} does not keep that: give a recipe whose kept is "
                        "'input', or x_MK in bf16 or float32")


def _multiply(x_MK: jax.Array, weight: Any, group_sizes_E: jax.Array | None, alignment: int) -> jax.Array:
    """In x's dtype; nothing is in float8."""
    if group_sizes_E is None:
        return x_MK @ weight
    return grouped_matmul(x_MK, weight, group_sizes_E, alignment=alignment)


_plain = jax.custom_vjp(_multiply, nondiff_argnums=(3,))


def _plain_backward(alignment: int, saved: tuple, grads_MN: jax.Array) -> tuple:
    """The usual gradients; that of the weight from marked values, see `deferral`."""
    x_MK, weight, group_sizes_E = saved
    (d_x,) = jax.vjp(lambda x: _multiply(x, weight, group_sizes_E, alignment), x_MK)[1](grads_MN)
    x_MK, grads_MN = later((x_MK, grads_MN))
    if group_sizes_E is None:
        # JAX's own would be the transpose of y^T x, for which XLA on CPU has a bf16 product that sums in bf16.
        tokens = tuple(range(x_MK.ndim - 1))
        return d_x, jax.lax.dot_general(x_MK, grads_MN, ((tokens, tokens), ((), ()))), None
    (d_weight,) = jax.vjp(lambda w: _multiply(x_MK, w, group_sizes_E, alignment), weight)[1](grads_MN)
    return d_x, d_weight, None


_plain.defvjp(lambda *operands: (_multiply(*operands), operands[:3]), _plain_backward)


def _named(x: Any, name: str | None) -> Any:
    return x if name is None else jax.tree.map(lambda leaf: checkpoint_name(leaf, name), x)


class _Static(NamedTuple):
    """What is known when a product is traced."""

    recipe: LinearRecipe
    keep: str | None
    alignment: int
    swiglu: bool


def _run(x: jax.Array | Carried, weight: Weight, scale_M: jax.Array | None, group_sizes_E: jax.Array | None,
         static: _Static) -> jax.Array:
    if not isinstance(weight, Quantised):
        return _quantised(x, weight, scale_M, group_sizes_E, static)
    return _product(_input(x, scale_M, static), weight, group_sizes_E, _type_of(x), static)


def _type_of(x: jax.Array | Carried) -> jnp.dtype:
    return x.carrier.dtype if isinstance(x, Carried) else x.dtype


def _input(x: jax.Array | Carried, scale_M: jax.Array | None, static: _Static) -> Quantised:
    """The operand of the forward product."""
    cast = static.recipe.input
    if isinstance(x, Carried):
        return x.quantised
    if not static.swiglu:
        return _cast(x, cast)
    if cast.tile != ROW:
        return _cast(_scaled(swiglu(x), scale_M), cast)
    operand = Quantised.of_swiglu(x, cast.power_of_two)
    return operand if scale_M is None else Quantised(operand.values, operand.scales * scale_M[:, None], ROW)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _quantised(x: jax.Array | Carried, weight: jax.Array, scale_M: jax.Array | None, group_sizes_E: jax.Array | None,
               static: _Static) -> jax.Array:
    return _forward(x, weight, scale_M, group_sizes_E, static)[0]


def _forward(x: jax.Array | Carried, weight: jax.Array, scale_M: jax.Array | None, group_sizes_E: jax.Array | None,
             static: _Static) -> tuple:
    recipe = static.recipe
    kept: Quantised | QuantisedE5M6
    if isinstance(x, Carried):
        quantised = kept = x.quantised
    elif recipe.kept == "input_of_wgrad" and not static.swiglu:
        quantised, kept = _cast_both(x, recipe.input, recipe.input_of_wgrad)
    else:
        quantised = _input(x, scale_M, static)
        kept = Quantised.of(x, ROW) if static.swiglu else quantised if recipe.kept == "input" else QuantisedE5M6.of(x)
    out = _product(quantised, _cast(weight, recipe.weight).transposed, group_sizes_E, _type_of(x), static)
    return out, (_named(kept, static.keep), isinstance(x, Carried), weight, scale_M, group_sizes_E)


def _backward(static: _Static, saved: tuple, grads_MN: jax.Array) -> tuple:
    kept, carried, weight, scale_M, group_sizes_E = saved
    recipe, dtype = static.recipe, grads_MN.dtype
    if static.swiglu:
        inner, pull = jax.vjp(swiglu, kept.dequantise(dtype))
        kept = _cast_transposed(_scaled(inner, scale_M), recipe.input_of_wgrad)
    elif recipe.kept != "input_of_wgrad":
        kept = _cast_transposed(kept.dequantise(dtype), recipe.input_of_wgrad)
    grads, across = _cast_both(grads_MN, recipe.gradient, recipe.gradient_of_wgrad)
    d_x = _product(grads, _cast(weight, recipe.weight), group_sizes_E, dtype, static)
    kept, across = later((kept, across))
    d_weight = _weight_gradient(kept, across, group_sizes_E, static).astype(weight.dtype)
    d_scale = None
    if static.swiglu:
        if scale_M is not None:
            d_scale = jnp.sum(d_x.astype(jnp.float32) * inner.astype(jnp.float32), axis=1)
        d_x = pull(_scaled(d_x, scale_M))[0]
    no_gradient: Any = None
    return Carried(no_gradient, d_x) if carried else d_x, d_weight, d_scale, None


_quantised.defvjp(_forward, _backward)


def _cast(x: jax.Array, cast: Cast) -> Quantised:
    return Quantised.of(x, cast.tile, cast.power_of_two)


def _cast_transposed(x: jax.Array, cast: Cast) -> Quantised:
    return Quantised.of_transposed(x, cast.tile, cast.power_of_two)


def _cast_both(x: jax.Array, cast: Cast, transposed: Cast) -> tuple[Quantised, Quantised]:
    """x, and x transposed, for products over columns and over rows; from one read of x where their tiles are usual."""
    if (cast.tile, transposed.tile, cast.power_of_two) == (ROW, COLUMN, transposed.power_of_two):
        return Quantised.both(x, cast.power_of_two)
    return _cast(x, cast), _cast_transposed(x, transposed)


def _product(x: Quantised, w: Quantised, group_sizes_E: jax.Array | None, dtype: jnp.dtype,
             static: _Static) -> jax.Array:
    """[M, N] from x [M, K] and w [N, K], or [E, N, K] for groups."""
    if not static.recipe.promoted:
        x_MK, w_KN = x.dequantise(), w.transposed.dequantise()
        if group_sizes_E is None:
            return hopper_matmul(x_MK, w_KN, promote_every=None).astype(dtype)
        return hopper_grouped_matmul(x_MK, w_KN, group_sizes_E).astype(dtype)
    if (x.tile, w.tile) == (ROW, BLOCK):
        operands = x.values, x.scales, w.values, w.scales
        if group_sizes_E is None:
            return fp8_matmul(*operands, dtype=dtype)
        return grouped_fp8_matmul(*operands, group_sizes_E, alignment=static.alignment, dtype=dtype)
    # Other tilings are for studies: no kernel serves them.
    return _plain(x.dequantise(), w.transposed.dequantise(), group_sizes_E, static.alignment).astype(dtype)


def _weight_gradient(x: Quantised, dy: Quantised, group_sizes_E: jax.Array | None, static: _Static) -> jax.Array:
    """float32 [K, N], or [E, K, N] for groups, from x [K, M] and dy [N, M]."""
    promoted = static.recipe.promoted
    if promoted and (x.tile, dy.tile) == (ROW, ROW):
        operands = x.values, x.scales, dy.values, dy.scales
        return fp8_wgrad(*operands) if group_sizes_E is None else grouped_fp8_wgrad(*operands, group_sizes_E)
    x_MK, dy_MN = x.transposed.dequantise(), dy.transposed.dequantise()
    if group_sizes_E is None:
        return x_MK.T @ dy_MN if promoted else hopper_matmul(x_MK.T, dy_MN, promote_every=None)
    if not promoted:
        return hopper_grouped_wgrad(x_MK, dy_MN, group_sizes_E)

    def of_weight(weight: jax.Array) -> jax.Array:
        return grouped_matmul(x_MK, weight, group_sizes_E, alignment=static.alignment)
    shape = (len(group_sizes_E), x_MK.shape[1], dy_MN.shape[1])
    return jax.vjp(of_weight, jnp.zeros(shape, jnp.float32))[1](dy_MN)[0]
