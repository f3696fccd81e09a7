"""How the engine shares its time between reading prompts and decoding, by what it measures of both."""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque

RECENT = 32
"""Steps that a measurement looks back at."""
LONGEST_PAUSE = 16
"""Steps after which a prompt is read whatever the target: where steps alone take longer, somebody would starve."""


@dataclasses.dataclass(frozen=True)
class Targets:
    """Latencies to keep, as far as admission and the order of work can. None: the most throughput."""

    seconds_per_token: float | None = None
    """Mean time between tokens of a request: prompts are read in the time that steps leave of it. None: prompts are
    read first, so that steps have many rows."""
    seconds_to_first_token: float | None = None
    """A request that would have to wait longer is refused at once."""


class Pace:
    """Measured times of chunks and steps, and what follows for the next."""

    def __init__(self, targets: Targets = Targets()):
        self._targets = targets
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._chunks: deque[float] = deque(maxlen=RECENT)
        self._read: deque[float] = deque(maxlen=RECENT)
        self._spare_s = 0.0
        self._since_read = 0

    @property
    def reads_first(self) -> bool:
        """Whether steps wait until all rows have read their prompts."""
        return self._targets.seconds_per_token is None

    def did_step(self, seconds: float) -> None:
        """A step of all rows took so long."""
        self._steps.append(seconds)
        self._since_read += 1
        if self._targets.seconds_per_token is not None:
            # What is left over of one step is not saved up for more than one chunk: that would be one long pause.
            most = statistics.median(self._chunks) if self._chunks else 0.0
            spare_s = self._spare_s + self._targets.seconds_per_token - seconds
            self._spare_s = max(-most, min(spare_s, most))

    def did_read(self, seconds: float, tokens: int) -> None:
        """A chunk of so many tokens took so long."""
        self._chunks.append(seconds)
        self._read.append(tokens)
        self._spare_s -= seconds
        self._since_read = 0

    def may_read(self, decoding: int) -> bool:
        """Whether a chunk goes before the next step of so many rows."""
        if self._targets.seconds_per_token is None or not decoding or not self._chunks:
            return True
        return self._spare_s >= statistics.median(self._chunks) or self._since_read >= LONGEST_PAUSE

    def wait_s(self, unread: int) -> float:
        """Estimated seconds until so many tokens are read; 0 while nothing was measured."""
        if not self._chunks:
            return 0.0
        each_s = sum(self._chunks) / max(1, sum(self._read))
        target, step_s = self._targets.seconds_per_token, statistics.median(self._steps) if self._steps else 0.0
        share = 1.0 if target is None else max(target - step_s, 0.05 * target) / target
        return unread * each_s / share

    def is_late(self, unread: int) -> bool:
        """Whether a request behind so many tokens would wait too long for its first."""
        limit = self._targets.seconds_to_first_token
        return limit is not None and self.wait_s(unread) > limit
