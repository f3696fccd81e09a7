"""What other threads want done with an engine's weights and state: by its own thread, a piece between two turns."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import Future


class BetweenTurns:
    """Pieces of work that wait. Who calls from several threads holds a lock, but while waiting for a result."""

    def __init__(self) -> None:
        self._pieces: collections.deque[tuple[Callable[[], None], Future[None]]] = collections.deque()

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def put(self, piece: Callable[[], None]) -> Future[None]:
        """Its end; with the error if it fails, and cancelled if the engine stops before."""
        end: Future[None] = Future()
        self._pieces.append((piece, end))
        return end

    def do_one(self) -> bool:
        """Does the first, if there is any."""
        if not self._pieces:
            return False
        piece, end = self._pieces.popleft()
        try:
            piece()
        except BaseException as error:
            end.set_exception(error)
            raise
        end.set_result(None)
        return True

    def cancel(self) -> None:
        """All that wait."""
        while self._pieces:
            self._pieces.popleft()[1].cancel()
