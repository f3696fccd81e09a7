"""Matrices in float8 with a scale for each tile."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dsv3_jax.precision.formats import dequantise_e5m6, quantise_e5m6
from pallas_kernels.quantise import dequantise, quantise, quantise_both, quantise_transposed, swiglu_quantise

Tile = tuple[int, int]
ROW: Tile = (1, 128)
"""A token by 128 channels."""
COLUMN: Tile = (128, 1)
"""128 tokens by a channel: for products that sum over tokens."""
BLOCK: Tile = (128, 128)
"""128 inputs by 128 outputs of a weight."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantised:
    """values[i, j] * scales[i // tile[0], j // tile[1]]; a pytree.

    Fine scales keep an outlier's damage to its tile (paper 2, section 3.3.2), which E4M3's range of 2^-9 to 448 would
    otherwise not bear.
    """

    values: jax.Array
    """float8_e4m3fn [..., M, K]."""
    scales: jax.Array
    """float32 [..., ceil(M / tile[0]), ceil(K / tile[1])]; [1, 1] without a tile."""
    tile: Tile | None = dataclasses.field(metadata={"static": True})
    """Rows and columns that share a scale; None: all of the matrix."""

    @classmethod
    def of(cls, x: jax.Array, tile: Tile | None, power_of_two: bool = False) -> Quantised:
        """x [..., M, K], bf16 or float32, rounded to nearest; each scale is its tile's largest magnitude over 448, or
        the power of two from there up."""
        values, scales = quantise(x, tile, power_of_two=power_of_two)
        return cls(values, scales, tile)

    @classmethod
    def of_transposed(cls, x: jax.Array, tile: Tile | None, power_of_two: bool = False) -> Quantised:
        """`of(x, tile).transposed` of x [M, K], in one pass for 128x1 tiles."""
        if tile == COLUMN:
            values, scales = quantise_transposed(x, power_of_two=power_of_two)
            return cls(values, scales, ROW)
        return cls.of(x, tile, power_of_two).transposed

    @classmethod
    def both(cls, x: jax.Array, power_of_two: bool = False) -> tuple[Quantised, Quantised]:
        """`of(x, ROW)` and `of_transposed(x, COLUMN)` of x [M, K], in one pass."""
        (values, scales), (across, scales_across) = quantise_both(x, power_of_two=power_of_two)
        return cls(values, scales, ROW), cls(across, scales_across, ROW)

    @classmethod
    def of_swiglu(cls, gate_up: jax.Array, power_of_two: bool = False) -> Quantised:
        """`of(silu(gate) * up, ROW)` of the halves of [..., M, 2K], in one pass."""
        values, scales = swiglu_quantise(gate_up, power_of_two=power_of_two)
        return cls(values, scales, ROW)

    def dequantise(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The numbers themselves, in `dtype`."""
        return dequantise(self.values, self.scales, self.tile, dtype)

    @property
    def transposed(self) -> Quantised:
        """The transposed matrix: the same numbers."""
        return Quantised(jnp.swapaxes(self.values, -1, -2), jnp.swapaxes(self.scales, -1, -2),
                         None if self.tile is None else self.tile[::-1])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedE5M6:
    """A matrix [..., M, K] in 12 bits a number, 1x128 tiles whose scales are powers of two; see `formats`. A pytree."""

    values: jax.Array
    """uint8 [..., M, 3 K / 2]."""
    scales: jax.Array
    """float32 [..., M, ceil(K / 128)]."""

    @classmethod
    def of(cls, x: jax.Array) -> QuantisedE5M6:
        """x [..., M, K], bf16 or float32, K even, rounded to nearest."""
        values, scales = quantise_e5m6(x, ROW)
        return cls(values, scales)

    def dequantise(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The numbers themselves, in `dtype`; bf16 holds them all."""
        return dequantise_e5m6(self.values, self.scales, ROW, dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carried:
    """A quantised matrix, and what its gradient is the gradient of: float8 can have none itself. A pytree."""

    quantised: Quantised
    carrier: jax.Array
    """Zeros of the matrix's shape, in the type its gradient has. Nobody reads them, so they are never made."""

    @classmethod
    def of(cls, quantised: Quantised, dtype: jax.typing.DTypeLike) -> Carried:
        """With a gradient in `dtype`."""
        return cls(quantised, jnp.zeros(quantised.values.shape, dtype))
