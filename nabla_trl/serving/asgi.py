"""The HTTP handlers of the search, with starlette.

The module handles routes, time-outs, disconnected clients and answers during a shutdown. It uses starlette without a
framework on top, because `SearchConfig` validates requests and errors have OpenAI's format.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from nabla_trl.serving.answers import (
    Answer,
    ChatAnswer,
    Choice,
    CompletionAnswer,
    build_model_entry,
    cut_at_stop_string,
    write_tokens,
)
from nabla_trl.serving.fields import ApiError, quote
from nabla_trl.serving.monitoring import REQUEST_ID_HEADER, Metrics, Monitor
from nabla_trl.serving.prompts import PromptEncoder
from nabla_trl.serving.requests import (
    SearchRequest,
    ServerLimits,
    check_model_name,
    parse_chat_request,
    parse_completion_request,
    parse_json,
)
from nabla_trl.serving.service import QueueFull, SearchProgress, SearchService, ServerStopping
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

MAX_BODY_BYTES = 4 * 2**20  # more than fits into any context
MAX_HELD_BYTES = 64 * MAX_BODY_BYTES  # of all requests whose prompts are not in tokens yet
MAX_DRAINED_BYTES = 4 * MAX_BODY_BYTES  # of a larger body, whose client reads the answer only after it has sent it

# What has happened to a choice: a new incumbent of its search, or its trace.
Event = SearchProgress | Trace
ParseRequest = Callable[[Any, ServerLimits], SearchRequest]


class ClientDisconnected(Exception):
    """The client of a request has closed its connection."""


class SearchStream:
    """Progress and results of the searches of one request. Closing the stream cancels them.

    Args:
        service: runs the searches.
        problems: one per choice.
        search_request: as it was read.
        request: the HTTP request, to notice that its client disconnects.
        deadline: time of the event loop's clock, in seconds, at which the request times out.

    Raises:
        ApiError: 429 if the queue is full, 503 if the server shuts down.
    """

    def __init__(
        self,
        service: ChatService,
        problems: Sequence[Problem],
        search_request: SearchRequest,
        request: Request,
        deadline: float,
    ):
        self.loop, self.deadline, self.service = asyncio.get_running_loop(), deadline, service
        self.problems, self.search_request = problems, search_request
        self.client = None if request.client is None else request.client.host
        self.events: asyncio.Queue[tuple[int, SearchProgress | None]] = asyncio.Queue()
        self.futures: list[Future[Any]] = []
        self.disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            for index, problem in enumerate(problems if not search_request.only_prompt else ()):
                self.futures.append(self._submit_search(index, problem))
        except (QueueFull, ServerStopping) as error:
            self.close()
            raise make_queue_error(error) from error

    def _submit_search(self, index: int, problem: Problem) -> Future[Trace]:
        def enqueue(progress: SearchProgress | None) -> None:  # called by the engine's thread
            if not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self.events.put_nowait, (index, progress))

        future = self.service.searches.submit_request(
            problem, self.search_request.config, enqueue if self.search_request.stream else None, client=self.client
        )
        future.add_done_callback(lambda _: enqueue(None))
        return future

    async def list_events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield the index of a choice with its progress, or with its trace at the end, until all have ended.

        Raises:
            ApiError: a search failed, or the request timed out.
            ClientDisconnected: the client closed its connection.
        """
        missing = len(self.futures)
        while missing:
            index, progress = await self._wait(self.events.get())
            if progress is None:
                missing -= 1
                yield index, _get_result(self.futures[index])
            else:
                yield index, progress

    async def build_choice(self, index: int, trace: Trace | None) -> Choice:
        """Return the answer that a trace gives, with log-probabilities if they were asked for."""
        request, problem, policy = self.search_request, self.problems[index], self.service.searches.policy
        prompt_ids = list(problem.prompt_ids or ())
        text = "" if trace is None else cut_at_stop_string(trace.response, request.stop)
        if request.echo:
            prompt = request.prompts[index // request.num_choices]
            text = (prompt if isinstance(prompt, str) else policy.tokenizer.decode(prompt_ids)) + text
        response_ids = [] if trace is None else trace.response_ids
        tokens = None
        if request.num_top_logprobs is not None:
            logprobs = await self._compute_logprobs(problem, response_ids)
            begin = 0 if request.echo else len(prompt_ids)
            tokens = await self._wait(
                self.loop.run_in_executor(
                    self.service.encoder.threads, write_tokens, policy.tokenizer, logprobs, begin
                )
            )
        seed = request.get_seed(index)
        return Choice(index, text, len(prompt_ids), len(response_ids), seed, trace, tokens)

    async def _compute_logprobs(self, problem: Problem, response_ids: Sequence[int]) -> Any:
        num_top = self.search_request.num_top_logprobs or 0
        try:
            future = self.service.searches.submit_scoring(problem, response_ids, num_top, self.client)
        except (QueueFull, ServerStopping) as error:
            raise make_queue_error(error) from error
        self.futures.append(future)
        await self._wait(asyncio.wrap_future(future))
        return _get_result(future)

    async def _wait(self, awaitable: Any) -> Any:
        """Return the result of an awaitable, unless the client, the time or the server ends before.

        Raises:
            ApiError: 504 after the deadline, 503 at the end of a shutdown.
            ClientDisconnected: the client closed its connection.
        """
        task = asyncio.ensure_future(awaitable)
        ended = asyncio.ensure_future(self.service.shutdown_ended.wait())
        seconds = self.deadline - self.loop.time()
        try:
            await asyncio.wait({task, ended, self.disconnected}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
            if not task.done():
                task.cancel()
        if task.done() and not task.cancelled():
            error = task.exception()
            return _raise_search_error(error) if error is not None else task.result()
        if self.disconnected.done():
            raise ClientDisconnected
        if self.service.shutdown_ended.is_set():
            raise make_queue_error(ServerStopping("the server is shutting down, and the request took too long"))
        raise make_timeout_error()

    def close(self) -> None:
        """Cancel the searches."""
        for future in self.futures:
            future.cancel()
        self.disconnected.cancel()

    def __enter__(self) -> SearchStream:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _get_result(future: Future[Any]) -> Any:
    try:
        return future.result(timeout=0)
    except Exception as error:
        return _raise_search_error(error)


def _raise_search_error(error: BaseException) -> Any:
    """Raise the ApiError for the error of a search."""
    if isinstance(error, ApiError):
        raise error
    if isinstance(error, ServerStopping):
        raise make_queue_error(error) from error
    if isinstance(error, ValueError):
        raise ApiError(400, str(error), code="invalid_value") from error
    raise ApiError(500, str(error), error_type="server_error", code="search_failed") from error


def make_queue_error(error: QueueFull | ServerStopping) -> ApiError:
    """Return the 429 error of a full queue, or the 503 error of a server that shuts down."""
    if isinstance(error, QueueFull):
        code, headers = "rate_limit_exceeded", {"Retry-After": "1"}
        return ApiError(429, str(error), error_type="requests", code=code, headers=headers)
    headers = {"Retry-After": "10"}
    return ApiError(503, str(error), error_type="server_error", code="shutting_down", headers=headers)


def make_timeout_error() -> ApiError:
    """Return the 504 error of a timeout, which clients do not retry because a retry takes as long."""
    message = "the request took longer than this server allows: lower max_flops, max_rounds or max_tokens"
    return ApiError(504, message, error_type="timeout_error", code="timeout", headers={"x-should-retry": "false"})


class EventStream(StreamingResponse):
    """A response of server-sent events that closes its searches at the end, even if it never begins."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], searches: SearchStream):
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self.searches = searches

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.searches:
            await super().__call__(scope, receive, send)


class ChatService:
    """The HTTP handlers.

    Args:
        searches: runs the searches.
        limits: default configuration and limits of requests.
        api_key: bearer token that every request except /health and /metrics must send. None accepts all requests.
        request_timeout: seconds from the headers of a request to its answer.
        body_timeout: seconds from the headers of a request to the end of its body.
        cors_origins: origins whose pages may ask this server from a browser, or "*" for all.
        access_log: write a line per request.
        metrics: what /metrics shows. None: new ones.
    """

    def __init__(
        self,
        searches: SearchService,
        limits: ServerLimits,
        *,
        api_key: str | None = None,
        request_timeout: float = 600.0,
        body_timeout: float = 60.0,
        cors_origins: Sequence[str] = (),
        access_log: bool = False,
        metrics: Metrics | None = None,
    ):
        self.searches, self.limits, self.api_key, self.request_timeout = searches, limits, api_key, request_timeout
        self.body_timeout, self.cors_origins, self.access_log = body_timeout, list(cors_origins), access_log
        self.metrics = Metrics() if metrics is None else metrics
        self.metrics.watch(searches)
        self.encoder = PromptEncoder(searches.policy, searches.reward)
        self.created = int(time.time())
        self.num_held_bytes = 0
        self.shutdown_began, self.shutdown_ended = asyncio.Event(), asyncio.Event()

    def build_app(self) -> ASGIApp:
        """Return the application with its routes and error handlers."""
        chat = partial(self.answer, parse=parse_chat_request, answer_type=ChatAnswer)
        completions = partial(self.answer, parse=parse_completion_request, answer_type=CompletionAnswer)
        routes = [
            Route("/health", self.get_health),
            Route("/metrics", self.get_metrics),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.get_model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            ApiError: _respond_api_error,
            HTTPException: _respond_http_error,
            ClientDisconnected: _respond_client_disconnected,
            ClientDisconnect: _respond_client_disconnected,
            Exception: _respond_server_error,
        }
        app: ASGIApp = Starlette(routes=routes, exception_handlers=handlers)
        if self.cors_origins:
            app = CORSMiddleware(
                app,
                allow_origins=self.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=[REQUEST_ID_HEADER],
            )
        return Monitor(app, self.metrics, access_log=self.access_log)

    async def get_health(self, request: Request) -> Response:
        """Answer GET /health."""
        waiting, running = self.searches.count_requests()
        is_ok = self.searches.is_alive and not self.shutdown_began.is_set()
        state = {"status": "ok" if is_ok else "stopping", "waiting": waiting, "running": running}
        return JSONResponse(state, 200 if is_ok else 503)

    async def get_metrics(self, request: Request) -> Response:
        """Answer GET /metrics in Prometheus' text format."""
        content, content_type = self.metrics.render()
        return Response(content, headers={"content-type": content_type})

    async def list_models(self, request: Request) -> Response:
        """Answer GET /v1/models."""
        self.check_authorization(request)
        return JSONResponse({"object": "list", "data": [self.build_model_entry()]})

    async def get_model(self, request: Request) -> Response:
        """Answer GET /v1/models/NAME."""
        self.check_authorization(request)
        check_model_name(request.path_params["name"], self.limits)
        return JSONResponse(self.build_model_entry())

    def build_model_entry(self) -> dict[str, Any]:
        """Return the model of this server as GET /v1/models lists it."""
        return build_model_entry(self.limits.model_name, self.created, self.searches.policy.context_length)

    async def answer(self, request: Request, parse: ParseRequest, answer_type: type[Answer]) -> Response:
        """Answer a request for a search.

        Args:
            parse: reads the request.
            answer_type: writes the answer.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.request_timeout
        self.check_authorization(request)
        with self.hold_body() as count_bytes:
            search_request = parse(parse_json(await self.read_body(request, count_bytes)), self.limits)
            problems = await self.encode(search_request, deadline)
        searches = SearchStream(self, problems, search_request, request, deadline)
        config = search_request.config.with_default_gradient_at(self.searches.reward.gradient_at)
        answer = answer_type(self.limits.model_name, search_request, fingerprint=config.compute_hash())
        if not search_request.stream:
            with searches:
                return JSONResponse(answer.build(await self.collect_choices(searches)))
        try:
            events = searches.list_events()
            first = await anext(events, None)  # before the status 200 is sent, so that an error has its own
        except BaseException:
            searches.close()
            raise
        return EventStream(self.stream_answer(answer, first, events, searches), searches)

    async def encode(self, search_request: SearchRequest, deadline: float) -> list[Problem]:
        """Return one problem per choice, with its prompt in tokens.

        Raises:
            ApiError: the queue is full, the server stops, or a prompt cannot be read.
        """
        loop = asyncio.get_running_loop()
        try:
            self.searches.check_queue()  # before the prompt is tokenized
        except (QueueFull, ServerStopping) as error:
            raise make_queue_error(error) from error
        encoding = loop.run_in_executor(self.encoder.threads, self.encoder.encode, search_request)
        try:
            return await asyncio.wait_for(encoding, deadline - loop.time())
        except asyncio.TimeoutError as error:
            raise make_timeout_error() from error

    async def collect_choices(self, searches: SearchStream) -> list[Choice]:
        """Return all choices in their order, once their searches have ended."""
        traces: dict[int, Trace | None] = dict.fromkeys(range(len(searches.problems)))
        async for index, event in searches.list_events():
            if isinstance(event, Trace):
                traces[index] = event
        choices = [await searches.build_choice(index, trace) for index, trace in traces.items()]
        self.metrics.count_choices(choices, searches.search_request.num_choices)
        return choices

    async def stream_answer(
        self,
        answer: Answer,
        first: tuple[int, Event] | None,
        events: AsyncIterator[tuple[int, Event]],
        searches: SearchStream,
    ) -> AsyncIterator[str]:
        """Yield the events of a stream."""
        choices: list[Choice] = []
        try:
            for index in range(len(searches.problems)):
                for chunk in answer.build_first_chunks(index):
                    yield _format_event(chunk)
            if searches.search_request.only_prompt:
                choices = await self.collect_choices(searches)
                for chunk in (chunk for choice in choices for chunk in answer.build_final_chunks(choice)):
                    yield _format_event(chunk)
            while first is not None:
                index, event = first
                if isinstance(event, Trace):
                    choices.append(await searches.build_choice(index, event))
                    for chunk in answer.build_final_chunks(choices[-1]):
                        yield _format_event(chunk)
                else:
                    yield _format_event(answer.build_progress_chunk(index, event))
                first = await anext(events, None)
            if searches.search_request.include_usage:
                yield _format_event(answer.build_usage_chunk(choices))
        except ApiError as error:  # the status 200 is already sent
            yield _format_event(error.body)
        except ClientDisconnected:
            return
        finally:
            if not searches.search_request.only_prompt:
                self.metrics.count_choices(choices, searches.search_request.num_choices)
        yield "data: [DONE]\n\n"

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

    @contextmanager
    def hold_body(self) -> Iterator[Callable[[int], None]]:
        """Give a function that counts the bytes of a body, which are held until the end of the block.

        The function raises the 503 ApiError if all bodies together are too large.
        """
        num_held = 0

        def count_bytes(num_bytes: int) -> None:
            nonlocal num_held
            num_held += num_bytes
            self.num_held_bytes += num_bytes
            if self.num_held_bytes > MAX_HELD_BYTES:
                message = "too many large requests at a time: try again later"
                headers = {"Retry-After": "1", "Connection": "close"}
                raise ApiError(503, message, error_type="server_error", code="overloaded", headers=headers)

        try:
            yield count_bytes
        finally:
            self.num_held_bytes -= num_held

    async def read_body(self, request: Request, count_bytes: Callable[[int], None]) -> bytes:
        """Return the body of a request whose header says JSON.

        Args:
            count_bytes: called with the number of bytes of every part.

        Raises:
            ApiError: the body is no JSON, compressed or too large, takes too long, or is not complete when the server
                stops.
        """
        # Browsers send other types from any web page without asking the server first (CORS).
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(400, "the content type must be application/json")
        encoding = request.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            message = f"content encoding {quote(encoding)} is not supported: send the body without compression"
            raise ApiError(415, message, code="unsupported_content_encoding")
        # The server asks for the body, if the client waits for that, with the first read.
        waits = request.headers.get("expect", "").strip().lower() == "100-continue"
        if _read_length(request) > (MAX_BODY_BYTES if waits else MAX_DRAINED_BYTES):
            raise make_size_error()
        reading = asyncio.ensure_future(_read_parts(request, count_bytes))
        stopping = asyncio.ensure_future(self.shutdown_began.wait())
        seconds = min(self.body_timeout, self.request_timeout)
        try:
            await asyncio.wait({reading, stopping}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                return reading.result()
        finally:
            stopping.cancel()
            reading.cancel()
        if self.shutdown_began.is_set():
            raise make_queue_error(ServerStopping("the server is shutting down"))
        message = f"the body of the request was not complete after {seconds:g} s"
        headers = {"Connection": "close"}
        raise ApiError(408, message, error_type="timeout_error", code="timeout", headers=headers)

    def begin_shutdown(self, seconds: float) -> None:
        """Refuse requests that wait or are not complete, and end the running ones after some seconds."""
        self.searches.stop()
        self.shutdown_began.set()
        asyncio.get_running_loop().call_later(seconds, self.shutdown_ended.set)

    def close(self) -> None:
        """End the threads that write prompts."""
        self.encoder.close()


async def _read_parts(request: Request, count_bytes: Callable[[int], None]) -> bytes:
    body, num_bytes = bytearray(), 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes <= MAX_BODY_BYTES:
            count_bytes(len(part))
            body += part
        elif num_bytes > MAX_DRAINED_BYTES:
            break
    if num_bytes > MAX_BODY_BYTES:
        raise make_size_error()
    return bytes(body)


def _read_length(request: Request) -> int:
    length = request.headers.get("content-length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else 0


def make_size_error() -> ApiError:
    """Return the 413 error of a body that is too large."""
    message = f"the body is larger than {MAX_BODY_BYTES} bytes"
    return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})


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
