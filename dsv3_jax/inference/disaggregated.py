"""Prefill and decode apart in one process: workers on meshes of their own behind a router, used like an engine."""

from __future__ import annotations

from collections.abc import Callable

from dsv3_jax.inference.engine import Engine, Totals
from dsv3_jax.inference.handover import Handover
from dsv3_jax.inference.request import Listener, Request, Ticket
from dsv3_jax.inference.router import Router
from dsv3_jax.inference.workers import DecodeWorker, Mailboxes, PrefillWorker

MakePrefill = Callable[[Callable[[Ticket, Handover], None]], Engine]
"""(hand_over) -> an engine that was given it."""


class Disaggregated:
    """A router, and prefill and decode engines that can come and go while it serves.

    Args:
      waiting: most requests that are not decoding yet.

    Attributes:
      router: what answers.
      engines: those that serve, by name.
    """

    error: BaseException | None = None
    """As an engine's; one that fails is lost and the others go on."""

    def __init__(self, waiting: int = 1024):
        self._mail = Mailboxes()
        self.router = Router(self._mail.send, waiting)
        self.engines: dict[str, Engine] = {}
        self._mail.open(self.router)

    def add_prefill(self, name: str, make: MakePrefill) -> Engine:
        """Adds an engine that reads prompts, and starts it."""
        return self._join(PrefillWorker(name, make, self._mail.send))

    def add_decode(self, name: str, engine: Engine) -> Engine:
        """Adds an engine made with `receives`, and starts it."""
        return self._join(DecodeWorker(name, engine, self._mail.send))

    def remove(self, name: str) -> None:
        """Takes an engine out at once, as if it were lost; what it was working on begins again elsewhere."""
        self._mail.close(name)
        self.router.lost(name)
        self.engines.pop(name).stop()

    def submit(self, request: Request, listener: Listener | None = None) -> Ticket:
        """See `Router.submit`; raises `ConfigError` for a request that no engine can serve."""
        for engine in list(self.engines.values())[:1]:
            request.check(engine.on_mesh.model.vocab_size)
        return self.router.submit(request, listener)

    def start(self) -> None:
        """Nothing to do: engines are started when they are added."""

    def stop(self) -> None:
        """Stops all engines."""
        for name in list(self.engines):
            self._mail.close(name)
            self.engines[name].stop()
        self._mail.close(self.router.name)

    def __enter__(self) -> Disaggregated:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def waiting(self) -> int:
        """Requests that no decode engine has yet."""
        return self.router.waiting

    @property
    def running(self) -> int:
        """Requests that decode."""
        return self.router.running

    @property
    def free_pages(self) -> int:
        """Pages that no request holds, of all engines."""
        return sum(engine.free_pages for engine in self.engines.values())

    @property
    def totals(self) -> Totals:
        """Of all engines; requests are the router's."""
        whole = Totals.of_several(engine.totals for engine in self.engines.values())
        whole.requests, whole.refused = self.router.totals.requests, self.router.totals.refused
        return whole

    def _join(self, worker: PrefillWorker | DecodeWorker) -> Engine:
        self.engines[worker.name] = worker.engine
        worker.engine.start()
        self._mail.open(worker)
        self.router.joined(worker.name, prefill=isinstance(worker, PrefillWorker))
        return worker.engine
