"""Numbers in LogFMT, the logarithmic format of n bits that paper 1 tried for the combine (section 3.2)."""

from __future__ import annotations

import dataclasses

import jax

from pallas_kernels.logfmt import decode, encode


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogFMT:
    """[..., K] in n bits a number, 4 to 16, tiles of 1x128 with a range of their own; see `pallas_kernels.logfmt`. A
    pytree: leading dimensions may be cut, permuted and sent like those of any array.

    No gradient passes through rounding: who wants one straight through says so.
    """

    codes: jax.Array
    """uint8 [..., ceil(K / 128) * 16 n]."""
    ends: jax.Array
    """bf16 or float32 [..., 2 ceil(K / 128)]: the smallest magnitudes of all tiles, then the largest."""
    width: int = dataclasses.field(metadata={"static": True})
    """K."""

    @classmethod
    def of(cls, x: jax.Array, bits: int) -> LogFMT:
        """x [..., K], bf16 or float32, each rounded to the nearest number that `bits` can say."""
        return cls(*encode(jax.lax.stop_gradient(x), bits), x.shape[-1])

    def dequantise(self, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """The numbers themselves, in bf16 or float32, by default in that of what was rounded."""
        return decode(self.codes, self.ends, width=self.width, dtype=dtype)
