"""An engine that reads prompts, or one that decodes, for a server with --workers (experiments/serve.py).

  export SERVE_WORKER_KEY=secret
  python experiments/serve_worker.py prefill runs/quickstart --router 127.0.0.1:8100
  python experiments/serve_worker.py decode runs/quickstart --router 127.0.0.1:8100 --engine.rows 64
  python experiments/serve_worker.py decode models/v3 --router head:8100 --listen 10.0.0.7:8200 --mesh.scale-up 8

Each has devices and a mesh of its own; the model, its precision, --cache, --speculative and --engine.page-size must be
the same for all. A prefill worker pushes a prompt's pages to the decode worker that the router chose, straight to that
one's --listen address. With --mesh.context devices of a prefill worker share each prompt, which is read sooner. Any
number of either kind may come and go; what a lost one had begins again elsewhere, where its answer ends. It ends when
the server does, or by SIGTERM or Ctrl-C. Connections are not encrypted: keep them inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import time
from typing import Annotated, Any, Literal

import tyro

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.pace import Targets
from dsv3_jax.inference.wire import WorkerClient, WorkerStatus
from dsv3_jax.inference.workers import DecodeWorker, PrefillWorker, Send
from experiments.command_line import finish, say_line
from experiments.inference_options import EngineOptions, GeneratorOptions, address, load_engine, log, worker_key


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What works, and for whom."""

    kind: tyro.conf.Positional[Literal["prefill", "decode"]]
    folder: Annotated[GeneratorOptions, tyro.conf.arg(name="")]
    router: str
    """HOST:PORT that the server listens on for workers."""
    listen: str = "127.0.0.1:0"
    """Of a decode worker: HOST:PORT where prefill workers reach it; port 0 takes any that is free."""
    name: str | None = None
    """Unlike any other worker's; default made of kind, host and process."""
    engine: EngineOptions = EngineOptions()
    targets: Targets = Targets()


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    router, listen, key = address(arguments.router, "--router"), address(arguments.listen, "--listen"), worker_key()
    name = arguments.name or f"{arguments.kind}-{socket.gethostname()}-{os.getpid()}"
    began, engines = time.perf_counter(), list[Engine]()

    def make_engine(**handing_over: Any) -> Engine:
        source, engine = load_engine(arguments.folder, arguments.engine, arguments.targets, **handing_over)
        engines.append(engine)
        log(f"{source}: {engine.programs} programs ready in {time.perf_counter() - began:.0f} s")
        engine.start()
        return engine

    def make_worker(send: Send) -> PrefillWorker | DecodeWorker:
        if arguments.kind == "prefill":
            return PrefillWorker(name, lambda push: make_engine(hand_over=push), send)
        return DecodeWorker(name, make_engine(receives=True), send)
    try:
        client = WorkerClient(router, key, make_worker, listen if arguments.kind == "decode" else None,
                              lambda: WorkerStatus.of(engines[0]))
    except OSError as error:
        raise ConfigError(f"cannot reach --router ({arguments.router}) or listen on --listen ({arguments.listen}): "
                          f"{error}") from error
    say_line(f"ready {name}")
    signal.signal(signal.SIGTERM, lambda *_: client.gone.set())
    with contextlib.suppress(KeyboardInterrupt):
        client.gone.wait()
    engines[0].stop()
    log("stopped")


if __name__ == "__main__":
    finish(main)
