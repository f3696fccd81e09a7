"""In front of prefill and decode workers: who gets which request, and what happens when a worker is lost.

The router alone answers. A request whose worker is lost begins again elsewhere, with what was answered so far as the
end of its prompt; what the abandoned attempt still sends is dropped, so that nothing is answered twice. Draws depend on
a request's seed and on positions only, so without drafts the answer is that of one engine whatever was lost (with
drafts and a temperature one of the same distribution).

Pages are pushed from prefill to decode and not through here.
"""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Sequence

import numpy as np

from dsv3_jax.inference.handover import Handover, request_as_json
from dsv3_jax.inference.request import Finish, Listener, Request, Ticket
from dsv3_jax.inference.scheduler import Busy
from dsv3_jax.inference.workers import ROUTER, Header, Send


@dataclasses.dataclass(eq=False)
class _Job:
    """A request until it is answered."""

    number: int
    ticket: Ticket
    attempt: int = 0
    before: int = 0
    """Tokens that were answered before this attempt."""
    prefill: str | None = None
    """Who reads it, until the decode worker has it."""
    decode: str | None = None

    @property
    def left(self) -> Request:
        """What is still to be done: the answer so far has become a part of the prompt."""
        request, ticket = self.ticket.request, self.ticket
        prompt = np.concatenate([request.prompt, np.array(ticket.tokens, np.int32)]).astype(np.int32)
        return dataclasses.replace(request, prompt=prompt, max_new_tokens=request.max_new_tokens - len(ticket.tokens))


@dataclasses.dataclass
class RouterTotals:
    """Since it began."""

    requests: int = 0
    answered: int = 0
    refused: int = 0
    repeated: int = 0
    """Attempts after the first."""
    dropped: int = 0
    """Messages of abandoned attempts."""


class Router:
    """Sends requests to workers and their answers back; see `Engine.submit` for what a caller does with it.

    Args:
      send: delivers messages to workers by name.
      waiting: most requests that are not decoding yet.
    """

    name = ROUTER

    def __init__(self, send: Send, waiting: int = 1024):
        self._send, self._most = send, waiting
        self._prefill: set[str] = set()
        self._decode: set[str] = set()
        self._jobs: dict[int, _Job] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self.totals = RouterTotals()

    def submit(self, request: Request, listener: Listener | None = None) -> Ticket:
        """Takes a request; any thread may.

        Raises:
          Busy: too many wait.
        """
        with self._lock:
            if self.waiting >= self._most:
                self.totals.refused += 1
                raise Busy(f"{self.waiting} requests are waiting, as many as may: try again later")
            number = next(self._numbers)
            ticket = Ticket(request, listener, lambda: self._cancel(number))
            self._jobs[number] = _Job(number, ticket)
            self.totals.requests += 1
            self._begin_what_can()
        return ticket

    @property
    def waiting(self) -> int:
        """Requests that no decode worker has yet."""
        with self._lock:
            return sum(job.decode is None or job.prefill is not None for job in self._jobs.values())

    @property
    def running(self) -> int:
        """Requests that decode."""
        with self._lock:
            return len(self._jobs) - self.waiting

    def joined(self, name: str, prefill: bool) -> None:
        """A worker is there."""
        with self._lock:
            (self._prefill if prefill else self._decode).add(name)
            self._begin_what_can()

    def lost(self, name: str) -> None:
        """A worker is gone: what it was working on begins again."""
        with self._lock:
            self._prefill.discard(name)
            self._decode.discard(name)
            for job in list(self._jobs.values()):
                if name in (job.prefill, job.decode):
                    self._abandon(job)
            self._begin_what_can()

    def handle(self, header: Header, handover: Handover | None = None) -> None:
        """Takes a worker's message: `tokens`, `placed` or `refused`."""
        with self._lock:
            job = self._jobs.get(header["job"])
            if job is None or job.attempt != header["attempt"]:
                self.totals.dropped += 1
                return
            match header["kind"]:
                case "placed":  # with the first token: the prefill worker's own word of it may come later
                    job.prefill = None
                    self._answer(job, 0, header["ids"], None)
                    self._begin_what_can()
                case "tokens":
                    self._answer(job, header["at"], header["ids"], header["finish"])
                case "refused":
                    self._refused(job, header)

    def _refused(self, job: _Job, header: Header) -> None:
        """For good, for now (until something else moves on), or because the worker's engine has failed."""
        match header["why"]:
            case "request":
                self._end(job, Finish.ERROR, RuntimeError(header["says"]))
            case "busy":
                self._abandon(job)
            case "engine":
                self.lost(header["from"])

    def _answer(self, job: _Job, at: int, ids: Sequence[int], finish: str | None) -> None:
        """Passes on what the caller does not have yet: both workers' messages travel on ways of their own."""
        if finish in (Finish.HANDED_OVER, Finish.CANCELLED):
            return
        if finish == Finish.ERROR:
            self._abandon(job)
            self._begin_what_can()
            return
        new = job.before + at - len(job.ticket.tokens)
        if new > 0:
            raise AssertionError(f"request {job.number}: {new} tokens are missing")
        fresh = list(ids[-new:]) if new else list(ids)
        if finish is not None:
            del self._jobs[job.number]
            self.totals.answered += 1
            self._begin_what_can()
        if fresh or finish is not None:
            job.ticket.push(fresh, None if finish is None else Finish(finish))

    def _begin_what_can(self) -> None:
        """Gives every request that nobody works on to the workers that have least to do."""
        if not self._prefill or not self._decode:
            return
        for job in self._jobs.values():
            if job.prefill is None and job.decode is None:
                work = self._work()
                job.prefill = min(sorted(self._prefill), key=lambda name: work[name])
                job.decode = min(sorted(self._decode), key=lambda name: work[name])
                self._send(job.prefill, {"kind": "read", "job": job.number, "attempt": job.attempt, "from": ROUTER,
                                         "deliver_to": job.decode, "request": request_as_json(job.left)}, None)

    def _work(self) -> dict[str, int]:
        """Tokens that each worker is to read, or to make."""
        work = dict.fromkeys([*self._prefill, *self._decode], 0)
        for job in self._jobs.values():
            if job.prefill is not None:
                work[job.prefill] += len(job.ticket.request.prompt) + job.before
            if job.decode is not None:
                work[job.decode] += job.ticket.request.max_new_tokens - len(job.ticket.tokens)
        return work

    def _abandon(self, job: _Job) -> None:
        """The next attempt goes on where the answer ends."""
        for name in (job.prefill, job.decode):
            if name is not None:
                self._tell_cancel(name, job)
        job.attempt, job.before, job.prefill, job.decode = job.attempt + 1, len(job.ticket.tokens), None, None
        self.totals.repeated += 1

    def _cancel(self, number: int) -> None:
        with self._lock:
            job = self._jobs.get(number)
            if job is not None:
                for name in (job.prefill, job.decode):
                    if name is not None:
                        self._tell_cancel(name, job)
                self._end(job, Finish.CANCELLED)

    def _tell_cancel(self, name: str, job: _Job) -> None:
        self._send(name, {"kind": "cancel", "job": job.number, "attempt": job.attempt, "from": ROUTER}, None)

    def _end(self, job: _Job, finish: Finish, error: BaseException | None = None) -> None:
        del self._jobs[job.number]
        job.ticket.push([], finish, error)
