"""Messages between the processes of a router and its workers, over TCP.

Workers connect to the router and say who they are, and from time to time how they are; decode workers also listen, and
prefill workers connect to them to push pages, at the address that the router tells with each request. Both ends prove
that they know the key (`multiprocessing.connection`); messages are JSON and arrays, and nothing that arrives is
executed. A connection that ends, or is silent for too long, is a lost worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    Listener,
    answer_challenge,
    deliver_challenge,
    wait,
)
from typing import Any, NamedTuple

from dsv3_jax.inference.engine import Engine, Totals
from dsv3_jax.inference.handover import Handover, handover_from, handover_message, pack, unpack
from dsv3_jax.inference.request import Listener as TicketListener
from dsv3_jax.inference.request import Request, Ticket
from dsv3_jax.inference.router import Router
from dsv3_jax.inference.workers import ROUTER, Header, Send, Worker

Address = tuple[str, int]
SILENCE_S = 10.0
"""A worker that says nothing for so long is lost. Each says something every third of it."""


class WorkerStatus(NamedTuple):
    """How a worker is, as it last said."""

    room: int
    """Most tokens of a request."""
    vocab_size: int
    free_pages: int
    totals: Totals

    @classmethod
    def of(cls, engine: Engine) -> WorkerStatus:
        """Now."""
        return cls(engine.room, engine.on_mesh.model.vocab_size, engine.free_pages, engine.totals)

    def as_json(self) -> Header:
        return {**self._asdict(), "totals": dataclasses.asdict(self.totals)}

    @classmethod
    def from_json(cls, given: Header) -> WorkerStatus:
        return cls(**{**given, "totals": Totals(**given["totals"])})


class _Line:
    """A connection, written to by a thread of its own so that senders do not wait, and read by another.

    Args:
      on_message: (line, header, handover).
      on_end: called once, when the connection ends or is silent for SILENCE_S.
      ping: what is said every third of SILENCE_S.
    """

    def __init__(self, connection: Connection, on_message: Callable[[_Line, Header, Handover | None], None],
                 on_end: Callable[[_Line], None], ping: Callable[[], Header] = lambda: {"kind": "ping"}):
        self._connection, self._on_message, self._on_end, self._ping = connection, on_message, on_end, ping
        self._outbox: queue.Queue[bytes | None] = queue.Queue()
        self.name, self._pinged_s = "", time.monotonic()
        for run in (self._write, self._read):
            threading.Thread(target=run, name="wire", daemon=True).start()

    def send(self, header: Header, handover: Handover | None = None) -> None:
        """Sends a message; what a broken connection does not take is lost."""
        self._outbox.put(pack(header) if handover is None else handover_message(header, handover))

    def close(self) -> None:
        """Ends the connection when all is sent."""
        self._outbox.put(None)

    def _write(self) -> None:
        with contextlib.suppress(OSError):  # the reader sees it too, and tells
            while (message := self._next()) is not None:
                self._connection.send_bytes(message)
            # Not `close`, which would not wake the reader.
            with socket.fromfd(self._connection.fileno(), socket.AF_INET, socket.SOCK_STREAM) as same:
                same.shutdown(socket.SHUT_RDWR)

    def _next(self) -> bytes | None:
        left_s = self._pinged_s + SILENCE_S / 3 - time.monotonic()
        with contextlib.suppress(queue.Empty):
            if left_s > 0:
                return self._outbox.get(timeout=left_s)
        self._pinged_s = time.monotonic()
        return pack(self._ping())

    def _read(self) -> None:
        with contextlib.suppress(OSError, EOFError):  # the other side is gone
            while wait([self._connection], SILENCE_S):
                header, arrays = unpack(self._connection.recv_bytes())
                handover = handover_from(header, arrays) if header["kind"] == "take" else None
                self._on_message(self, header, handover)
        self.close()
        self._on_end(self)
        self._connection.close()


def _accept(listener: Listener, key: bytes, take: Callable[[Connection], object]) -> None:
    """Takes connections of those who know the key, in threads, until the listener is closed."""
    def greet(connection: Connection) -> None:
        try:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
        except (OSError, EOFError, AuthenticationError):
            connection.close()
        else:
            take(connection)

    def run() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=greet, args=(listener.accept(),), name="greet", daemon=True).start()
    threading.Thread(target=run, name="accept", daemon=True).start()


class RouterServer:
    """A router whose workers are other processes; used like an engine.

    Args:
      address: where workers connect; port 0 takes a free one.
      key: that workers must know.
      waiting: see `Router`.
    """

    def __init__(self, address: Address, key: bytes, waiting: int = 1024):
        self.router = Router(self._send, waiting)
        self._lines: dict[str, _Line] = {}
        self._addresses: dict[str, Address] = {}
        self._statuses: dict[str, WorkerStatus] = {}
        self._gone: list[Totals] = []
        self._listener = Listener(address)
        self.address: Address = self._listener.address
        _accept(self._listener, key, lambda connection: _Line(connection, self._message, self._end))

    def submit(self, request: Request, listener: TicketListener | None = None) -> Ticket:
        """See `Router.submit`; raises `ConfigError` for a request that no worker can serve."""
        for status in list(self._statuses.values())[:1]:
            request.check(status.vocab_size)
        return self.router.submit(request, listener)

    def close(self) -> None:
        """Takes no more workers and leaves those there are."""
        self._listener.close()
        for line in list(self._lines.values()):
            line.close()

    @property
    def workers(self) -> list[str]:
        """Names of those there are."""
        return sorted(self._lines)

    @property
    def error(self) -> BaseException | None:
        """That requests wait because nobody is there to read or to decode them; None otherwise."""
        decoding = set(self._addresses)
        if decoding and set(self._lines) - decoding:
            return None
        return RuntimeError(f"no {'prefill' if decoding else 'decode'} worker is connected")

    @property
    def room(self) -> int:
        """Most tokens of a request that all workers have room for; 0 without any."""
        return min((status.room for status in list(self._statuses.values())), default=0)

    @property
    def waiting(self) -> int:
        """Requests that no decode worker has yet."""
        return self.router.waiting

    @property
    def running(self) -> int:
        """Requests that decode."""
        return self.router.running

    @property
    def free_pages(self) -> int:
        """Pages that no request holds, of all workers, as they last said."""
        return sum(status.free_pages for status in list(self._statuses.values()))

    @property
    def totals(self) -> Totals:
        """Of all workers, lost ones too, as they last said; requests are the router's."""
        whole = Totals.of_several([*self._gone, *(status.totals for status in list(self._statuses.values()))])
        whole.requests, whole.refused = self.router.totals.requests, self.router.totals.refused
        return whole

    def _send(self, to: str, header: Header, handover: Handover | None) -> None:
        line = self._lines.get(to)
        if line is not None:
            address = self._addresses.get(header.get("deliver_to", ""))
            line.send(header if address is None else {**header, "address": list(address)}, handover)

    def _message(self, line: _Line, header: Header, handover: Handover | None) -> None:
        if header.get("status") is not None:
            self._statuses[header["name"]] = WorkerStatus.from_json(header["status"])
        if header["kind"] == "hello":
            line.name = header["name"]
            self._lines[line.name] = line
            if header["address"] is not None:
                self._addresses[line.name] = tuple(header["address"])
            self.router.joined(line.name, prefill=header["address"] is None)
        elif header["kind"] != "ping":
            self.router.handle(header, handover)

    def _end(self, line: _Line) -> None:
        if self._lines.get(line.name) is line:
            del self._lines[line.name]
            self._addresses.pop(line.name, None)
            status = self._statuses.pop(line.name, None)
            if status is not None:
                self._gone.append(status.totals)
            self.router.lost(line.name)


class WorkerClient:
    """A worker's side: its connection to the router, and those to workers of the other kind.

    Args:
      router: where the router listens.
      make_worker: makes the worker, given how it sends.
      listen: a decode worker's own address, where prefill workers push; None for a prefill worker.
      status: how the worker is.
    """

    def __init__(self, router: Address, key: bytes, make_worker: Callable[[Send], Worker],
                 listen: Address | None = None, status: Callable[[], WorkerStatus | None] = lambda: None):
        self._key = key
        self._peers: dict[str, _Line] = {}
        self._addresses: dict[str, Address] = {}
        self._lock = threading.Lock()
        self.gone = threading.Event()
        self.worker = make_worker(self._send)
        address = None
        if listen is not None:
            listener = Listener(listen)
            address = listener.address
            _accept(listener, key, lambda connection: _Line(connection, self._message, self._end))

        def say(kind: str, **more: Any) -> Header:
            now = status()
            return {"kind": kind, "name": self.worker.name, "status": None if now is None else now.as_json(), **more}
        self._router = _Line(Client(router, authkey=key), self._message, lambda line: self.gone.set(),
                             lambda: say("ping"))
        self._router.name = ROUTER
        self._router.send(say("hello", address=address))

    def _send(self, to: str, header: Header, handover: Handover | None) -> None:
        if to == ROUTER:
            return self._router.send(header, handover)
        with contextlib.suppress(OSError):  # it is lost, and the router will say what becomes of its requests
            self._line_to(to).send(header, handover)

    def _line_to(self, name: str) -> _Line:
        """A connection to another worker: the one by which it came, or a new one."""
        with self._lock:
            line = self._peers.get(name)
            if line is None:
                if name not in self._addresses:
                    raise ConnectionError(f"worker {name} is not connected")
                line = _Line(Client(self._addresses[name], authkey=self._key), self._message, self._end)
                line.name = name
                line.send({"kind": "hello", "name": self.worker.name})
                self._peers[name] = line
            return line

    def _message(self, line: _Line, header: Header, handover: Handover | None) -> None:
        if header["kind"] == "ping":
            return
        if header["kind"] == "hello":
            line.name = header["name"]
            with self._lock:
                self._peers[line.name] = line
            return
        if "address" in header:
            with self._lock:
                self._addresses[header["deliver_to"]] = tuple(header["address"])
        self.worker.handle(header, handover)

    def _end(self, line: _Line) -> None:
        with self._lock:
            if self._peers.get(line.name) is line:
                del self._peers[line.name]
