"""Which pages of one device are free, held by rows, or kept because another row may begin the same way.

A page is named by all tokens that lie before its end and by the few that follow: prediction module k's entry of a
position depends on the k tokens after it. So whoever finds a page by its name finds exactly what it would have written.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

PageName = bytes


def page_name(previous: PageName, tokens: Sequence[int]) -> PageName:
    """Of a page with the tokens that follow it.

    Args:
      previous: name of the page before it; empty for a row's first.
      tokens: of the page, and as many more as there are prediction modules.
    """
    return hashlib.blake2b(previous + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


def page_names(tokens: Sequence[int], size: int, ahead: int, most: int) -> Iterator[PageName]:
    """Names of a row's first pages of `size` tokens, at most so many; `ahead` tokens must follow a page."""
    name = b""
    for start in range(0, min(most, (len(tokens) - ahead) // size) * size, size):
        name = page_name(name, tokens[start:start + size + ahead])
        yield name


class PagePool:
    """The pages of one device.

    A page is free, or held by as many rows as use it; if it is named and nobody holds it any more, it is kept until its
    room is needed, those unused the longest first to go.

    Args:
      pages: how many there are.
    """

    def __init__(self, pages: int):
        self.pages = pages
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._named: dict[PageName, int] = {}
        self._names: dict[int, PageName] = {}
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """Of those the ones that `find` may still find."""
        return len(self._kept)

    def take(self, count: int) -> list[int] | None:
        """So many pages, held once; None if there are fewer."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                del self._named[self._names.pop(page)]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def find(self, names: Iterable[PageName]) -> list[int]:
        """The longest beginning of `names` that there are pages of, now held once more each."""
        found = list(self._found(names))
        for page in found:
            self._holders[page] += 1
            self._kept.pop(page, None)
        return found

    def count_found(self, names: Iterable[PageName]) -> int:
        """How many pages `find` would give."""
        return sum(1 for _ in self._found(names))

    def _found(self, names: Iterable[PageName]) -> Iterator[int]:
        return itertools.takewhile(lambda page: page >= 0, (self._named.get(name, -1) for name in names))

    def give_name(self, page: int, name: PageName) -> None:
        """Lets others find a held page that is full; nothing if another page has the name."""
        if name not in self._named and page not in self._names:
            self._named[name], self._names[page] = page, name

    def release(self, pages: Sequence[int]) -> None:
        """Ends one holding of each. Later pages of a row go before earlier ones: without these nobody finds them."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] < 0:
                raise AssertionError(f"page {page} is released more often than it was taken")
            if self._holders[page] == 0:
                if page in self._names:
                    self._kept[page] = None
                else:
                    self._free.append(page)
