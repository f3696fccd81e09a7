"""What a client waits for: the answers to one body, as text, on an event loop.

The engine never waits for a client. Its thread adds tokens to tickets and wakes the loop; the text is made when the
client has taken what came before. So what a slow client leaves lying are the tokens of its own answers, no more than
it asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from dsv3_jax.inference.engine import Totals
from dsv3_jax.inference.request import Finish, Listener, Request, Ticket
from dsv3_jax.inference.server.body import ApiError
from dsv3_jax.inference.server.request import Asked
from dsv3_jax.inference.text import Decoder, TextStream


class Serves(Protocol):
    """What a server needs of an engine, or of whatever stands in front of several."""

    @property
    def totals(self) -> Totals:
        """Counts since it began."""

    @property
    def error(self) -> BaseException | None:
        """What it failed with; None while it works."""

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""

    @property
    def running(self) -> int:
        """Requests that are being answered."""

    @property
    def free_pages(self) -> int:
        """Pages that no request holds."""

    def submit(self, request: Request, listener: Listener | None = None) -> Ticket:
        """Puts a request in line, without waiting; raises as `Engine.submit`."""


class Usage(NamedTuple):
    """Tokens of an answer; those of a prompt count once, however many choices it has."""

    prompt: int
    reused: int
    new: int


class Choice:
    """One answer to one prompt.

    Attributes:
      tokens: that its text is made of, up to the one which completed a stop sequence.
      finish: why it ended, and no text will come; None before.
      ended_s: when; of `time.perf_counter`.
    """

    def __init__(self, index: int, ticket: Ticket, stream: TextStream, shown: str):
        self.index, self.ticket, self.tokens = index, ticket, 0
        self.finish: Finish | None = None
        self.ended_s = 0.0
        self._stream, self._shown, self._pieces = stream, shown, list[str]()

    @property
    def text(self) -> str:
        """What was given out so far."""
        return "".join(self._pieces)

    def advance(self) -> str:
        """Text that has come since the last time."""
        ended = self.ticket.finish  # asked first: what comes between is left for the next time
        pieces, self._shown = [self._shown], ""
        for token in self.ticket.tokens[self.tokens:]:
            self.tokens += 1
            if token not in self.ticket.request.stop_ids:  # the end token has no text
                pieces.append(self._stream.push([token]))
            if self._stream.stopped is not None:
                self.ticket.cancel()
                ended = Finish.STOP
                break
        if ended is not None:
            pieces.append(self._stream.finish())
            self.finish = ended if self._stream.stopped is None else Finish.STOP
            self.ended_s = self.ticket.ended_s or time.perf_counter()
        self._pieces.append("".join(pieces))
        return self._pieces[-1]


class Answer:
    """All choices of a body. Made on the event loop that reads them.

    Raises:
      Busy, ConfigError, RuntimeError: as `Engine.submit`; nothing is left in line.
    """

    def __init__(self, engine: Serves, asked: Asked, decoder: Decoder):
        loop, self._changed = asyncio.get_running_loop(), asyncio.Event()

        def wake(ids: Sequence[int], finish: Finish | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody reads any more
                loop.call_soon_threadsafe(self._changed.set)
        self.choices: list[Choice] = []
        self._per_prompt, self._stopping = asked.choices, False
        try:
            for index, request in enumerate(asked.requests):
                self.choices.append(Choice(index, engine.submit(request, wake), TextStream(decoder, asked.stop),
                                           asked.shown[index]))
        except BaseException:
            self.cancel()
            raise

    async def pieces(self) -> AsyncIterator[tuple[Choice, str]]:
        """Text as it comes, of all choices; the last piece of each when its `finish` is set.

        Raises:
          ApiError: the engine has failed, or engine or server is being stopped.
        """
        left = self.choices
        while left:
            await self._changed.wait()
            self._changed.clear()
            if self._stopping:
                raise _stopping()
            for choice in left:
                text = choice.advance()
                if choice.finish is Finish.ERROR:
                    raise ApiError(500, f"the engine has failed: {choice.ticket.error}", code="engine_failed")
                if choice.finish is Finish.CANCELLED:
                    raise _stopping()
                if text or choice.finish is not None:
                    yield choice, text
            left = [choice for choice in left if choice.finish is None]

    def cancel(self) -> None:
        """Ends what has not ended."""
        for choice in self.choices:
            choice.ticket.cancel()

    def stop(self) -> None:
        """Ends it because the server does, and lets the client know."""
        self._stopping = True
        self.cancel()
        self._changed.set()

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        firsts = [choice.ticket for choice in self.choices[::self._per_prompt]]
        return Usage(sum(len(ticket.request.prompt) for ticket in firsts),
                     sum(ticket.prompt_tokens_reused for ticket in firsts),
                     sum(choice.tokens for choice in self.choices))


def _stopping() -> ApiError:
    return ApiError(503, "the server is being stopped: ask again", code="stopping")
