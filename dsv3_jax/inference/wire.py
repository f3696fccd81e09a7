"""Messages between the processes of a router and its workers, over TCP.

Workers connect to the router and say who they are; decode workers also listen, and prefill workers connect to them to
push pages, at the address that the router tells with each request. Both ends prove that they know the key
(`multiprocessing.connection`); messages are JSON and arrays, and nothing that arrives is executed. A connection that
ends, or is silent for too long, is a lost worker.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
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

from dsv3_jax.inference.handover import Handover, handover_from, handover_message, pack, unpack
from dsv3_jax.inference.router import Router
from dsv3_jax.inference.workers import ROUTER, Header, Send, Worker

Address = tuple[str, int]
SILENCE_S = 10.0
"""A worker that says nothing for so long is lost. Each says something every third of it."""
_PING = {"kind": "ping"}


class _Line:
    """A connection, written to by a thread of its own so that senders do not wait, and read by another.

    Args:
      on_message: (line, header, handover).
      on_end: called once, when the connection ends or is silent for SILENCE_S.
    """

    def __init__(self, connection: Connection, on_message: Callable[[_Line, Header, Handover | None], None],
                 on_end: Callable[[_Line], None]):
        self._connection, self._on_message, self._on_end = connection, on_message, on_end
        self._outbox: queue.Queue[bytes | None] = queue.Queue()
        self.name = ""
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
        try:
            return self._outbox.get(timeout=SILENCE_S / 3)
        except queue.Empty:
            return pack(_PING)

    def _read(self) -> None:
        with contextlib.suppress(OSError, EOFError):  # the other side is gone
            while wait([self._connection], SILENCE_S):
                header, arrays = unpack(self._connection.recv_bytes())
                if header["kind"] != "ping":
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
    """A router whose workers are other processes.

    Args:
      address: where workers connect; port 0 takes a free one.
      key: that workers must know.
      waiting: see `Router`.
    """

    def __init__(self, address: Address, key: bytes, waiting: int = 1024):
        self.router = Router(self._send, waiting)
        self._lines: dict[str, _Line] = {}
        self._addresses: dict[str, Address] = {}
        self._listener = Listener(address)
        self.address: Address = self._listener.address
        _accept(self._listener, key, lambda connection: _Line(connection, self._message, self._end))

    def close(self) -> None:
        """Takes no more workers and leaves those there are."""
        self._listener.close()
        for line in list(self._lines.values()):
            line.close()

    @property
    def workers(self) -> list[str]:
        """Names of those there are."""
        return sorted(self._lines)

    def _send(self, to: str, header: Header, handover: Handover | None) -> None:
        line = self._lines.get(to)
        if line is not None:
            address = self._addresses.get(header.get("deliver_to", ""))
            line.send(header if address is None else {**header, "address": list(address)}, handover)

    def _message(self, line: _Line, header: Header, handover: Handover | None) -> None:
        if header["kind"] == "hello":
            line.name = header["name"]
            self._lines[line.name] = line
            if header["address"] is not None:
                self._addresses[line.name] = tuple(header["address"])
            self.router.joined(line.name, prefill=header["address"] is None)
        else:
            self.router.handle(header, handover)

    def _end(self, line: _Line) -> None:
        if self._lines.get(line.name) is line:
            del self._lines[line.name]
            self._addresses.pop(line.name, None)
            self.router.lost(line.name)


class WorkerClient:
    """A worker's side: its connection to the router, and those to workers of the other kind.

    Args:
      router: where the router listens.
      make_worker: makes the worker, given how it sends.
      listen: a decode worker's own address, where prefill workers push; None for a prefill worker.
    """

    def __init__(self, router: Address, key: bytes, make_worker: Callable[[Send], Worker],
                 listen: Address | None = None):
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
        self._router = _Line(Client(router, authkey=key), self._message, lambda line: self.gone.set())
        self._router.name = ROUTER
        self._router.send({"kind": "hello", "name": self.worker.name, "address": address})

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
