"""The HTTP server: uvicorn with time-outs and a cap for connections, and a shutdown that answers every request."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nabla_trl.serving.asgi import ChatService

try:
    import resource
except ModuleNotFoundError:  # not on Windows
    resource = None  # type: ignore[assignment]

# Clients drop an idle connection after 5 s. The server waits longer, so that no client uses a connection it closes.
KEEP_ALIVE_SECONDS = 75
HEADER_SECONDS = 20  # from the first byte of a request, or the connection, to the end of its headers
MAX_HEADER_BYTES = 32 * 2**10
WRITE_SECONDS = 60  # until a client that reads nothing is dropped
RESERVED_FILES = 40  # that models and logs may open, or that are accepted before others are closed
MIN_CONNECTIONS = 4
QUIET_SECONDS = 60.0  # between two lines in the log about the same trouble

log = logging.getLogger("nabla_trl.server")


# What uvicorn says about every client that sends something wrong. Here it is said by `TroubleLog`.
CLIENT_MISTAKES = ("Invalid HTTP request", "Unsupported upgrade request", "No supported WebSocket library")
_BODY = (
    b'{"error": {"message": "too many connections", "type": "requests", "param": null, "code": "rate_limit_exceeded"}}'
)
TOO_MANY_CONNECTIONS = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class TroubleLog:
    """Writes about each kind of trouble once a minute at most, because clients can cause it at will."""

    def __init__(self) -> None:
        self.next_times: dict[str, float] = {}
        self.num_silent: dict[str, int] = {}

    def warn(self, kind: str, message: str) -> None:
        """Write a line, unless there was one of this kind in the last minute."""
        now = time.monotonic()
        if now < self.next_times.get(kind, 0.0):
            self.num_silent[kind] = self.num_silent.get(kind, 0) + 1
            return
        count = self.num_silent.pop(kind, 0)
        log.warning("%s%s", message, f" ({count} more since the last line)" if count else "")
        self.next_times[kind] = now + QUIET_SECONDS


class BoundedProtocol(H11Protocol):
    """A connection with a time-out for headers, whose server has a cap on connections."""

    owner: ChatServer  # set in a subclass per server

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.header_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None
        self.last_active = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.last_active = self.loop.time()
        self._start_header_timer()
        self.owner.make_room(self)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self.header_timer, self.write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self.last_active = self.loop.time()
        if self.is_idle and self.header_timer is None:
            self._start_header_timer()
        super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if not self.is_idle and self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def on_response_complete(self) -> None:
        self.last_active = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self.owner.trouble.warn("invalid", f"a client ({self.client and self.client[0]}) sent what is not HTTP")
        self.owner.count_closed("invalid")
        try:
            super().send_400_response(msg)
        except Exception:  # the answer to an earlier request is on its way
            self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.write_timer = self.loop.call_later(WRITE_SECONDS, self.drop, "unread")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.write_timer is not None:
            self.write_timer.cancel()

    def _start_header_timer(self) -> None:
        self.header_timer = self.loop.call_later(self.owner.header_timeout, self.drop, "headers")

    def drop(self, reason: str) -> None:
        """Close the connection at once."""
        if not self.transport.is_closing():
            self.owner.count_closed(reason)
            self.transport.abort()

    def refuse(self) -> None:
        """Answer that there are too many connections, and close this one."""
        self.owner.count_closed("too_many")
        self.transport.write(TOO_MANY_CONNECTIONS)
        self.transport.close()


class ChatServer(uvicorn.Server):
    """A uvicorn server that answers every request, also after Ctrl-C or SIGTERM.

    After the signal, waiting requests are refused, half-sent ones end at once, and running ones have
    `shutdown_timeout` seconds. A second Ctrl-C ends the running requests at their next round.

    Args:
        service: the handlers.
        on_started: called when the server accepts connections.
        shutdown_timeout: seconds for running requests after the signal.
        max_connections: most open connections, which is lowered to what the process may open. A new connection takes
            the place of the one that is idle for the longest time.
        header_timeout: seconds for the headers of a request.
    """

    def __init__(
        self,
        service: ChatService,
        on_started: Callable[[], None],
        *,
        shutdown_timeout: float = 60.0,
        max_connections: int = 1000,
        header_timeout: float = HEADER_SECONDS,
    ):
        self.max_connections = min(max_connections, count_possible_connections())
        config = uvicorn.Config(
            service.build_app(),
            http=type("ServerProtocol", (BoundedProtocol,), {"owner": self}),
            ws="none",
            backlog=max(32, min(2048, self.max_connections // 2)),  # so many are accepted at a time
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            # Running requests have got their answers by then: what is left does not read them.
            timeout_graceful_shutdown=max(1, round(shutdown_timeout)) + 5,
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_is_about_the_server)
        self.service, self.searches, self.on_started = service, service.searches, on_started
        self.shutdown_timeout, self.header_timeout = shutdown_timeout, header_timeout
        self.trouble = TroubleLog()
        service.metrics.connections.set_function(lambda: len(self.server_state.connections))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections, and call `on_started`."""
        asyncio.get_running_loop().set_exception_handler(self._handle_loop_exception)
        await super().startup(sockets)
        self.on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse waiting and half-sent requests, and wait for the running ones."""
        self.service.begin_shutdown(self.shutdown_timeout)
        await asyncio.sleep(0)
        await super().shutdown(sockets)

    def make_room(self, new: BoundedProtocol) -> None:
        """Close the connection that is idle for the longest time, or refuse the new one, if there are too many."""
        connections = self.server_state.connections
        if len(connections) <= self.max_connections:
            return
        self.trouble.warn("connections", f"more than {self.max_connections} connections: idle ones are closed")
        idle = [one for one in connections if isinstance(one, BoundedProtocol) and one.is_idle and one is not new]
        if idle:
            victim = min(idle, key=lambda one: one.last_active)
            connections.discard(victim)
            victim.drop("idle")
        else:
            new.refuse()

    def count_closed(self, reason: str) -> None:
        """Count a connection that the server has closed."""
        self.service.metrics.closed_connections.labels(reason).inc()

    def _handle_loop_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Write one line where asyncio would write a traceback a second: no more files can be opened."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            self.trouble.warn("files", f"no more connections can be accepted: {error.strerror}")
        else:
            loop.default_exception_handler(context)


def _is_about_the_server(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(CLIENT_MISTAKES)


def count_possible_connections() -> int:
    """Return how many connections this process may open, after raising its limit of files as far as it may."""
    if resource is None:
        return 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError):  # macOS has limits that are not told
            pass
    if soft == resource.RLIM_INFINITY:
        return 2**20
    num_open = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 16
    return max(MIN_CONNECTIONS, soft - num_open - RESERVED_FILES)


def run_server(service: ChatService, listener: socket.socket, on_started: Callable[[], None], **options: Any) -> None:
    """Serve on a bound socket until a signal, and stop the engine.

    Args:
        on_started: called when the server accepts connections.
        options: as for `ChatServer`.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
    """
    try:
        ChatServer(service, on_started, **options).run(sockets=[listener])
    finally:
        service.searches.stop()
        service.searches.join()
        service.close()
