"""The service over HTTP, on starlette and uvicorn: routes, time-outs, clients that go, an end that loses nothing.

starlette rather than a framework on top of it: requests are checked by the reasoner's own configuration and errors
have OpenAI's shape, so that models and errors of a framework's own would only have to be undone.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nabla_trl.models.prompts import PromptTooLong
from nabla_trl.serving.api import (
    Answer,
    ApiError,
    ChatRequest,
    Offer,
    check_model,
    model_card,
    read_json,
    read_request,
)
from nabla_trl.serving.service import Engine, Progress, QueueFull, Stopping, Watch, request_problem
from nabla_trl.traces.schema import Trace

MAX_BODY = 4 * 2**20  # bytes: more than any context holds
KEEP_ALIVE = 75  # seconds: clients drop an idle connection after 5, and must not meet one that is being closed here

Submit = Callable[[Watch], "Future[Trace]"]


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Pending:
    """A request at the engine, awaited: progress as it comes, then the trace. Closing it gives the request up.

    Args:
        deadline: seconds of the event loop's clock.
    """

    def __init__(self, submit: Submit, request: Request, deadline: float):
        self.loop, self.request, self.deadline = asyncio.get_running_loop(), request, deadline
        self.items: asyncio.Queue[Progress | None] = asyncio.Queue()
        self.future = submit(self._put)
        self.future.add_done_callback(lambda _: self._put(None))
        self.gone = asyncio.ensure_future(self._departure())

    def _put(self, item: Progress | None) -> None:
        """From the engine's thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)

    async def _departure(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    async def next(self) -> Progress | Trace:
        """What comes next.

        Raises:
            ApiError: the request failed, or its time is over.
            ClientGone: the connection was closed.
        """
        coming = asyncio.ensure_future(self.items.get())
        left = self.deadline - self.loop.time()
        try:
            await asyncio.wait({coming, self.gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            coming.cancel()
        if coming.done():
            item = coming.result()
            return self._end() if item is None else item
        if self.gone.done():
            raise ClientGone
        raise timed_out()

    async def end(self) -> Trace:
        """The trace, whatever progress comes before it."""
        while not isinstance(item := await self.next(), Trace):
            pass
        return item

    def _end(self) -> Trace:
        try:
            return self.future.result(timeout=0)
        except PromptTooLong as error:
            raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from error
        except ValueError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        except Stopping as error:
            raise stopping(error) from error
        except Exception as error:
            raise ApiError(500, str(error), kind="server_error", code="search_failed") from error

    def close(self) -> None:
        self.future.cancel()
        self.gone.cancel()

    def __enter__(self) -> Pending:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def stopping(error: Stopping) -> ApiError:
    return ApiError(503, str(error), kind="server_error", code="shutting_down", headers={"Retry-After": "10"})


def timed_out() -> ApiError:
    """Clients must not ask again by themselves: it would take as long."""
    message = "the request took longer than this server gives it: ask for fewer FLOPs, rounds or tokens"
    return ApiError(504, message, kind="timeout_error", code="timeout", headers={"x-should-retry": "false"})


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, and even if it never begins, the request is closed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], pending: Pending):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self.pending = pending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.pending:
            await super().__call__(scope, receive, send)


class Service:
    """The handlers.

    Args:
        key: the bearer token that requests must bring, /health aside; None: none.
        timeout: seconds from a request's headers to its answer.
    """

    def __init__(self, engine: Engine, offer: Offer, *, key: str | None = None, timeout: float = 600.0):
        self.engine, self.offer, self.key, self.timeout = engine, offer, key, timeout
        self.created = int(time.time())

    def app(self) -> Starlette:
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientGone: _gone,
            ClientDisconnect: _gone,
            Exception: _own_error,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, request: Request) -> Response:
        waiting, running = self.engine.load()
        state = {"status": "ok" if self.engine.alive else "stopping", "waiting": waiting, "running": running}
        return JSONResponse(state, 200 if self.engine.alive else 503)

    async def models(self, request: Request) -> Response:
        self.authorise(request)
        return JSONResponse({"object": "list", "data": [model_card(self.offer.model, self.created)]})

    async def model(self, request: Request) -> Response:
        self.authorise(request)
        check_model(request.path_params["name"], self.offer)
        return JSONResponse(model_card(self.offer.model, self.created))

    async def chat(self, request: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + self.timeout
        self.authorise(request)
        try:
            body = await asyncio.wait_for(_body(request), self.timeout)
        except asyncio.TimeoutError as error:
            raise timed_out() from error
        asked = read_request(read_json(body), self.offer)
        answer = Answer(self.offer.model, asked)
        pending = Pending(lambda watch: self.submit(asked, watch), request, deadline)
        if not asked.stream:
            with pending:
                return JSONResponse(answer.completion(await pending.end()))
        try:
            first = await pending.next()  # before the status is sent: what fails by now has a status of its own
        except BaseException:
            pending.close()
            raise
        return EventStream(_events(answer, first, pending), pending)

    def submit(self, asked: ChatRequest, watch: Watch) -> Future[Trace]:
        problem = request_problem(asked.messages, asked.seed)
        try:
            return self.engine.submit(problem, asked.config, watch if asked.stream else None)
        except QueueFull as error:
            code, headers = "rate_limit_exceeded", {"Retry-After": "1"}
            raise ApiError(429, str(error), kind="requests", code=code, headers=headers) from error
        except Stopping as error:
            raise stopping(error) from error

    def authorise(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(token.encode("latin-1"), self.key.encode())  # takes as long wherever they differ
        if scheme.lower() != "bearer" or not same:
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(
                401, "a valid API key must be given, as a bearer token", code="invalid_api_key", headers=headers
            )


async def _body(request: Request) -> bytes:
    """The body of a request, JSON by its header: a web page elsewhere could send other types without being asked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "the content type must be application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise ApiError(413, f"the body is larger than {MAX_BODY} bytes", code="request_too_large")
    return bytes(body)


async def _events(answer: Answer, first: Progress | Trace, pending: Pending) -> AsyncIterator[str]:
    yield _event(answer.chunk({"role": "assistant", "content": ""}))
    item = first
    try:
        while not isinstance(item, Trace):
            yield _event(answer.progress(item))
            item = await pending.next()
        for chunk in answer.last_chunks(item):
            yield _event(chunk)
    except ApiError as error:  # the status is sent already
        yield _event(error.body)
    except ClientGone:
        return
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _api_error(request, ApiError(error.status_code, message, headers=error.headers))


async def _own_error(request: Request, error: Exception) -> Response:
    return await _api_error(request, ApiError(500, "the server made a mistake; its log has more", kind="server_error"))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


# --- the server ---------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """Ctrl-C or SIGTERM refuses what waits and finishes what runs; a second Ctrl-C ends that at the next round."""

    def __init__(self, service: Service, started: Callable[[], None]):
        super().__init__(
            uvicorn.Config(
                service.app(), timeout_keep_alive=KEEP_ALIVE, log_level="warning", access_log=False, lifespan="off"
            )
        )
        self.engine, self.announce = service.engine, started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.stop()
        await super().shutdown(sockets)


def run(service: Service, listener: socket.socket, started: Callable[[], None]) -> None:
    """Serve on a bound socket until a signal says stop (KeyboardInterrupt after Ctrl-C), and end the engine.

    Args:
        started: called once connections are taken.
    """
    try:
        Server(service, started).run(sockets=[listener])
    finally:
        service.engine.stop()
        service.engine.join()
