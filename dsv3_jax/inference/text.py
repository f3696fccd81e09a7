"""Token ids to text as they come: no half characters, and nothing of a stop sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

UNFINISHED = "�"
"""What a tokenizer shows for bytes that are not UTF-8, or not yet."""
_PENDING = 3
"""Bytes of a character that lacks only its last one: it shows as at most so many UNFINISHED."""


class Decoder(Protocol):
    """The half of a tokenizer that is needed here."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; UNFINISHED for bytes that are no character."""


class TextStream:
    """The text of one row.

    A character waits for all its bytes, and whatever may be the beginning of a stop sequence waits until it is decided:
    the stop sequence itself never shows, whichever tokens it is spread over.

    Attributes:
      text: all that was given out.
      stopped: the stop sequence that ended the text, or None.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, [s for s in stop if s]
        self._ids: list[int] = []
        self._from = self._decoded = self._given = 0
        self._held = ""
        self.text = ""
        self.stopped: str | None = None

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` add, as far as it is certain; nothing once the text has stopped."""
        added = ""
        for token in ids:
            self._ids.append(token)
            added += self._new_characters(final=False)
        return self._give(added, final=False)

    def finish(self) -> str:
        """What was held back, at the end of the row."""
        return self._give(self._new_characters(final=True), final=True)

    def _new_characters(self, final: bool) -> str:
        """Text of the ids not given out yet, as far as more bytes cannot change it.

        They are decoded after those of the last time, because some tokenizers write a token differently at the
        beginning; so the work for each is constant.
        """
        now = self._tokenizer.decode(self._ids[self._from:])
        unfinished = 0 if final else min(_PENDING, len(now) - len(now.rstrip(UNFINISHED)))
        added = now[self._given:len(now) - unfinished]
        self._given += len(added)
        if not now.endswith(UNFINISHED):
            self._from, self._decoded = self._decoded, len(self._ids)
            self._given = len(self._tokenizer.decode(self._ids[self._from:]))
        return added

    def _give(self, added: str, final: bool) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + added
        found = [(text.find(s), -len(s), s) for s in self._stop if s in text]
        if found:
            at, _, self.stopped = min(found)
            text, self._held = text[:at], ""
        else:
            keep = 0 if final else max((_overlap(text, s) for s in self._stop), default=0)
            text, self._held = text[:len(text) - keep], text[len(text) - keep:]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
