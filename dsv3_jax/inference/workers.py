"""Prefill and decode apart: an engine of each kind, and the messages between them and the router.

A prefill worker reads a prompt and pushes what its cache holds to the decode worker that the router named. It keeps the
pages until that one says they are in place. Tokens go to the router from whoever draws them. Every message names the
request and the attempt, so that what an abandoned attempt still sends is told from what counts.

A message is a header (a dictionary that JSON can hold, with `kind`, `job` and `attempt`) and maybe a `Handover`. How it
travels is the sender's concern: in one process as it is (`Mailboxes`), between processes by `wire`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.handover import Handover, request_from_json
from dsv3_jax.inference.request import Finish, Request, Ticket
from dsv3_jax.inference.scheduler import Busy

ROUTER = "router"
Header = dict[str, Any]
Send = Callable[[str, Header, Handover | None], None]
"""(to whom, header, handover): sends a message and does not wait. One that cannot be delivered is lost in silence: the
router learns of a lost worker by itself."""


class Worker(Protocol):
    """What has messages sent to it."""

    name: str

    def handle(self, header: Header, handover: Handover | None) -> None:
        """Takes a message; any thread may, and it does not wait."""


class _Jobs:
    """The attempts that a worker works on."""

    def __init__(self, name: str, send: Send):
        self.name, self._send = name, send
        self._tickets: dict[tuple[int, int], Ticket] = {}
        self._headers: dict[int, Header] = {}
        self._lock = threading.Lock()

    def begin(self, header: Header, engine: Engine, request: Request, start: Callable[[Ticket], None],
              given: int = 0) -> None:
        """Starts an attempt, whose tokens go to the router; `given` of them it has already."""
        count = given

        def listen(ids: Sequence[int], finish: Finish | None) -> None:
            nonlocal count
            if finish is not None:
                self._forget(ticket)
            if ids or finish is not None:
                self.tell(header, "tokens", at=count, ids=list(ids), finish=None if finish is None else finish.value)
            count += len(ids)
        ticket: Ticket | None = None
        try:
            ticket = engine.new_ticket(request, listen)
            with self._lock:
                self._tickets[header["job"], header["attempt"]], self._headers[ticket.number] = ticket, header
            start(ticket)
        except (Busy, ConfigError, RuntimeError) as error:
            self._forget(ticket)
            why = "request" if isinstance(error, ConfigError) else "busy" if isinstance(error, Busy) else "engine"
            self.tell(header, "refused", why=why, says=str(error))

    def find(self, header: Header) -> Ticket | None:
        """The ticket of the attempt that a message is about, if it goes on."""
        with self._lock:
            return self._tickets.get((header["job"], header["attempt"]))

    def header_of(self, ticket: Ticket) -> Header | None:
        """What an attempt began with, if it goes on."""
        with self._lock:
            return self._headers.get(ticket.number)

    def tell(self, header: Header, kind: str, to: str = ROUTER, **more: Any) -> None:
        """Sends word of an attempt."""
        self._send(to, {"kind": kind, "job": header["job"], "attempt": header["attempt"], "from": self.name, **more},
                   None)

    def cancel(self, header: Header) -> None:
        """Ends an attempt."""
        ticket = self.find(header)
        if ticket is not None:
            ticket.cancel()

    def _forget(self, ticket: Ticket | None) -> None:
        with self._lock:
            header = None if ticket is None else self._headers.pop(ticket.number, None)
            if header is not None:
                self._tickets.pop((header["job"], header["attempt"]), None)


class PrefillWorker:
    """Reads prompts. `make_engine` is given the engine's `hand_over`."""

    def __init__(self, name: str, make_engine: Callable[[Callable[[Ticket, Handover], None]], Engine], send: Send):
        self.name, self._send = name, send
        self._jobs = _Jobs(name, send)
        self.engine = make_engine(self._push)

    def handle(self, header: Header, handover: Handover | None) -> None:
        """`read`: a prompt, for the worker `header["deliver_to"]`; `placed`: that one has it; `cancel`."""
        match header["kind"]:
            case "read":
                self._jobs.begin(header, self.engine, request_from_json(header["request"]), self.engine.put)
            case "placed":
                ticket = self._jobs.find(header)
                if ticket is not None:
                    self.engine.acknowledge(ticket)
            case "cancel":
                self._jobs.cancel(header)

    def _push(self, ticket: Ticket, handover: Handover) -> None:
        """From the engine's thread."""
        header = self._jobs.header_of(ticket)
        if header is not None:
            self._send(header["deliver_to"], {"kind": "take", "job": header["job"], "attempt": header["attempt"],
                                              "from": self.name}, handover)


class DecodeWorker:
    """Goes on with what prefill workers have read."""

    def __init__(self, name: str, engine: Engine, send: Send):
        self.name, self.engine = name, engine
        self._jobs = _Jobs(name, send)

    def handle(self, header: Header, handover: Handover | None) -> None:
        """`take`: a handover; `cancel`."""
        match header["kind"]:
            case "take":
                assert handover is not None
                given = handover

                def placed() -> None:
                    self._jobs.tell(header, "placed", to=header["from"])
                    self._jobs.tell(header, "placed", ids=[given.first])
                self._jobs.begin(header, self.engine, given.request,
                                 lambda ticket: self.engine.receive(ticket, given, placed), given=1)
            case "cancel":
                self._jobs.cancel(header)


class Mailboxes:
    """Delivers messages within one process, in order and each in the receiver's own time."""

    def __init__(self) -> None:
        self._boxes: dict[str, queue.SimpleQueue] = {}

    def open(self, worker: Worker) -> None:
        """Begins to deliver to it, in a thread."""
        box = self._boxes[worker.name] = queue.SimpleQueue()

        def deliver() -> None:
            while (message := box.get()) is not None:
                worker.handle(*message)
        threading.Thread(target=deliver, name=f"mail of {worker.name}", daemon=True).start()

    def close(self, name: str) -> None:
        """Delivers no more to it, as if it were lost."""
        self._boxes.pop(name).put(None)

    def send(self, to: str, header: Header, handover: Handover | None) -> None:
        """See `Send`."""
        box = self._boxes.get(to)
        if box is not None:
            box.put((header, handover))
