"""Serve the search over HTTP, with starlette and uvicorn.

The module handles routes, timeouts, disconnected clients and a shutdown that finishes the running requests. It uses
starlette without a framework on top, because `SearchConfig` validates requests and errors have OpenAI's format.
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
from starlette.datastructures import Address
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
    ProgressCallback,
    QueueFull,
    SearchProgress,
    SearchService,
    ServerStopping,
    make_request_problem,
)
from nabla_trl.traces.schema import Trace

MAX_BODY_BYTES = 4 * 2**20  # more than fits into any context
# Clients drop an idle connection after 5 s. The server waits longer, so that no client uses a connection it closes.
KEEP_ALIVE_SECONDS = 75

SubmitRequest = Callable[[ProgressCallback], "Future[Trace]"]


class ClientDisconnected(Exception):
    """The client of a request has closed its connection."""


class ProgressStream:
    """Progress and result of a request at the engine. Closing the stream cancels the request.

    Args:
        submit: submits the request with a progress callback.
        request: the HTTP request, to notice that its client disconnects.
        deadline: time of the event loop's clock, in seconds, at which the request times out.
    """

    def __init__(self, submit: SubmitRequest, request: Request, deadline: float):
        self.loop, self.request, self.deadline = asyncio.get_running_loop(), request, deadline
        self.queue: asyncio.Queue[SearchProgress | None] = asyncio.Queue()
        self.future = submit(self._enqueue)
        self.future.add_done_callback(lambda _: self._enqueue(None))
        self.disconnect_task = asyncio.ensure_future(self._wait_for_disconnect())

    def _enqueue(self, item: SearchProgress | None) -> None:
        """Add progress, or None at the end. The engine's thread calls this method."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    async def _wait_for_disconnect(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    async def get_next(self) -> SearchProgress | Trace:
        """Wait for the next progress, or for the trace at the end.

        Raises:
            ApiError: the request failed or timed out.
            ClientDisconnected: the client closed its connection.
        """
        next_item = asyncio.ensure_future(self.queue.get())
        seconds = self.deadline - self.loop.time()
        try:
            await asyncio.wait({next_item, self.disconnect_task}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            next_item.cancel()
        if next_item.done():
            item = next_item.result()
            return self._get_result() if item is None else item
        if self.disconnect_task.done():
            raise ClientDisconnected
        raise make_timeout_error()

    async def wait_for_trace(self) -> Trace:
        """Wait for the trace and ignore the progress before it."""
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
        """Cancel the request."""
        self.future.cancel()
        self.disconnect_task.cancel()

    def __enter__(self) -> ProgressStream:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def make_stopping_error(error: ServerStopping) -> ApiError:
    """Return the 503 error of a server that shuts down."""
    return ApiError(503, str(error), error_type="server_error", code="shutting_down", headers={"Retry-After": "10"})


def make_timeout_error() -> ApiError:
    """Return the 504 error of a timeout, which clients do not retry because a retry takes as long."""
    message = "the request took longer than this server allows: lower max_flops, max_rounds or max_tokens"
    return ApiError(504, message, error_type="timeout_error", code="timeout", headers={"x-should-retry": "false"})


class EventStream(StreamingResponse):
    """A response of server-sent events that closes its request at the end, even if it never begins."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], progress_stream: ProgressStream):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self.progress_stream = progress_stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.progress_stream:
            await super().__call__(scope, receive, send)


class ChatService:
    """The HTTP handlers.

    Args:
        searches: runs the searches.
        limits: default configuration and limits of requests.
        api_key: bearer token that every request except /health must send. None accepts all requests.
        request_timeout: seconds from the headers of a request to its answer.
    """

    def __init__(
        self,
        searches: SearchService,
        limits: ServerLimits,
        *,
        api_key: str | None = None,
        request_timeout: float = 600.0,
    ):
        self.searches, self.limits, self.api_key, self.request_timeout = searches, limits, api_key, request_timeout
        self.created = int(time.time())

    def build_app(self) -> Starlette:
        """Return the application with its routes and error handlers."""
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
        """Answer GET /health."""
        waiting, running = self.searches.count_requests()
        state = {"status": "ok" if self.searches.is_alive else "stopping", "waiting": waiting, "running": running}
        return JSONResponse(state, 200 if self.searches.is_alive else 503)

    async def list_models(self, request: Request) -> Response:
        """Answer GET /v1/models."""
        self.check_authorization(request)
        return JSONResponse({"object": "list", "data": [build_model_entry(self.limits.model_name, self.created)]})

    async def get_model(self, request: Request) -> Response:
        """Answer GET /v1/models/NAME."""
        self.check_authorization(request)
        check_model_name(request.path_params["name"], self.limits)
        return JSONResponse(build_model_entry(self.limits.model_name, self.created))

    async def create_chat_completion(self, request: Request) -> Response:
        """Answer POST /v1/chat/completions with one object or a stream."""
        deadline = asyncio.get_running_loop().time() + self.request_timeout
        self.check_authorization(request)
        try:
            body = await asyncio.wait_for(_read_body(request), self.request_timeout)
        except asyncio.TimeoutError as error:
            raise make_timeout_error() from error
        chat_request = parse_request(parse_json(body), self.limits)
        completion = ChatCompletion(self.limits.model_name, chat_request)
        progress_stream = ProgressStream(
            lambda on_progress: self.submit_chat_request(chat_request, on_progress, request.client), request, deadline
        )
        if not chat_request.stream:
            with progress_stream:
                return JSONResponse(completion.build_completion(await progress_stream.wait_for_trace()))
        try:
            first = await progress_stream.get_next()  # before the status 200 is sent, so that an error has its own
        except BaseException:
            progress_stream.close()
            raise
        return EventStream(_stream_events(completion, first, progress_stream), progress_stream)

    def submit_chat_request(
        self, chat_request: ChatRequest, on_progress: ProgressCallback, address: Address | None
    ) -> Future[Trace]:
        """Submit a request.

        Args:
            address: of the client. Waiting requests of clients with fewer running searches come first.

        Raises:
            ApiError: 429 if the queue is full, 503 if the server shuts down.
        """
        problem = make_request_problem(chat_request.messages, chat_request.seed)
        try:
            return self.searches.submit_request(
                problem,
                chat_request.config,
                on_progress if chat_request.stream else None,
                client=None if address is None else address.host,
            )
        except QueueFull as error:
            code, headers = "rate_limit_exceeded", {"Retry-After": "1"}
            raise ApiError(429, str(error), error_type="requests", code=code, headers=headers) from error
        except ServerStopping as error:
            raise make_stopping_error(error) from error

    def check_authorization(self, request: Request) -> None:
        """Raise the 401 ApiError if the request lacks the API key."""
        if self.api_key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        # The time of this comparison does not depend on where the two differ.
        is_equal = hmac.compare_digest(token.encode("latin-1"), self.api_key.encode())
        if scheme.lower() != "bearer" or not is_equal:
            message, headers = "send a valid API key as a bearer token", {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)


async def _read_body(request: Request) -> bytes:
    """Return the body of a request whose header says JSON.

    Browsers send other types from any web page without asking the server first (CORS).
    """
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
    except ApiError as error:  # the status 200 is already sent
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
        request, ApiError(500, "Internal server error. The server's log has details.", error_type="server_error")
    )


async def _respond_client_disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


# --- the server ---------------------------------------------------------------------------------------


class ChatServer(uvicorn.Server):
    """A uvicorn server that finishes the running requests after Ctrl-C or SIGTERM.

    Waiting requests are refused. A second Ctrl-C ends the running requests at their next round.
    """

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
        self.searches, self.on_started = service.searches, on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections, and call `on_started`."""
        await super().startup(sockets)
        self.on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse the waiting requests, and wait for the running ones."""
        self.searches.stop()
        await super().shutdown(sockets)


def run_server(service: ChatService, listener: socket.socket, on_started: Callable[[], None]) -> None:
    """Serve on a bound socket until a signal, and stop the engine.

    Args:
        on_started: called when the server accepts connections.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
    """
    try:
        ChatServer(service, on_started).run(sockets=[listener])
    finally:
        service.searches.stop()
        service.searches.join()
