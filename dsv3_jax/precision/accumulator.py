"""What Hopper's tensor cores do to sums of float8 products, so that it can be studied anywhere.

An instruction adds 32 products and the sum so far. All are shifted right to the exponent of the largest, and what falls
below its 13th fraction bit is cut off; the result is kept with 13 fraction bits (paper 1, section 3.1.1). Paper 2,
section 3.3.2, counts about 14 bits, sees errors of nearly 2% at 4096 terms of random matrices, and cures it: every 128
terms the sum is moved to a float32 register and starts anew.

Of 4096 products of numbers between 0 and 1 this rule loses at most 7.0% with 13 bits and 3.4% with 14; promoted every
128 terms, 0.06% and 0.02%.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.tiled import tiles_of_groups

FRACTION_BITS = 13
TERMS = 32
"""Products that one instruction adds for a result."""
ROWS = 128
"""Of a group's rows at a time, in grouped products."""
PROMOTION_INTERVAL = 128
"""N_C of paper 2: terms between two promotions, four instructions."""


@functools.partial(jax.jit, static_argnames=("promote_every", "fraction_bits"))
def hopper_matmul(x_MK: jax.Array, w_KN: jax.Array, start_MN: jax.Array | None = None, *,
                  promote_every: int | None = PROMOTION_INTERVAL, fraction_bits: int = FRACTION_BITS) -> jax.Array:
    """x w as the tensor cores of Hopper sum it; float32 [M, N].

    Exact but for what the hardware cuts off, where products are exact in float32, as those of float8 values are.

    Args:
      x_MK, w_KN: numbers that float8 can represent, in any type, or such times a scale, whose products float32 rounds.
      start_MN: float32, a sum to go on from, in the tensor cores.
      promote_every: terms after which the sum moves to float32, a multiple of 32; None: never, all in one sum.
      fraction_bits: of the sum; below 18, so that float32 adds 33 numbers of so many bits without rounding.

    Raises:
      ValueError: promote_every is no multiple of 32, or fraction_bits too many.
    """
    if promote_every is not None and (promote_every < 1 or promote_every % TERMS):
        raise ValueError(f"promote_every ({promote_every}) must be a multiple of {TERMS}, or None")
    if not 0 < fraction_bits < 18:
        raise ValueError(f"fraction_bits ({fraction_bits}) must lie in 1..17")
    rows, terms = x_MK.shape
    instructions = -(-terms // TERMS)
    padding = instructions * TERMS - terms
    x_ITM = jnp.pad(x_MK.astype(jnp.float32).T, ((0, padding), (0, 0))).reshape(instructions, TERMS, rows)
    w_ITN = jnp.pad(w_KN.astype(jnp.float32), ((0, padding), (0, 0))).reshape(instructions, TERMS, -1)
    interval = instructions if promote_every is None else promote_every // TERMS

    def step(carry: tuple[jax.Array, jax.Array], operands: tuple[jax.Array, ...]) -> tuple[tuple, None]:
        (promoted_MN, sum_MN), (x_TM, w_TN, index) = carry, operands
        # One by one, so that a result's terms stay in registers: twice as fast as an array of them.
        products = [x_TM[t][:, None] * w_TN[t] for t in range(TERMS)]
        sum_MN = _aligned_sum([*products, sum_MN], fraction_bits)
        full = (index + 1) % interval == 0
        return (jnp.where(full, promoted_MN + sum_MN, promoted_MN), jnp.where(full, 0, sum_MN)), None
    zero_MN = jnp.zeros((rows, w_KN.shape[1]), jnp.float32)
    start = zero_MN, zero_MN if start_MN is None else start_MN
    (promoted_MN, left_MN), _ = jax.lax.scan(step, start, (x_ITM, w_ITN, jnp.arange(instructions)))
    return promoted_MN + left_MN


def hopper_grouped_matmul(x_PK: jax.Array, w_EKN: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """`hopper_matmul` without promotion of each group's rows by its matrix; groups are multiples of 128 rows."""
    tiles, (used, group_of_tile) = x_PK.shape[0] // ROWS, tiles_of_groups(group_sizes_E, x_PK.shape[0], ROWS)

    def one(operands: tuple[jax.Array, ...]) -> jax.Array:
        x_MK, index = operands
        product_MN = hopper_matmul(x_MK, w_EKN[group_of_tile[index]], promote_every=None)
        return jnp.where(index < used, product_MN, 0)
    out = jax.lax.map(one, (x_PK.reshape(tiles, ROWS, -1), jnp.arange(tiles)))
    return out.reshape(x_PK.shape[0], -1)


def hopper_grouped_wgrad(x_PA: jax.Array, y_PB: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """x^T y of each group, [E, A, B], without promotion; groups are multiples of 128 rows."""
    tiles, (_, group_of_tile) = x_PA.shape[0] // ROWS, tiles_of_groups(group_sizes_E, x_PA.shape[0], ROWS)

    def add(sums_EAB: jax.Array, operands: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x_MA, y_MB, group = operands
        sum_AB = hopper_matmul(x_MA.T, y_MB, sums_EAB[group], promote_every=None)
        return sums_EAB.at[group].set(sum_AB, mode="drop"), None  # rows past the last group are of none
    zeros = jnp.zeros((len(group_sizes_E), x_PA.shape[1], y_PB.shape[1]), jnp.float32)
    operands = x_PA.reshape(tiles, ROWS, -1), y_PB.reshape(tiles, ROWS, -1), group_of_tile
    return jax.lax.scan(add, zeros, operands)[0]


def _aligned_sum(terms: list[jax.Array], fraction_bits: int) -> jax.Array:
    """The sum of what is left of each term at the exponent of the largest, cut to `fraction_bits` itself."""
    largest = functools.reduce(jnp.maximum, map(jnp.abs, terms))
    quantum, inverse = _quantum(largest, fraction_bits)
    total = sum(jnp.trunc(term * inverse) for term in terms) * quantum
    quantum, inverse = _quantum(jnp.abs(total), fraction_bits)
    return jnp.trunc(total * inverse) * quantum


def _quantum(magnitude: jax.Array, fraction_bits: int) -> tuple[jax.Array, jax.Array]:
    """(the value of the last of a number's fraction bits, its inverse), exact down to 2^-108, below which numbers lose
    bits. From the number's own bits: XLA's exp2 of a whole number may be off in the last place."""
    def power(biased_exponent: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(biased_exponent << 23, jnp.float32)
    biased = jax.lax.bitcast_convert_type(jnp.maximum(magnitude, 2.0 ** -108), jnp.int32) >> 23
    return power(biased - fraction_bits), power(254 - biased + fraction_bits)
