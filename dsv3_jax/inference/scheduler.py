"""Which requests have a row, and what is done with it next. Knows tokens and pages, nothing of devices or models.

A request waits, then has a row: its prompt is read in chunks, then it decodes with all other rows, a step at a time.
Pages for the prompt are taken at once, further ones as tokens come. Where there is none left, the row that came last
gives its up and waits again, first in its user's line, to read what it had written: what it draws depends on its seed
and on positions only, so the answer stays the same.
"""

from __future__ import annotations

import collections
import dataclasses

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.page_pool import PageName, PagePool, page_name, page_names
from dsv3_jax.inference.request import Ticket


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What there is room for.

    Raises:
      ConfigError: a size that leaves no room for anything.
    """

    rows: int
    """Requests that decode at a time, on each device."""
    pages: int
    """Pages of each device."""
    page_size: int = 64
    """Tokens of a page."""
    context: int = 4096
    """Most tokens of a request, prompt and answer together."""
    waiting: int = 1024
    """Most requests that wait for a row."""
    reuse: bool = True
    """Let requests that begin alike share pages."""

    def __post_init__(self) -> None:
        for name in ("rows", "pages", "page_size", "context", "waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name} ({getattr(self, name)}) must be at least 1")
        if self.pages * self.page_size < self.context:
            raise ConfigError(f"engine.pages*engine.page_size ({self.pages}*{self.page_size}="
                              f"{self.pages * self.page_size} tokens) must hold a request of engine.context "
                              f"({self.context}) tokens: raise engine.pages or lower engine.context")

    @property
    def pages_per_row(self) -> int:
        """J: most pages of a row."""
        return -(-self.context // self.page_size)


class Busy(RuntimeError):
    """Too many requests wait; try again later."""


@dataclasses.dataclass(eq=False)
class Row:
    """A request that has a row."""

    ticket: Ticket
    device: int
    place: int
    """Which of its device's rows."""
    arrival: int
    """Rows count up; a later one gives way."""
    tokens: list[int]
    """Prompt and answer so far."""
    pages: list[int]
    to_read: int
    """Tokens of the beginning that are read in chunks: all but those decoded since."""
    first: int = 0
    """Tokens of the beginning that were found in pages."""
    read: int = 0
    """Tokens whose entries are in the cache."""
    named: int = 0
    """Pages that others may find, from the first."""
    name: PageName = b""
    """Of the last of these."""
    held: bool = False
    """It waits for another engine to take it over, and does not decode."""

    @property
    def reading(self) -> bool:
        """Whether tokens wait to be read before it can decode."""
        return self.read < self.to_read


class Scheduler:
    """Rows and pages of `devices` devices.

    Args:
      ahead: multi-token-prediction modules in use: a step adds up to one token more than these.
    """

    def __init__(self, sizes: Sizes, devices: int = 1, ahead: int = 0):
        self.sizes, self._ahead = sizes, ahead
        self.pools = [PagePool(sizes.pages) for _ in range(devices)]
        self._rows: list[list[Row | None]] = [[None] * sizes.rows for _ in range(devices)]
        self._waiting: collections.OrderedDict[str, collections.deque[Ticket]] = collections.OrderedDict()
        self._arrivals = 0
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        return sum(map(len, self._waiting.values()))

    @property
    def rows(self) -> list[Row]:
        """Requests with one, in the order in which they got it."""
        return sorted((row for rows in self._rows for row in rows if row is not None), key=lambda row: row.arrival)

    @property
    def unread(self) -> int:
        """Tokens of prompts that are still to be read, of waiting requests too."""
        return (sum(row.to_read - row.read for row in self.rows)
                + sum(len(t.request.prompt) + len(t.tokens) for line in self._waiting.values() for t in line))

    def submit(self, ticket: Ticket) -> None:
        """Puts a request at the end of its user's line.

        Raises:
          Busy: the line is full.
          ConfigError: it is longer than a row may be.
        """
        request = ticket.request
        room = self.sizes.context - self._ahead
        if len(request.prompt) + request.max_new_tokens > room:
            raise ConfigError(
                f"the prompt's {len(request.prompt)} tokens and max_new_tokens ({request.max_new_tokens}) are more "
                f"than the {room} that a request may have (engine.context): shorten the prompt or ask for "
                f"{max(0, room - len(request.prompt))} at most")
        if self.waiting >= self.sizes.waiting:
            raise Busy(f"{self.waiting} requests are waiting, as many as may (engine.waiting): try again later")
        self._waiting.setdefault(request.user, collections.deque()).append(ticket)

    def admit(self) -> list[Row]:
        """Gives rows to waiting requests, users in turn, as long as there are rows and pages for the next in line."""
        new = []
        while self._waiting:
            user, line = next(iter(self._waiting.items()))
            row = self._place(line[0])
            if row is None:
                break
            line.popleft()
            self._waiting.move_to_end(user)
            if not line:
                del self._waiting[user]
            new.append(row)
        return new

    def adopt(self, ticket: Ticket, first: int) -> Row | None:
        """A row for a request whose prompt another engine has read, with pages for it and for a step; None if there is
        no room yet."""
        prompt = ticket.request.prompt.tolist()
        free = [device for device, rows in enumerate(self._rows) if None in rows]
        if not free:
            return None
        device = max(free, key=lambda d: self.pools[d].available)
        pages = self.pools[device].take(self._pages_for(len(prompt) + 1 + self._ahead))
        if pages is None:
            return None
        row = self._new_row(ticket, device, [*prompt, first], pages)
        self.did_decode(row, len(prompt))
        return row

    def reads(self) -> list[list[Row]]:
        """The rows of each device whose prompts are to be read, in the order in which they came."""
        lines: list[list[Row]] = [[] for _ in self._rows]
        for row in self.rows:
            if row.reading:
                lines[row.device].append(row)
        return lines

    def did_read(self, row: Row, count: int) -> None:
        """`count` tokens of the row's beginning are in the cache now."""
        row.read += count
        self._name_pages(row)

    def decodes(self) -> list[Row]:
        """Rows that take part in the next step, with room for what it may add; rows for which there is none give way,
        the last first."""
        ready = []
        for row in self.rows:
            waits = row.reading or row.held
            if self._rows[row.device][row.place] is row and not waits and self._has_room(row):
                ready.append(row)
        return [row for row in ready if self._rows[row.device][row.place] is row]

    def did_decode(self, row: Row, added: int) -> None:
        """A step put `added` entries into the cache."""
        row.read += added
        row.to_read = row.read
        self._name_pages(row)

    def leave(self, row: Row) -> None:
        """The row's request has ended."""
        self._rows[row.device][row.place] = None
        self.pools[row.device].release(row.pages)

    def remove_cancelled(self) -> tuple[list[Ticket], list[Row]]:
        """Those that somebody cancelled: waiting ones, gone from their lines, and rows, which stay until `leave`."""
        gone = []
        for user in list(self._waiting):
            line = self._waiting[user]
            gone += [ticket for ticket in line if ticket.cancelled]
            self._waiting[user] = collections.deque(ticket for ticket in line if not ticket.cancelled)
            if not self._waiting[user]:
                del self._waiting[user]
        return gone, [row for row in self.rows if row.ticket.cancelled]

    def tickets(self) -> list[Ticket]:
        """All requests that have not ended."""
        return [*(row.ticket for row in self.rows), *(t for line in self._waiting.values() for t in line)]

    def _place(self, ticket: Ticket) -> Row | None:
        """A row on the device that holds most of the request's beginning, of equal ones that with most free pages."""
        tokens, size = [*ticket.request.prompt.tolist(), *ticket.tokens], self.sizes.page_size
        # The last token must be read, for the next is drawn from it, and as many more as prediction modules look back.
        reusable = (len(tokens) - 1 - self._ahead) // size if self.sizes.reuse else 0
        names = list(page_names(tokens, size, self._ahead, reusable))
        free = [device for device, rows in enumerate(self._rows) if None in rows]
        if not free:
            return None
        device = max(free, key=lambda d: (self.pools[d].count_found(names), self.pools[d].available))
        pool = self.pools[device]
        held = pool.find(names)
        more = pool.take(self._pages_for(len(tokens) + 1 + self._ahead) - len(held))
        if more is None:
            pool.release(held)
            return None
        row = self._new_row(ticket, device, tokens, held + more)
        row.first = row.read = len(held) * size
        row.named, row.name = len(held), names[len(held) - 1] if held else b""
        if not ticket.tokens:
            ticket.prompt_tokens_reused = row.read
        return row

    def _new_row(self, ticket: Ticket, device: int, tokens: list[int], pages: list[int]) -> Row:
        self._arrivals += 1
        row = Row(ticket, device, self._rows[device].index(None), self._arrivals, tokens, pages, len(tokens))
        self._rows[device][row.place] = row
        return row

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.sizes.page_size)

    def _has_room(self, row: Row) -> bool:
        """Takes pages for one more step, from rows that came later if need be; False if the row itself gave way."""
        pool = self.pools[row.device]
        needed = self._pages_for(row.read + 1 + self._ahead) - len(row.pages)
        if needed <= 0:
            return True
        while (more := pool.take(needed)) is None:
            last = max((r for r in self._rows[row.device] if r is not None), key=lambda r: r.arrival)
            self._give_way(last)
            if last is row:
                return False
        row.pages += more
        return True

    def _give_way(self, row: Row) -> None:
        self.leave(row)
        self.preemptions += 1
        user = row.ticket.request.user
        self._waiting.setdefault(user, collections.deque()).appendleft(row.ticket)
        self._waiting.move_to_end(user, last=False)

    def _name_pages(self, row: Row) -> None:
        """Names the pages that nothing will change any more: the next step writes its modules' entries for the last
        `ahead` + 1 positions."""
        size, last = self.sizes.page_size, row.read - (self._ahead + 1 if self._ahead else 0)
        while self.sizes.reuse and (row.named + 1) * size <= last:
            start = row.named * size
            row.name = page_name(row.name, row.tokens[start:start + size + self._ahead])
            self.pools[row.device].give_name(row.pages[row.named], row.name)
            row.named += 1
