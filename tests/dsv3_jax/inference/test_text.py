"""Text as it comes: whole characters, and stop sequences wherever the tokens break."""

from __future__ import annotations

import numpy as np
import pytest

from dsv3_jax.inference.text import TextStream


class Bytes:
    """A token a byte, and tokens from 256 on that are several; decodes as a byte-level tokenizer does."""

    words = (b"stop", b"\xe6\xbc", b"\xa2 and", b"END of", b"a\xf0\x9f")

    def decode(self, ids):
        return b"".join(bytes([i]) if i < 256 else self.words[i - 256] for i in ids).decode("utf-8", "replace")


class Spaced:
    """Writes a space before every token but the first, as sentence-piece tokenizers do."""

    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


@pytest.mark.parametrize("text", ["plain", "漢字 and 🙂!", "ends in �", ""])
def test_streamed_text_is_the_text_and_never_half_a_character(text):
    stream, parts = TextStream(Bytes()), []
    for byte in text.encode():
        parts.append(stream.push([byte]))
        assert "�" not in parts[-1] or "�" in text
    parts.append(stream.finish())
    assert "".join(parts) == text == stream.text
    assert stream.stopped is None
    if text == "漢字 and 🙂!":
        assert parts[:4] == ["", "", "漢", ""]


def test_any_bytes_in_any_pieces_equal_decoding_at_once():
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.choice([*range(0x60, 0x64), 0x80, 0xBC, 0xA2, 0xE6, 0xF0, 0x9F, *range(256, 261)], 30).tolist()
        stream, out = TextStream(Bytes()), ""
        while ids[len(stream._ids):]:
            at = len(stream._ids)
            out += stream.push(ids[at:at + rng.integers(1, 4)])
        assert out + stream.finish() == Bytes().decode(ids)


def test_tokens_that_depend_on_their_place():
    stream = TextStream(Spaced())
    assert [stream.push([i]) for i in range(4)] == ["w0", " w1", " w2", " w3"]


@pytest.mark.parametrize(("stop", "pieces", "shown", "found"), [
    (["END"], ["a EN", "D b"], ["a ", ""], "END"),  # spread over two pieces
    (["END"], ["a EN", "E b"], ["a ", "ENE b"], None),  # a false beginning is given out after all
    (["aab"], ["aa", "ab", "x"], ["", "a", ""], "aab"),  # begins inside its own beginning
    (["long stop", "st"], ["a st", "op"], ["a ", ""], "st"),  # the first to be complete
    (["b c", "a b c"], ["x a b", " c"], ["x ", ""], "a b c"),  # the earliest in the text
    (["\n\n"], ["one\n", "two\n", "\n"], ["one", "\ntwo", ""], "\n\n"),
    (["漢"], ["x漢y"], ["x"], "漢"),
    ([], ["a", "b"], ["a", "b"], None),
])
def test_stop_sequences(stop, pieces, shown, found):
    stream = TextStream(Bytes(), stop)
    assert [stream.push(piece.encode()) for piece in pieces] == shown
    assert stream.stopped == found
    rest = stream.finish()
    assert rest == "" or found is None
    assert stream.text == "".join(shown) + rest


def test_a_beginning_left_at_the_end_is_given_out():
    stream = TextStream(Bytes(), ["END"])
    assert stream.push(b"the EN") == "the "
    assert stream.finish() == "EN"
