"""Serve a model to clients of the OpenAI API.

  python experiments/serve.py runs/quickstart
  python experiments/serve.py models/moonlight --engine.rows 64 --speculative --name moonlight
  SERVE_API_KEYS=one,another python experiments/serve.py models/moonlight --host 0.0.0.0

It compiles all it will need, and then prints one line on standard output:

  ready http://127.0.0.1:8000/v1 model quickstart

From then on it logs a line a request to standard error. Any client of that API works, and so does

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "quickstart", "prompt": "We must", "max_tokens": 40, "stream": true}'

Chat (/v1/chat/completions) wants a chat template in the model's folder. GET /health is 200 while the engine works, and
GET /metrics is for Prometheus; neither asks for a key. With --workers it serves with the engines of
experiments/serve_worker.py, prefill and decode apart, which may come and go:

  export SERVE_WORKER_KEY=secret
  python experiments/serve.py runs/quickstart --workers 127.0.0.1:8100
  python experiments/serve_worker.py prefill runs/quickstart --router 127.0.0.1:8100
  python experiments/serve_worker.py decode runs/quickstart --router 127.0.0.1:8100

SIGTERM or Ctrl-C ends it in good order. It speaks plain HTTP:
towards other machines put a proxy in front that does TLS and drops clients which never finish their headers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from typing import Annotated

import tyro

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.pace import Targets
from dsv3_jax.inference.wire import RouterServer
from dsv3_jax.interop.chat_template import ChatTemplate, has_chat_template
from experiments.command_line import finish, say_line
from experiments.inference_options import (
    EngineOptions,
    GeneratorOptions,
    address,
    load_engine,
    log,
    tokenizer_in,
    worker_key,
)

KEYS_VARIABLE = "SERVE_API_KEYS"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to serve, to whom, and how much of it at a time."""

    folder: Annotated[GeneratorOptions, tyro.conf.arg(name="")]
    engine: EngineOptions = EngineOptions()
    targets: Targets = Targets()
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's."""
    port: int = 8000
    """0 takes any that is free."""
    name: str | None = None
    """What clients call the model; default the folder's name."""
    api_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A key that clients may give, once for each; none: no key is asked for. Whoever lists processes sees it: better in
    the environment variable SERVE_API_KEYS, with commas between."""
    body_bytes: int = 4 * 2 ** 20
    """Longest body of a request."""
    workers: str | None = None
    """Listen on this HOST:PORT for workers, and serve with their engines; options of models and engines are theirs."""
    connections: int = 1024
    """Most connections at a time."""
    grace_s: int = 30
    """Seconds that requests have to end in when the server is stopped."""


def main() -> None:
    """Entry point."""
    arguments = tyro.cli(Arguments, description=__doc__)
    # Here, because the packages are an extra: without them this is one line and not a traceback.
    from dsv3_jax.inference.server.app import Limits, make_app
    from dsv3_jax.inference.server.request import ServedModel
    from dsv3_jax.inference.server.run import HttpServer

    folder = arguments.folder.folder
    tokenizer = tokenizer_in(folder)
    template = ChatTemplate(folder, tokenizer) if has_chat_template(folder) else None
    engine = own_engine(arguments) if arguments.workers is None else engines_of_workers(arguments, arguments.workers)
    model = ServedModel(arguments.name or folder.resolve().name, tokenizer, template, engine.room)
    log(f"requests of up to {engine.room} tokens, {'a' if template else 'no'} chat template")
    app = make_app(engine, model, keys=_keys(arguments), limits=Limits(body_bytes=arguments.body_bytes), log=log)
    with contextlib.closing(engine) if isinstance(engine, RouterServer) else engine:
        server = HttpServer(app, arguments.host, arguments.port, grace_s=arguments.grace_s,
                            connections=arguments.connections,
                            when_ready=lambda url: say_line(f"ready {url}/v1 model {model.name}"))
        # Once it has ended in good order the server raises the signal again, for whoever was there before.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        server.run()
    log("stopped")


def own_engine(arguments: Arguments) -> Engine:
    """An engine in this process."""
    began = time.perf_counter()
    source, engine = load_engine(arguments.folder, arguments.engine, arguments.targets)
    sizes = engine.sizes
    log(f"{source}: {sizes.rows} rows and {sizes.pages} pages of {sizes.page_size} tokens on each device; "
        f"{engine.programs} programs ready in {time.perf_counter() - began:.0f} s")
    return engine


def engines_of_workers(arguments: Arguments, listen: str) -> RouterServer:
    """Those that connect, once there is one of each kind."""
    try:
        router = RouterServer(address(listen, "--workers"), worker_key(), arguments.engine.waiting)
    except OSError as error:
        raise ConfigError(f"cannot listen on --workers ({listen}): {error}; give another") from error
    told = None
    while router.error is not None:
        if str(router.error) != told:
            told = str(router.error)
            log(f"listening for workers on {router.address[0]}:{router.address[1]}: {told}")
        time.sleep(0.1)
    log(f"workers {', '.join(router.workers)}")
    return router


def _keys(arguments: Arguments) -> list[str]:
    keys = [*arguments.api_key, *os.environ.get(KEYS_VARIABLE, "").split(",")]
    if KEYS_VARIABLE in os.environ and not any(keys):
        raise ConfigError(f"{KEYS_VARIABLE} is set but has no key: unset it to serve without, or give one")
    return [key for key in keys if key]


if __name__ == "__main__":
    finish(main)
