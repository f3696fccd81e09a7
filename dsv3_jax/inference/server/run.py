"""Listens for an application, and ends in good order."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

try:
    import uvicorn
    from starlette.applications import Starlette
except ImportError as missing:
    raise ImportError('serving needs the packages uvicorn and starlette: pip install "dsv3-jax[serve]"') from missing

from dsv3_jax.config import ConfigError

CLOSING_S = 5
"""Time to tell clients that their answers end here; who has not taken that by then is cut off."""


class HttpServer(uvicorn.Server):
    """Serves with `run()`, until a signal comes or `should_exit` is set.

    It then takes no further connections, lets requests end for `grace_s` seconds, and ends those that have not.

    Args:
      app: of `make_app`.
      port: 0 for any that is free.
      connections: at a time; a client beyond them gets status 503.
      when_ready: called with the address when requests can come.

    Attributes:
      url: the address.

    Raises:
      ConfigError: nobody can listen there.
    """

    def __init__(self, app: Starlette, host: str, port: int, *, grace_s: int = 30, connections: int = 1024,
                 when_ready: Callable[[str], None] = lambda url: None):
        super().__init__(uvicorn.Config(app, http="h11", ws="none", lifespan="off", access_log=False,
                                        log_level="warning", limit_concurrency=connections,
                                        timeout_graceful_shutdown=grace_s + CLOSING_S))
        self._app, self._grace_s = app, grace_s
        self._when_ready, is_v6 = when_ready, ":" in host
        try:
            self._socket = socket.create_server((host, port), family=socket.AF_INET6 if is_v6 else socket.AF_INET)
        except OSError as error:
            raise ConfigError(f"cannot listen on host ({host}), port ({port}): {error}; give others") from error
        self.url = f"http://{f'[{host}]' if is_v6 else host}:{self._socket.getsockname()[1]}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run([self._socket])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._when_ready(self.url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        late = asyncio.get_running_loop().call_later(self._grace_s, self._app.state.stop)
        await super().shutdown(sockets)
        late.cancel()
