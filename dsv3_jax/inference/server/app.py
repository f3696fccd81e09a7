"""The OpenAI API's endpoints over an engine: an ASGI application.

A request's way: key, body within limits, parsing and tokenizing in a thread, into the engine's line, and out as one
object or as events. A client that goes away ends its answers at once, wherever they are.
"""

from __future__ import annotations

import dataclasses
import hmac
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

try:
    import anyio
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import Message, Receive, Scope, Send
except ImportError as missing:
    raise ImportError('serving needs the package starlette: pip install "dsv3-jax[serve]"') from missing

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.scheduler import Busy
from dsv3_jax.inference.server.answer import Answer, Serves
from dsv3_jax.inference.server.body import ApiError
from dsv3_jax.inference.server.metrics import CONTENT_TYPE, Metrics
from dsv3_jax.inference.server.reply import DONE, Form, event
from dsv3_jax.inference.server.request import Asked, ServedModel, parse_request

Log = Callable[[str], None]
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may cost."""

    body_bytes: int = 4 * 2 ** 20
    """Longest body."""
    read_s: float = 30.0
    """Seconds in which a body must have come."""
    write_s: float = 60.0
    """Seconds in which a client must take what it is sent; then its answers are cancelled."""
    retry_after_s: int = 1
    """What a client is told to wait when the line is full."""


def make_app(engine: Serves, model: ServedModel, *, keys: Sequence[str] = (), limits: Limits = Limits(),
             log: Log = lambda line: None) -> Starlette:
    """The application.

    Args:
      engine: running, and stopped only after the server.
      keys: of which clients must give one for all under /v1; none: no key is asked for.
      log: gets one line for each request for text.

    Returns:
      The application; its `state.stop` ends all answers, and lets their clients know.
    """
    api = _Api(engine, model, keys, limits, log)
    app = Starlette(
        routes=[Route(_CHAT, api.chat, methods=["POST"]), Route(_COMPLETIONS, api.completions, methods=["POST"]),
                Route("/v1/models", api.models), Route("/v1/models/{name:path}", api.model),
                Route("/health", api.health), Route("/metrics", api.metrics)],
        exception_handlers={ApiError: _refused, HTTPException: _not_found, ClientDisconnect: _gone,
                            Exception: _broken})
    app.state.stop = api.stop
    return app


class _Api:
    """The endpoints."""

    def __init__(self, engine: Serves, model: ServedModel, keys: Sequence[str], limits: Limits, log: Log):
        self._engine, self._model, self._limits, self._log = engine, model, limits, log
        self._keys = [key.encode() for key in keys]
        self._metrics, self._created = Metrics(engine), int(time.time())
        self._answers: set[Answer] = set()
        self._told_failure = False

    def stop(self) -> None:
        for answer in self._answers:
            answer.stop()

    async def chat(self, request: Request) -> _Reply:
        return await self._text(request, _CHAT)

    async def completions(self, request: Request) -> _Reply:
        return await self._text(request, _COMPLETIONS)

    async def _text(self, request: Request, path: str) -> _Reply:
        arrived_s = time.perf_counter()
        try:
            line = self._key(request)
            body = await self._body(request)
            asked = await run_in_threadpool(parse_request, body, path == _CHAT, self._model, line)
            answer = self._submitted(asked)
        except Exception as error:
            gone = 499 if isinstance(error, ClientDisconnect) else 500
            status = error.status if isinstance(error, ApiError) else gone
            self._metrics.ended(path, _outcome(status))
            self._log(f"{path} {status} {str(error)[:300]!r}")  # quoted: it may repeat what the client wrote
            raise
        self._answers.add(answer)
        return _Reply(answer, Form(asked.chat, self._model.name, asked.include_usage), asked.stream,
                      self._limits.write_s, lambda reply: self._ended(path, reply, arrived_s))

    async def models(self, request: Request) -> Response:
        self._key(request)
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        self._key(request)
        if (name := request.path_params["name"]) != self._model.name:
            raise ApiError(404, f"model ({name}) is not served here: ask for {self._model.name}", param="model",
                           code="model_not_found")
        return JSONResponse(self._about())

    async def health(self, request: Request) -> Response:
        error = self._engine.error
        return JSONResponse({"status": "ok"} if error is None else {"status": "failed", "error": str(error)},
                            200 if error is None else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    def _about(self) -> dict[str, Any]:
        return {"id": self._model.name, "object": "model", "created": self._created, "owned_by": "dsv3_jax",
                "max_model_len": self._model.room}

    def _key(self, request: Request) -> str:
        """Which client it is, by the key it gives."""
        if not self._keys:
            return ""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        # All are compared, each in constant time: how long it takes tells nothing.
        same = [hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self._keys]
        if kind.lower() != "bearer" or True not in same:
            raise ApiError(401, "the API key is missing or wrong: send the header Authorization: Bearer KEY",
                           code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return f"{same.index(True)}/"

    async def _body(self, request: Request) -> bytes:
        """All of the body, unless it is longer than it may be."""
        limit, body = self._limits.body_bytes, bytearray()
        told = request.headers.get("content-length", "")
        try:
            with anyio.fail_after(self._limits.read_s):
                if told.isdecimal() and int(told) > limit:
                    raise _too_large(limit)
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise _too_large(limit)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {self._limits.read_s} s", code="timeout",
                           headers={"Connection": "close"}) from None
        return bytes(body)

    def _submitted(self, asked: Asked) -> Answer:
        try:
            return Answer(self._engine, asked, self._model.tokenizer)
        except Busy as error:
            raise ApiError(429, f"the server is busy: {error}", code="busy",
                           headers={"Retry-After": str(self._limits.retry_after_s)}) from error
        except ConfigError as error:
            raise ApiError(400, str(error), param="messages" if asked.chat else "prompt") from error
        except RuntimeError as error:
            raise ApiError(503, str(error), code="engine_failed") from error

    def _ended(self, path: str, reply: _Reply, arrived_s: float) -> None:
        self._answers.discard(reply.answer)
        self._metrics.answered(reply.answer, arrived_s)
        self._metrics.ended(path, _outcome(reply.status))
        self._log(f"{path} {reply.status} {reply.form.id} {_summary(reply.answer, arrived_s)}")
        if self._engine.error is not None and not self._told_failure:
            self._told_failure = True
            self._log("the engine has failed:\n" + "".join(traceback.format_exception(self._engine.error)))


class _Reply:
    """Sends an answer as it comes, as long as there is somebody to send it to.

    Attributes:
      status: of HTTP, 499 if the client was gone; what a stream that broke off would have said.
    """

    def __init__(self, answer: Answer, form: Form, stream: bool, write_s: float, ended: Callable[[_Reply], None]):
        self.answer, self.form, self.status = answer, form, 499
        self._stream, self._write_s, self._when_ended = stream, write_s, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with anyio.create_task_group() as group:
                async def until_gone() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    group.cancel_scope.cancel()

                async def patiently(message: Message) -> None:
                    with anyio.move_on_after(self._write_s) as patience:
                        await send(message)
                    if patience.cancelled_caught:
                        group.cancel_scope.cancel()
                        await anyio.lowlevel.checkpoint()
                group.start_soon(until_gone)
                if self._stream:
                    await self._events(patiently)
                else:
                    await (await self._object())(scope, receive, patiently)
                group.cancel_scope.cancel()
        except Exception:
            self.status = 500
            raise
        finally:
            self.answer.cancel()
            self._when_ended(self)

    async def _object(self) -> Response:
        try:
            async for _ in self.answer.pieces():
                pass
        except ApiError as error:
            self.status = error.status
            return _refusal(error)
        self.status = 200
        return JSONResponse(self.form.whole(self.answer))

    async def _events(self, send: Send) -> None:
        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})
        await send({"type": "http.response.start", "status": 200, "headers": [
            (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no")]})  # proxies are to hand events on as they come
        openings = [self.form.opening(choice) for choice in self.answer.choices]
        await write(b"".join(event(each) for each in openings if each is not None))
        try:
            async for choice, text in self.answer.pieces():
                await write(event(self.form.piece(choice, text)))
        except ApiError as error:
            self.status = error.status
            await write(event(error.as_json()), more=False)
            return
        closing = self.form.closing(self.answer)
        self.status = 200
        await write((b"" if closing is None else event(closing)) + DONE, more=False)


def _summary(answer: Answer, arrived_s: float) -> str:
    """Of an answer, for the log."""
    usage, now_s = answer.usage, time.perf_counter()
    finish = ",".join(str(choice.finish or "cancelled") for choice in answer.choices)
    first_s = min((first_s - arrived_s for choice in answer.choices
                   if (first_s := choice.ticket.first_token_s) is not None), default=None)
    return (f"prompt_tokens {usage.prompt} cached_tokens {usage.reused} completion_tokens {usage.new} finish {finish} "
            f"first_s {'none' if first_s is None else f'{first_s:.3f}'} seconds {now_s - arrived_s:.3f}")


def _outcome(status: int) -> str:
    """Of a request, in the words of the metrics."""
    named = {200: "ok", 429: "busy", 499: "disconnected"}
    return named.get(status, "failed" if status >= 500 else "invalid")


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"the body is longer than the {limit} bytes that it may have", code="body_too_large")


def _refusal(error: ApiError) -> Response:
    return JSONResponse(error.as_json(), error.status, error.headers)


async def _refused(request: Request, error: Any) -> Response:
    return _refusal(error)


async def _not_found(request: Request, error: Any) -> Response:
    """No such address, or not with this method."""
    return _refusal(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}",
                             headers=error.headers))


async def _gone(request: Request, error: Any) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _broken(request: Request, error: Any) -> Response:
    """A mistake of ours: the client learns nothing of it, the log everything."""
    return _refusal(ApiError(500, "the server made a mistake", code="internal_error"))
