"""The oracle: tiles as one more dimension, in plain JAX. It also holds the arithmetic that every backend takes.

A tile's codes count down from its largest magnitude, since that is where its error shows most: code K stands for
largest * 2^-(step * (top - K)), which is the paper's exp(min + Step * (K - 1)). Powers of two stay in [2^-32, 1], so
nothing overflows, and the last code is the largest magnitude itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TILE = 128
RANGE = 2.0 ** 32
"""The largest magnitude of a tile over the smallest that has a code: about the range of five exponent bits."""
ROUNDER = 1.5 * 2.0 ** 23
SMALLEST = 2.0 ** -126
"""The smallest normal float32. What is below counts as zero, since some machines take it for zero."""


class Ends(NamedTuple):
    """float32, one for each tile: what codes 1 and 2^(n-1) - 1 stand for. Zero in a tile of zeros; NaN in a tile with
    inf or NaN."""

    smallest: jax.Array
    largest: jax.Array


class Ladder(NamedTuple):
    """What encoding needs to know of a tile; float32, one for each tile."""

    smallest: jax.Array
    """Magnitudes are moved to between this ..."""
    largest: jax.Array
    """... and this, which in a tile of zeros or with NaN are both 1."""
    zero: jax.Array
    """Magnitudes below are zero."""
    scale: jax.Array
    """A power of two that brings the largest to [2, 4): logarithms of 32 octaves below are small, and so their
    errors."""
    log_largest: jax.Array
    """Of the scaled."""
    codes_per_log: jax.Array
    """Steps in a difference of natural logarithms; 0 where all magnitudes are equal."""
    step: jax.Array
    """Octaves from one code to the next."""
    middle: jax.Array
    """The mean of the last two codes' values. Other neighbours' mean is the same multiple of theirs."""


def encode(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """See `api.encode`."""
    tiles = _in_tiles(x.astype(jnp.float32))
    ends = ends_of(*(jnp.expand_dims(end, -1) for end in largest_and_smallest(tiles)))
    codes = codes_of(tiles, ladder_of(ends, bits), bits)
    return pack(codes, bits), jnp.concatenate([end[..., 0] for end in ends], axis=-1).astype(x.dtype)


def decode(codes: jax.Array, ends: jax.Array, bits: int, width: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """See `api.decode`."""
    smallest, largest = jnp.split(ends.astype(jnp.float32)[..., None], 2, axis=-2)
    values = values_of(unpack(codes, bits), Ends(smallest, largest), bits)
    return values.reshape(*codes.shape[:-1], values.shape[-2] * TILE)[..., :width].astype(dtype)


def _in_tiles(x: jax.Array) -> jax.Array:
    """[..., K] -> [..., tiles, 128], with zeros after the end."""
    tiles = -(-x.shape[-1] // TILE)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, tiles * TILE - x.shape[-1])])
    return padded.reshape(*x.shape[:-1], tiles, TILE)


def top_code(bits: int) -> int:
    """The code of a tile's largest magnitude, 2^(n-1) - 1."""
    return 2 ** (bits - 1) - 1


def largest_and_smallest(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 magnitudes over the last dimension, as `ends_of` takes them; by their bits, which no machine loses."""
    bits = _bits(x) & 0x7FFFFFFF
    largest = jnp.max(bits, axis=-1)
    smallest = jnp.min(jnp.where(bits >= bits_of(SMALLEST), bits, bits_of(np.inf)), axis=-1)
    return tuple(jax.lax.bitcast_convert_type(end, jnp.float32) for end in (largest, smallest))  # type: ignore


def ends_of(largest: jax.Array, smallest: jax.Array) -> Ends:
    """The ends of a tile's ladder.

    Args:
      largest: the largest magnitude, inf or NaN if the tile has such.
      smallest: the smallest that is not zero; infinite if there is none.
    """
    smallest = jnp.minimum(jnp.maximum(smallest, largest * (1 / RANGE)), largest)
    is_zero, is_finite = largest < SMALLEST, largest < jnp.inf
    return Ends(*(jnp.where(is_finite, jnp.where(is_zero, 0.0, end), jnp.nan) for end in (smallest, largest)))


def step_of(ends: Ends, bits: int) -> jax.Array:
    """float32: octaves from one code to the next; 0 in a tile of zeros, of equal magnitudes or with NaN."""
    ratio = jnp.where(ends.smallest > 0, ends.largest / ends.smallest, 1.0)
    return jnp.log(ratio) * (1 / math.log(2) / (top_code(bits) - 1))


def ladder_of(ends: Ends, bits: int) -> Ladder:
    """What `codes_of` needs."""
    smallest, largest = (jnp.where(ends.smallest > 0, end, 1.0) for end in ends)
    step = step_of(ends, bits)
    # In a tile with NaN no magnitude is zero, so that all of it decodes to NaN.
    zero = jnp.where(ends.largest >= 0, jnp.maximum(smallest * 0.5, SMALLEST), 0.0)
    opposite = bits_of(2.0 ** 127) + bits_of(SMALLEST) - (_bits(largest) & bits_of(np.inf))  # of the exponent
    scale = jax.lax.bitcast_convert_type(opposite, jnp.float32)
    return Ladder(smallest, largest, zero, scale, jnp.log(largest * scale),
                  jnp.where(step > 0, (1 / math.log(2)) / step, 0.0), step, largest * (0.5 + 0.5 * jnp.exp2(-step)))


def codes_of(x: jax.Array, tile: Ladder, bits: int) -> jax.Array:
    """int32 codes in [0, 2^n): the sign, and which of the tile's values is nearest to float32 x.

    The logarithm finds the next value at or above the magnitude; then the mean of that value and the one below decides,
    so rounding is that of the numbers, not of their logarithms. A tie goes to the larger magnitude. The mean decides
    between the right two even if the logarithm is off by half a step; where steps are smaller than that error, so is
    what a neighbour makes of the number.
    """
    raw = _bits(x)
    magnitude_bits = raw & 0x7FFFFFFF  # they are ordered as magnitudes are, then inf, then NaN, and machines agree
    within = jnp.minimum(jnp.maximum(magnitude_bits, _bits(tile.smallest)), _bits(tile.largest))
    magnitude = jax.lax.bitcast_convert_type(within, jnp.float32)
    # Beside ROUNDER a float32 has no fraction: the sum rounds, and half less rounds down. A conversion to integers
    # would first bring what does not fit into range, which takes longer than all else here.
    rounded = (tile.log_largest - jnp.log(magnitude * tile.scale)) * tile.codes_per_log - 0.5 + ROUNDER
    down = _bits(rounded) - bits_of(ROUNDER)
    mean = tile.middle * jnp.exp2((ROUNDER - rounded) * tile.step)
    down = jnp.where(magnitude < mean, down + 1, down)
    code = jnp.where(magnitude_bits < _bits(tile.zero), 0, jnp.maximum(top_code(bits) - down, 1))
    return code | raw >> 32 - bits & 1 << bits - 1


def values_of(codes: jax.Array, ends: Ends, bits: int, step: jax.Array | None = None) -> jax.Array:
    """float32 that int32 codes stand for; `step` is that of `step_of`, if it is at hand."""
    step, top = step_of(ends, bits) if step is None else step, top_code(bits)
    code = codes & top
    power = jnp.exp2(-step * (top - code).astype(jnp.float32))
    # Rounding shall not take code 1 below the smallest normal number, where machines differ.
    magnitude = jnp.where(code == 0, 0.0, jnp.maximum(ends.largest * power, ends.smallest))
    sign = codes << 32 - bits & bits_of(-0.0)
    return jax.lax.bitcast_convert_type(_bits(magnitude) | sign, jnp.float32)


def bits_of(number: float) -> int:
    """float32's bits, which are ordered as positive numbers are."""
    return int(np.float32(number).view(np.int32))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


class Plane(NamedTuple):
    """Bits `shift` to `shift + bits` of all codes of a row."""

    bits: int
    """8, 4, 2 or 1."""
    shift: int

    @property
    def parts(self) -> int:
        """How many codes share a byte."""
        return 8 // self.bits

    @property
    def tile_bytes(self) -> int:
        """What a tile has in this plane."""
        return TILE // self.parts

    def place(self, width: int) -> int:
        """The first byte in rows of this many codes."""
        return width * self.shift // 8

    def part(self, codes: jax.Array) -> jax.Array:
        """These bits, as numbers."""
        return codes >> self.shift & (1 << self.bits) - 1


def planes(bits: int) -> list[Plane]:
    """The low 8 bits first; 13 bits are 8 + 4 + 1."""
    found: list[Plane] = []
    for size in (8, 8, 4, 2, 1):
        shift = sum(plane.bits for plane in found)
        if bits - shift >= size:
            found.append(Plane(size, shift))
    return found


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """int32 codes [..., tiles, 128] -> uint8 [..., tiles * 16 n], see `api`."""
    *lead, tiles, _ = codes.shape
    packed = []
    for plane in planes(bits):
        parts = plane.part(codes).reshape(*lead, tiles, plane.parts, plane.tile_bytes)
        shifts = plane.bits * np.arange(plane.parts, dtype=np.int32)[:, None]
        packed.append(jnp.sum(parts << shifts, axis=-2).reshape(*lead, tiles * plane.tile_bytes))
    return jnp.concatenate(packed, axis=-1).astype(jnp.uint8)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """uint8 [..., tiles * 16 n] -> int32 codes [..., tiles, 128]."""
    tiles = packed.shape[-1] // (TILE // 8 * bits)
    codes = jnp.zeros((*packed.shape[:-1], tiles, TILE), jnp.int32)
    for plane in planes(bits):
        first = plane.place(tiles * TILE)
        held = packed[..., first:first + tiles * plane.tile_bytes].astype(jnp.int32)
        held = held.reshape(*packed.shape[:-1], tiles, 1, plane.tile_bytes)
        shifts = plane.bits * np.arange(plane.parts, dtype=np.int32)[:, None]
        parts = held >> shifts & (1 << plane.bits) - 1
        codes |= parts.reshape(codes.shape) << plane.shift
    return codes
