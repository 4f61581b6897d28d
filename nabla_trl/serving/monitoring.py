"""What a server tells of its requests: an id for each, a line in the log, and numbers for Prometheus."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from nabla_trl.serving.answers import Choice
    from nabla_trl.serving.service import SearchService

REQUEST_ID_HEADER = "x-request-id"
REQUEST_ID_PATTERN = re.compile(r"[\x21-\x7e]{1,128}")
USERINFO_PATTERN = re.compile(r"//[^/?#]*@")
MAX_PATH_CHARS = 120
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
METHODS = ("GET", "POST", "HEAD", "OPTIONS")

access_log = logging.getLogger("nabla_trl.access")


class Metrics:
    """The numbers of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def make(kind: Any, name: str, text: str, labels: Sequence[str] = (), **options: Any) -> Any:
            return kind(f"nabla_{name}", text, labels, registry=self.registry, **options)

        self.requests = make(Counter, "requests", "HTTP requests by path and status.", ["path", "status"])
        self.seconds = make(
            Histogram,
            "request_seconds",
            "Seconds from the headers of a request to the end of its answer.",
            ["path"],
            buckets=SECONDS_BUCKETS,
        )
        self.queue_seconds = make(
            Histogram, "queue_seconds", "Seconds that a search has waited before it began.", buckets=SECONDS_BUCKETS
        )
        self.prompt_tokens = make(Counter, "prompt_tokens", "Tokens of the prompts of answered requests.")
        self.completion_tokens = make(Counter, "completion_tokens", "Tokens of the answers.")
        self.model_tokens = make(
            Counter, "model_tokens", "Tokens that searches have computed, by model and kind of work.", ["work"]
        )
        self.flops = make(Counter, "flops", "FLOPs of answered searches.")
        self.search_seconds = make(Counter, "search_seconds", "Seconds of the engine that answered searches took.")
        self.waiting = make(Gauge, "requests_waiting", "Searches that wait in the queue.")
        self.running = make(Gauge, "requests_running", "Searches that run.")
        self.connections = make(Gauge, "connections", "Open connections.")
        self.closed_connections = make(
            Counter, "connections_closed", "Connections that the server has closed, by reason.", ["reason"]
        )

    def watch(self, searches: SearchService) -> None:
        """Show the queue of a service, and how long its searches wait."""
        searches.on_queue_seconds = self.queue_seconds.observe
        self.waiting.set_function(lambda: searches.count_requests()[0])
        self.running.set_function(lambda: searches.count_requests()[1])

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request. Unknown paths count as one, so that clients cannot make up labels."""
        path = "/v1/models" if path.startswith("/v1/models/") else path
        path = path if path in PATHS else "other"
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def count_choices(self, choices: Sequence[Choice], num_choices: int) -> None:
        """Count the tokens and the work of an answer.

        Args:
            num_choices: answers to each prompt, whose tokens count once.
        """
        for choice in choices:
            self.prompt_tokens.inc(choice.num_prompt_tokens if choice.index % num_choices == 0 else 0)
            self.completion_tokens.inc(choice.num_tokens)
            if choice.trace is not None:
                cost = choice.trace.cost
                self.flops.inc(cost.flops)
                self.search_seconds.inc(cost.seconds)
                for work, count in cost.tokens.items():
                    self.model_tokens.labels(work).inc(count)

    def render(self) -> tuple[bytes, str]:
        """Return all numbers in Prometheus' text format, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4


class Monitor:
    """Gives every request an id, counts it, and writes a line about it.

    The id is the client's own `X-Request-Id`, if it is at most 128 printable ASCII characters without spaces. The line
    holds no query, no header and no user name, and every control character is escaped.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, *, access_log: bool):
        self.app, self.metrics, self.access_log = app, metrics, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = given if REQUEST_ID_PATTERN.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        began, status = time.perf_counter(), 499  # the client has gone, if nothing is sent

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            seconds = time.perf_counter() - began
            self.metrics.count_request(scope["path"], status, seconds)
            if self.access_log:
                client = scope.get("client")
                access_log.info(
                    "%s %s %s %d %.3fs %s",
                    client[0] if client else "-",
                    escape(scope["method"]),
                    escape(scope["path"]),
                    status,
                    seconds,
                    request_id,
                )


def escape(path: str) -> str:
    """Return a path on one line without a user name or password, cut at `MAX_PATH_CHARS`."""
    path = USERINFO_PATTERN.sub("//", path[: 4 * MAX_PATH_CHARS])
    path = path.encode("ascii", "backslashreplace").decode()
    path = "".join(char if char.isprintable() and char != " " else f"\\x{ord(char):02x}" for char in path)
    return path if len(path) <= MAX_PATH_CHARS else f"{path[: MAX_PATH_CHARS - 3]}..."
