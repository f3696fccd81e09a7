"""E5M6, DeepSeek-V3's 12-bit format for the input of the projection after attention.

A sign, 5 exponent bits with bias 15, and 6 fraction bits; subnormals, infinities and NaN as in IEEE formats. The
largest number is (2 - 2^-6) * 2^15 = 65024 and the smallest 2^-20: float16 without its last 4 bits. A tile's scale is a
power of two, so scaling rounds nothing. It is plain JAX, of which XLA makes one pass: no unit multiplies E5M6, so it is
decoded before use.

Source: DeepSeek-V3 Technical Report, section 3.3.3 (inputs of the Linear after the attention operator).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quantise.reference import Tile, spread, tile_scales

E5M6_MAX = (2 - 2.0 ** -6) * 2.0 ** 15
FRACTION_BITS, SIGN, INFINITY, NAN = 6, 0x800, 0x7C0, 0x7E0
_DROPPED = 23 - FRACTION_BITS
"""Fraction bits that float32 has and E5M6 has not."""
_BIAS = 127 - 15


def encode_e5m6(x: jax.Array) -> jax.Array:
    """float32 or bfloat16 -> int32 codes in [0, 4096), rounded to the nearest, ties to even; overflow is infinite."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    even = (magnitude >> _DROPPED) & 1
    normal = ((magnitude + (1 << (_DROPPED - 1)) - 1 + even) >> _DROPPED) - (_BIAS << FRACTION_BITS)
    # Beside 8, float32's last place is 2^-20, that of E5M6's subnormals: the addition rounds.
    eight = jnp.float32(8)
    beside_eight = jax.lax.bitcast_convert_type(magnitude, jnp.float32) + eight
    subnormal = jax.lax.bitcast_convert_type(beside_eight, jnp.int32) - jax.lax.bitcast_convert_type(eight, jnp.int32)
    code = jnp.where(magnitude < (_BIAS + 1) << 23, subnormal, jnp.minimum(normal, INFINITY))
    code = jnp.where(magnitude > 0x7F800000, NAN, code)
    return code | jnp.where(bits < 0, SIGN, 0)


def decode_e5m6(codes: jax.Array) -> jax.Array:
    """Integer codes in [0, 4096) -> float32, exactly."""
    codes = codes.astype(jnp.int32)
    exponent, fraction = (codes & INFINITY) >> FRACTION_BITS, codes & ((1 << FRACTION_BITS) - 1)
    bits = (exponent + _BIAS) << 23 | fraction << _DROPPED
    bits = jnp.where(exponent == 31, 0x7F800000 | fraction << _DROPPED, bits)
    magnitude = jnp.where(exponent == 0, fraction.astype(jnp.float32) * 2.0 ** -20,
                          jax.lax.bitcast_convert_type(bits, jnp.float32))
    return jnp.where(codes & SIGN, -magnitude, magnitude)


def pack_12_bits(codes: jax.Array) -> jax.Array:
    """Codes in [0, 4096), [..., K] -> uint8 [..., 3 K / 2]. K is even.

    First K bytes with the low 8 bits of each, then K / 2 bytes with the high 4 bits of code j and of code j + K / 2: no
    value moves between neighbours.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"12-bit codes are packed in pairs, and the last dimension of {codes.shape} is odd")
    first, second = jnp.split(codes >> 8, 2, axis=-1)
    return jnp.concatenate([codes & 0xFF, first | second << 4], axis=-1).astype(jnp.uint8)


def unpack_12_bits(packed: jax.Array) -> jax.Array:
    """uint8 [..., 3 K / 2] -> int32 codes [..., K]."""
    low, high = jnp.split(packed.astype(jnp.int32), [packed.shape[-1] // 3 * 2], axis=-1)
    return low | jnp.concatenate([high & 0xF, high >> 4], axis=-1) << 8


@jax.named_scope("quantise_e5m6")
def quantise_e5m6(x: jax.Array, tile: Tile) -> tuple[jax.Array, jax.Array]:
    """Packed E5M6 and its scales, 1.5 bytes a number.

    Args:
      x: [..., M, K] bfloat16 or float32, K even.
      tile: rows and columns that share a scale, as in `pallas_kernels.quantise`.

    Returns:
      values uint8 [..., M, 3 K / 2] and scales float32 [..., ceil(M / rows), ceil(K / columns)]: the smallest powers of
      two that bring a tile's magnitudes to 65024 or below. Zeros, inf and NaN as in `pallas_kernels.quantise`.

    Raises:
      ValueError: K is odd.
    """
    scales, inverses = tile_scales(x, tile, True, E5M6_MAX)
    return pack_12_bits(encode_e5m6(x.astype(jnp.float32) * spread(inverses, tile, x.shape))), scales


@jax.named_scope("dequantise_e5m6")
def dequantise_e5m6(values: jax.Array, scales: jax.Array, tile: Tile,
                    dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """What `quantise_e5m6` returned -> [..., M, K]."""
    x = decode_e5m6(unpack_12_bits(values))
    return (x * spread(scales, tile, x.shape)).astype(dtype)
