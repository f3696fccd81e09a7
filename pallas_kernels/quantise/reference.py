"""The oracle: tiles as two more dimensions, in plain JAX. It also holds the one rule from magnitudes to scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

TILE = 128
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0 ** -126
"""The smallest normal float32, so that a scale's inverse is finite and no machine takes it for zero."""
ZEROS_COUNT_AS = 1e-4
"""The largest magnitude that a tile of zeros is taken to have: DeepGEMM's lower bound. Other tiles keep their own,
since gradients are far smaller."""

Tile = tuple[int, int] | None


def quantise(x: jax.Array, tile: Tile, power_of_two: bool) -> tuple[jax.Array, jax.Array]:
    """See `api.quantise`."""
    scales, inverses = tile_scales(x, tile, power_of_two, E4M3_MAX)
    values = x.astype(jnp.float32) * spread(inverses, tile, x.shape)
    return values.astype(jnp.float8_e4m3fn), scales


def quantise_transposed(x_MK: jax.Array, power_of_two: bool) -> tuple[jax.Array, jax.Array]:
    """See `api.quantise_transposed`."""
    return quantise(x_MK.swapaxes(-1, -2), (1, TILE), power_of_two)


def quantise_both(x_MK: jax.Array, power_of_two: bool) -> tuple[tuple[jax.Array, jax.Array],
                                                                tuple[jax.Array, jax.Array]]:
    """See `api.quantise_both`."""
    return quantise(x_MK, (1, TILE), power_of_two), quantise_transposed(x_MK, power_of_two)


def swiglu_quantise(gate_up: jax.Array, power_of_two: bool) -> tuple[jax.Array, jax.Array]:
    """See `api.swiglu_quantise`."""
    return quantise(swiglu(gate_up), (1, TILE), power_of_two)


def swiglu(gate_up: jax.Array) -> jax.Array:
    """[..., 2F] -> [..., F]: silu(gate) * up in float32, rounded once to the input's dtype."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return rounded_to(silu_times(gate, up), gate_up.dtype).astype(gate_up.dtype)


def silu_times(gate: jax.Array, up: jax.Array) -> jax.Array:
    """In float32, written out so that every backend takes the same steps."""
    return gate / (1 + jnp.exp(-gate)) * up


def rounded_to(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """float32 with the precision of `dtype`. XLA may drop a cast to bfloat16 and back; this it keeps."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def dequantise(values: jax.Array, scales: jax.Array, tile: Tile, dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `api.dequantise`."""
    return (values.astype(jnp.float32) * spread(scales, tile, values.shape)).astype(dtype)


def tile_scales(x: jax.Array, tile: Tile, power_of_two: bool, limit: float) -> tuple[jax.Array, jax.Array]:
    """(scales, inverses) of each tile of x [..., M, K], float32 [..., ceil(M/rows), ceil(K/columns)]."""
    (down, rows), (across, columns) = _tiling(tile, x.shape)
    edges = [(0, 0)] * (x.ndim - 2) + [(0, down * rows - x.shape[-2]), (0, across * columns - x.shape[-1])]
    tiles = jnp.pad(magnitude_bits(x), edges).reshape(*x.shape[:-2], down, rows, across, columns)
    return scale_and_inverse(jnp.max(tiles, axis=(-3, -1), initial=0), power_of_two, limit)


def spread(per_tile: jax.Array, tile: Tile, shape: tuple[int, ...]) -> jax.Array:
    """One number a tile -> one an element, [..., M, K]."""
    (down, rows), (across, columns) = _tiling(tile, shape)
    tiles = jnp.broadcast_to(per_tile[..., :, None, :, None], (*shape[:-2], down, rows, across, columns))
    return tiles.reshape(*shape[:-2], down * rows, across * columns)[..., :shape[-2], :shape[-1]]


def _tiling(tile: Tile, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """For rows and columns: (tiles, elements in a tile)."""
    if tile is None:
        return (1, shape[-2]), (1, shape[-1])
    return (-(-shape[-2] // tile[0]), tile[0]), (-(-shape[-1] // tile[1]), tile[1])


def magnitude_bits(x: jax.Array) -> jax.Array:
    """float32's bits without the sign, int32: ordered as magnitudes are, then inf, then NaN, so a maximum keeps them
    on every machine."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF


def scale_and_inverse(largest: jax.Array, power_of_two: bool, limit: float = E4M3_MAX) -> tuple[jax.Array, jax.Array]:
    """What maps a tile's largest magnitude to `limit` or below, and one over it; NaN if that magnitude is not finite.

    Subnormal magnitudes count as zero, as some machines take them.

    Args:
      largest: int32 from `magnitude_bits`.
      power_of_two: take the smallest 2^k with largest <= limit * 2^k, else largest * float32(1 / limit).
      limit: the largest number of the format.
    """
    def bits(value: float) -> int:
        return int(np.float32(value).view(np.int32))
    largest = jnp.where(largest < bits(SMALLEST_SCALE), bits(ZEROS_COUNT_AS), largest)
    if power_of_two:
        # Exponents are subtracted. A larger fraction than the limit's carries into the exponent, and adds one.
        carry, exponent = 0x7FFFFF - (bits(limit) & 0x7FFFFF), (bits(limit) >> 23) - 127
        biased = jnp.maximum(((largest + carry) >> 23) - exponent, 1)
        scale, inverse = (jax.lax.bitcast_convert_type(e << 23, jnp.float32) for e in (biased, 254 - biased))
    else:
        scale = jnp.maximum(jax.lax.bitcast_convert_type(largest, jnp.float32) * np.float32(1 / limit), SMALLEST_SCALE)
        inverse = nearest_inverse(scale, 1 / scale)
    finite = largest < bits(np.inf)
    return jnp.where(finite, scale, jnp.nan), jnp.where(finite, inverse, jnp.nan)


def nearest_inverse(number: jax.Array, guess: jax.Array) -> jax.Array:
    """1 / number to the nearest, from a guess that is two units in the last place off at most, for normal float32.

    A GPU and a TPU divide only about so well, and two backends shall not differ in a value that lies between two codes.
    """
    def bits(x: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(x, jnp.int32)
    fraction = bits(number) & 0x7FFFFF | 0x800000
    exponent = (252 - (bits(number) >> 23)) << 23
    inverse = bits(guess) - exponent  # a 24-bit integer, to be nearest to 2^47 / fraction
    for _ in range(2):
        twice_missing = -2 * fraction * inverse  # 2 * (2^47 - fraction * inverse): it is small, and int32 wraps
        inverse += (twice_missing > fraction).astype(jnp.int32) - (twice_missing < -fraction).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(inverse + exponent, jnp.float32)
