"""What else multiplies the same shapes: XLA in bfloat16, and in float8 with one scale for each tensor.

Only their time is compared. Their operands are a case's values without its scales, and groups are as even as a batched
product needs them. XLA takes a float8 product in more than one writing, and which of them it turns into a float8 kernel
has changed between versions; so both are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Rivals = Mapping[str, Sequence["Rival"]]


class Rival(NamedTuple):
    """One way to compute a case otherwise."""

    prepare: Callable[..., tuple[jax.Array, ...]]
    """(*the case's operands) -> this one's; not timed."""
    run: Callable[..., Any]


def of_product(dtype: jax.typing.DTypeLike, accumulate: bool = False) -> Rivals:
    """Of x y^T for x [M, K] and y [N, K], plus what is accumulated onto."""
    return _rivals((((1,), (1,)), ((), ())), dtype,
                   lambda x, _, y, __, *more: (x, y, *(more if accumulate else ())))


def of_even_groups(groups: int) -> Rivals:
    """Of rows [P, K] by [E, N, K]."""
    return _rivals((((2,), (2,)), ((0,), (0,))), jnp.bfloat16,
                   lambda x, _, w, *__: (x.reshape(groups, -1, x.shape[1]), w))


def of_even_group_gradients(groups: int) -> Rivals:
    """Of [A, P] by [B, P], a sum for each group."""
    def prepare(x_AP: jax.Array, _: Any, y_BP: jax.Array, *__: Any) -> tuple[jax.Array, ...]:
        return tuple(a.reshape(a.shape[0], groups, -1).swapaxes(0, 1) for a in (x_AP, y_BP))
    return _rivals((((2,), (2,)), ((0,), (0,))), jnp.float32, prepare)


def of_even_bf16_groups(groups: int) -> Rivals:
    """Of rows [P, K] by [E, K, N], in bfloat16 alone."""
    dimensions = (((2,), (1,)), ((0,), (0,)))
    return {"xla_bf16": (Rival(lambda x, w, _: (x.reshape(groups, -1, x.shape[1]), w),
                               lambda x, w: jax.lax.dot_general(x, w, dimensions)),)}


def _rivals(dimensions: Any, dtype: jax.typing.DTypeLike, prepare: Callable[..., tuple[jax.Array, ...]]) -> Rivals:
    def in_bf16(*operands: jax.Array) -> tuple[jax.Array, ...]:
        x, y, *more = prepare(*operands)
        return x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), *more

    def with_scales(*operands: jax.Array) -> tuple[jax.Array, ...]:
        x, y, *more = prepare(*operands)
        return x, y, jnp.float32(0.5), jnp.float32(0.25), *more

    def bf16(x: jax.Array, y: jax.Array, *added: jax.Array) -> jax.Array:
        out = jax.lax.dot_general(x, y, dimensions, preferred_element_type=dtype)
        return out + added[0] if added else out

    def scaled_after(x: jax.Array, y: jax.Array, x_scale: jax.Array, y_scale: jax.Array,
                     *added: jax.Array) -> jax.Array:
        out = jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32) * (x_scale * y_scale)
        return (out + added[0] if added else out).astype(dtype)

    def scaled_before(x: jax.Array, y: jax.Array, x_scale: jax.Array, y_scale: jax.Array,
                      *added: jax.Array) -> jax.Array:
        wide = (x.astype(jnp.bfloat16) * x_scale.astype(jnp.bfloat16),
                y.astype(jnp.bfloat16) * y_scale.astype(jnp.bfloat16))
        return bf16(*wide, *added)
    return {"xla_bf16": (Rival(in_bf16, bf16),),
            "xla_fp8": (Rival(with_scales, scaled_after), Rival(with_scales, scaled_before))}
