"""What is asked of the engine, and what the asker holds meanwhile."""

from __future__ import annotations

import dataclasses
import enum
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.sampling import Sampling

_NUMBERS = itertools.count()


class Finish(enum.StrEnum):
    """Why a request ended; the words of the OpenAI API where it has them."""

    STOP = "stop"
    """At one of its `stop_ids`."""
    LENGTH = "length"
    """It has `max_new_tokens`."""
    CANCELLED = "cancelled"
    """`Ticket.cancel`."""
    HANDED_OVER = "handed_over"
    """Another engine goes on with it."""
    ERROR = "error"
    """The engine failed; see `Ticket.error`."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how to go on with it."""

    prompt: np.ndarray
    """int32 ids, at least one."""
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end it; the one that did is the last of the answer."""
    user: str = ""
    """Users have turns: one with many requests does not keep another waiting."""

    def check(self, vocab_size: int) -> None:
        """Raises `ConfigError` for what no engine of a model with that vocabulary can do."""
        if len(self.prompt) == 0 or self.max_new_tokens < 1:
            raise ConfigError(f"nothing to do: a prompt of {len(self.prompt)} tokens and max_new_tokens "
                              f"({self.max_new_tokens}) must both be at least 1")
        low, high = int(np.min(self.prompt)), int(np.max(self.prompt))
        if low < 0 or high >= vocab_size:
            raise ConfigError(f"the prompt has token {high if low >= 0 else low} outside model.vocab_size "
                              f"({vocab_size}): use the tokenizer the model was trained with")


Listener = Callable[[Sequence[int], Finish | None], None]
"""Called with new ids, and at the end with the reason. From the engine's thread: it must not wait."""


class Ticket:
    """A request on its way. Iterating gives new ids as they come; any thread may.

    Attributes:
      tokens: the answer so far.
      finish: why it ended; None before.
      error: what the engine failed with, if it did.
      prompt_tokens_reused: tokens of the prompt that pages of earlier requests held.
    """

    def __init__(self, request: Request, listener: Listener | None = None,
                 on_cancel: Callable[[], None] = lambda: None):
        self.request, self.number = request, next(_NUMBERS)
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.error: BaseException | None = None
        self.prompt_tokens_reused = 0
        self.arrived_s = time.perf_counter()
        self.first_token_s: float | None = None
        self.ended_s: float | None = None
        self._listener, self._on_cancel = listener, on_cancel
        self._changed = threading.Condition()
        self._cancelled = False

    def cancel(self) -> None:
        """Asks the engine to end it, which it does before its next step; what was made so far stays."""
        self._cancelled = True
        self._on_cancel()

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to end it."""
        return self._cancelled

    def __iter__(self) -> Iterator[list[int]]:
        given, ended = 0, False
        while not ended:
            with self._changed:
                while len(self.tokens) == given and self.finish is None:
                    self._changed.wait()
                new, ended = self.tokens[given:], self.finish is not None
            given += len(new)
            if new:
                yield new
        if self.error is not None:
            raise RuntimeError(f"request {self.number} failed: {self.error}") from self.error

    def wait(self, timeout_s: float | None = None) -> list[int]:
        """The whole answer.

        Raises:
          TimeoutError: it has not ended by then.
          RuntimeError: the engine failed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.finish is not None, timeout_s):
                raise TimeoutError(f"request {self.number} has not ended after {timeout_s} s")
        for _ in self:
            pass
        return self.tokens

    def push(self, ids: Sequence[int], finish: Finish | None = None, error: BaseException | None = None) -> None:
        """New ids, and the end; the engine's."""
        now = time.perf_counter()
        with self._changed:
            if ids and self.first_token_s is None:
                self.first_token_s = now
            self.tokens.extend(ids)
            if finish is not None:
                self.ended_s, self.error, self.finish = now, error, finish
            self._changed.notify_all()
        if self._listener is None:
            return
        try:
            self._listener(ids, finish)
        except Exception as problem:  # the listener's, which must not end the engine and all other requests
            print(f"the listener of request {self.number} failed: {problem!r}", file=sys.stderr)
            self._listener = None
            self.cancel()

    def kept(self, ids: Sequence[int]) -> tuple[list[int], Finish | None]:
        """Those of new `ids` that the request still takes, and the end if they are the last."""
        request = self.request
        ids = list(ids[:request.max_new_tokens - len(self.tokens)])
        stop = next((index for index, token in enumerate(ids) if token in request.stop_ids), None)
        if stop is not None:
            return ids[:stop + 1], Finish.STOP
        return ids, Finish.LENGTH if len(self.tokens) + len(ids) >= request.max_new_tokens else None
