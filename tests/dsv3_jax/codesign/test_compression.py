"""Where LogFMT pays, by hand."""

from __future__ import annotations

import math

import pytest

from dsv3_jax.codesign.compression import Codec, break_even_bandwidth, combine_bytes, combine_seconds
from dsv3_jax.config import ConfigError


@pytest.mark.parametrize(("combine", "size"), [("plain", 2 * 7168), ("logfmt8", 56 * (128 + 4)),
                                               ("logfmt10", 56 * (160 + 4)), ("logfmt16", 56 * (256 + 4))])
def test_bytes_of_a_row(combine, size):
    assert combine_bytes(combine) == size


@pytest.mark.parametrize(("combine", "overhead", "of", "gigabytes"), [
    # A tile of 128 is 256 bytes in bf16, 132 at 8 bits, 164 at 10.
    ("logfmt8", 0.5, "plain", 50 * 124 / 128), ("logfmt8", 1.0, "plain", 50 * 124 / 256),
    ("logfmt8", 0.5, "compressed", 50 * 124 / 66), ("logfmt8", 1.0, "compressed", 50 * 124 / 132),
    ("logfmt10", 0.5, "plain", 50 * 92 / 128), ("logfmt10", 1.0, "compressed", 50 * 92 / 164)])
def test_break_even_by_hand(combine, overhead, of, gigabytes):
    codec = Codec(overhead, of)
    link = break_even_bandwidth(combine, codec)
    assert link == pytest.approx(gigabytes * 1e9)
    assert combine_seconds(combine, link, codec) == pytest.approx(combine_seconds("plain", link, codec))
    assert combine_seconds(combine, 0.9 * link, codec) < combine_seconds("plain", 0.9 * link, codec)
    assert combine_seconds(combine, 1.1 * link, codec) > combine_seconds("plain", 1.1 * link, codec)


def test_in_the_network_it_pays_on_every_link():
    assert break_even_bandwidth("logfmt8", Codec(0.0)) == math.inf
    for link in (1e9, 50e9, 900e9):
        assert combine_seconds("plain", link, Codec(0)) / combine_seconds("logfmt8", link, Codec(0)) == \
            pytest.approx(256 / 132)


def test_what_is_longer_than_bf16_never_pays():
    """260 bytes a tile."""
    assert break_even_bandwidth("logfmt16", Codec(0.5)) == break_even_bandwidth("logfmt16", Codec(0)) == 0
    assert combine_seconds("logfmt16", 1e9, Codec(0)) > combine_seconds("plain", 1e9, Codec(0))


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Codec(-0.5), r"overhead \(-0.5\)"),
    (lambda: Codec(link=0), r"link \(0\)"),
    (lambda: Codec(of="both"), r"of \(both\)"),
    (lambda: combine_seconds("plain", 0, Codec()), r"bandwidth \(0\)"),
    (lambda: combine_bytes("plain", 0), r"width \(0\)"),
])
def test_nonsense_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
