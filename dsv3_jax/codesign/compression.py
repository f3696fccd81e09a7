"""LogFMT on the way home, encoded and decoded by SMs or by the network (paper 1, sections 3.2 and 6.5).

Paper 1 gave LogFMT up: fused with the all-to-all, encoding and decoding cost 50% to 100%. Of what, it does not say, so
both readings are here: of the time of the combine in bf16 ("plain"), or of the combine in LogFMT ("compressed"), each
on the link the paper had. Encoding is work on an SM: its time does not shrink with a faster link, and it is added to
the time on the wire, as it is where kernels are fused and SMs the limit. A NIC or switch that encodes at the rate of
the link takes none of it.

Units: bytes, bytes/s, seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from dsv3_jax.codesign.checks import not_negative, positive
from dsv3_jax.codesign.hardware import HARDWARE
from dsv3_jax.config import Combine, ConfigError
from dsv3_jax.expert_parallel.exchange import Wire, row_bytes

Of = Literal["plain", "compressed"]


@dataclass(frozen=True)
class Codec:
    """Encoding and decoding a combine."""

    overhead: float = 0.5
    """Time over that of the combine: 0.5 to 1 on SMs (paper 1, section 3.2), 0 in the network."""
    of: Of = "plain"
    """Which combine."""
    link: float = HARDWARE["h800"].scale_out.bandwidth
    """On which that was so."""

    def __post_init__(self) -> None:
        not_negative(overhead=self.overhead)
        positive(link=self.link)
        if self.of not in get_args(Of):
            raise ConfigError(f"of ({self.of}) must be one of {', '.join(get_args(Of))}")


def combine_bytes(combine: Combine, width: int = 7168) -> int:
    """Of one row from bf16 outputs."""
    positive(width=width)
    return row_bytes(width, 2, Wire(combine=combine)).combine


def combine_seconds(combine: Combine, bandwidth: float, codec: Codec, width: int = 7168) -> float:
    """A row's time, on the wire and in the codec; without a codec for what travels plain."""
    positive(bandwidth=bandwidth)
    plain, sent = combine_bytes("plain", width), combine_bytes(combine, width)
    coded = 0.0 if combine == "plain" else codec.overhead * (plain if codec.of == "plain" else sent) / codec.link
    return sent / bandwidth + coded


def break_even_bandwidth(combine: Combine, codec: Codec, width: int = 7168) -> float:
    """Of the link on which the format takes as long as bf16: it pays on slower ones. Infinite where it is shorter and
    costs nothing, zero where it is no shorter."""
    plain, sent = combine_bytes("plain", width), combine_bytes(combine, width)
    if sent >= plain or codec.overhead == 0:
        return 0.0 if sent >= plain else math.inf
    return codec.link * (plain - sent) / (codec.overhead * (plain if codec.of == "plain" else sent))
