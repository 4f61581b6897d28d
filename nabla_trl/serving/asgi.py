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
    ApiError,
    ChatCompletion,
    ChatRequest,
    ServerLimits,
    build_model_entry,
    check_model_name,
    parse_json,
    parse_request,
)
from nabla_trl.serving.service import (
    Engine,
    ProgressCallback,
    QueueFull,
    SearchProgress,
    ServerStopping,
    make_request_problem,
)
from nabla_trl.traces.schema import Trace

MAX_BODY_BYTES = 4 * 2**20  # bytes: more than any context holds
KEEP_ALIVE_SECONDS = (
    75  # seconds: clients drop an idle connection after 5, and must not meet one that is being closed here
)

SubmitRequest = Callable[[ProgressCallback], "Future[Trace]"]


class ClientDisconnected(Exception):
    """Nobody waits for the answer any more."""


class ProgressStream:
    """A request at the engine, awaited: progress as it comes, then the trace. Closing it gives the request up.

    Args:
        deadline: seconds of the event loop's clock.
    """

    def __init__(self, submit: SubmitRequest, request: Request, deadline: float):
        self.loop, self.request, self.deadline = asyncio.get_running_loop(), request, deadline
        self.queue: asyncio.Queue[SearchProgress | None] = asyncio.Queue()
        self.future = submit(self._enqueue)
        self.future.add_done_callback(lambda _: self._enqueue(None))
        self.disconnect_task = asyncio.ensure_future(self._wait_for_disconnect())

    def _enqueue(self, item: SearchProgress | None) -> None:
        """From the engine's thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    async def _wait_for_disconnect(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    async def get_next(self) -> SearchProgress | Trace:
        """What comes next.

        Raises:
            ApiError: the request failed, or its time is over.
            ClientGone: the connection was closed.
        """
        coming = asyncio.ensure_future(self.queue.get())
        left = self.deadline - self.loop.time()
        try:
            await asyncio.wait({coming, self.disconnect_task}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            coming.cancel()
        if coming.done():
            item = coming.result()
            return self._get_result() if item is None else item
        if self.disconnect_task.done():
            raise ClientDisconnected
        raise make_timeout_error()

    async def wait_for_trace(self) -> Trace:
        """The trace, whatever progress comes before it."""
        while not isinstance(item := await self.get_next(), Trace):
            pass
        return item

    def _get_result(self) -> Trace:
        try:
            return self.future.result(timeout=0)
        except PromptTooLong as error:
            raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from error
        except ValueError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_value") from error
        except ServerStopping as error:
            raise make_stopping_error(error) from error
        except Exception as error:
            raise ApiError(500, str(error), error_type="server_error", code="search_failed") from error

    def close(self) -> None:
        self.future.cancel()
        self.disconnect_task.cancel()

    def __enter__(self) -> ProgressStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def make_stopping_error(error: ServerStopping) -> ApiError:
    return ApiError(503, str(error), error_type="server_error", code="shutting_down", headers={"Retry-After": "10"})


def make_timeout_error() -> ApiError:
    """Clients must not ask again by themselves: it would take as long."""
    message = "the request took longer than this server gives it: ask for fewer FLOPs, rounds or tokens"
    return ApiError(504, message, error_type="timeout_error", code="timeout", headers={"x-should-retry": "false"})


class EventStream(StreamingResponse):
    """Server-sent events; however it ends, and even if it never begins, the request is closed."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], progress_stream: ProgressStream):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self.progress_stream = progress_stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.progress_stream:
            await super().__call__(scope, receive, send)


class ChatService:
    """The handlers.

    Args:
        key: the bearer token that requests must bring, /health aside; None: none.
        timeout: seconds from a request's headers to its answer.
    """

    def __init__(
        self, engine: Engine, limits: ServerLimits, *, api_key: str | None = None, request_timeout: float = 600.0
    ):
        self.engine, self.limits, self.api_key, self.request_timeout = engine, limits, api_key, request_timeout
        self.created = int(time.time())

    def build_app(self) -> Starlette:
        routes = [
            Route("/health", self.get_health),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.get_model),
            Route("/v1/chat/completions", self.create_chat_completion, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _respond_api_error,
            HTTPException: _respond_http_error,
            ClientDisconnected: _respond_client_disconnected,
            ClientDisconnect: _respond_client_disconnected,
            Exception: _respond_server_error,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    async def get_health(self, request: Request) -> Response:
        waiting, running = self.engine.count_requests()
        state = {"status": "ok" if self.engine.is_alive else "stopping", "waiting": waiting, "running": running}
        return JSONResponse(state, 200 if self.engine.is_alive else 503)

    async def list_models(self, request: Request) -> Response:
        self.check_authorization(request)
        return JSONResponse({"object": "list", "data": [build_model_entry(self.limits.model_name, self.created)]})

    async def get_model(self, request: Request) -> Response:
        self.check_authorization(request)
        check_model_name(request.path_params["name"], self.limits)
        return JSONResponse(build_model_entry(self.limits.model_name, self.created))

    async def create_chat_completion(self, request: Request) -> Response:
        deadline = asyncio.get_running_loop().time() + self.request_timeout
        self.check_authorization(request)
        try:
            body = await asyncio.wait_for(_read_body(request), self.request_timeout)
        except asyncio.TimeoutError as error:
            raise make_timeout_error() from error
        asked = parse_request(parse_json(body), self.limits)
        answer = ChatCompletion(self.limits.model_name, asked)
        pending = ProgressStream(lambda watch: self.submit_chat_request(asked, watch), request, deadline)
        if not asked.stream:
            with pending:
                return JSONResponse(answer.build_completion(await pending.wait_for_trace()))
        try:
            first = await pending.get_next()  # before the status is sent: what fails by now has a status of its own
        except BaseException:
            pending.close()
            raise
        return EventStream(_stream_events(answer, first, pending), pending)

    def submit_chat_request(self, chat_request: ChatRequest, on_progress: ProgressCallback) -> Future[Trace]:
        problem = make_request_problem(chat_request.messages, chat_request.seed)
        try:
            return self.engine.submit_request(
                problem, chat_request.config, on_progress if chat_request.stream else None
            )
        except QueueFull as error:
            code, headers = "rate_limit_exceeded", {"Retry-After": "1"}
            raise ApiError(429, str(error), error_type="requests", code=code, headers=headers) from error
        except ServerStopping as error:
            raise make_stopping_error(error) from error

    def check_authorization(self, request: Request) -> None:
        if self.api_key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(
            token.encode("latin-1"), self.api_key.encode()
        )  # takes as long wherever they differ
        if scheme.lower() != "bearer" or not same:
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(
                401, "a valid API key must be given, as a bearer token", code="invalid_api_key", headers=headers
            )


async def _read_body(request: Request) -> bytes:
    """The body of a request, JSON by its header: a web page elsewhere could send other types without being asked."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(400, "the content type must be application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="request_too_large")
    return bytes(body)


async def _stream_events(
    completion: ChatCompletion, first: SearchProgress | Trace, progress_stream: ProgressStream
) -> AsyncIterator[str]:
    yield _format_event(completion.build_chunk({"role": "assistant", "content": ""}))
    item = first
    try:
        while not isinstance(item, Trace):
            yield _format_event(completion.build_progress_chunk(item))
            item = await progress_stream.get_next()
        for chunk in completion.build_final_chunks(item):
            yield _format_event(chunk)
    except ApiError as error:  # the status is sent already
        yield _format_event(error.body)
    except ClientDisconnected:
        return
    yield "data: [DONE]\n\n"


def _format_event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


async def _respond_api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status, headers=error.headers)


async def _respond_http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _respond_api_error(request, ApiError(error.status_code, message, headers=error.headers))


async def _respond_server_error(request: Request, error: Exception) -> Response:
    return await _respond_api_error(
        request, ApiError(500, "the server made a mistake; its log has more", error_type="server_error")
    )


async def _respond_client_disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


# --- the server ---------------------------------------------------------------------------------------


class ChatServer(uvicorn.Server):
    """Ctrl-C or SIGTERM refuses what waits and finishes what runs; a second Ctrl-C ends that at the next round."""

    def __init__(self, service: ChatService, on_started: Callable[[], None]):
        super().__init__(
            uvicorn.Config(
                service.build_app(),
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                log_level="warning",
                access_log=False,
                lifespan="off",
            )
        )
        self.engine, self.on_started = service.engine, on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.engine.stop()
        await super().shutdown(sockets)


def run_server(service: ChatService, listener: socket.socket, on_started: Callable[[], None]) -> None:
    """Serve on a bound socket until a signal says stop (KeyboardInterrupt after Ctrl-C), and end the engine.

    Args:
        started: called once connections are taken.
    """
    try:
        ChatServer(service, on_started).run(sockets=[listener])
    finally:
        service.engine.stop()
        service.engine.join()
