"""JSON over HTTP: retries with back-off, clear errors, and many requests at once."""

from __future__ import annotations

import os
import random
import weakref
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, TypeVar

import httpx2

from nabla_trl.utils.formatting import format_error

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

RETRY_STATUSES = (429, 500, 502, 503, 504)  # may go well next time; any other refusal will not
MAX_BACKOFF_SECONDS = 30.0  # seconds


class HttpClient:
    """What one server answers.

    A key in the environment variable VLLM_API_KEY, which vLLM itself reads, goes along as a bearer token.

    Args:
        url: http://host:port, with or without a last /v1.
        timeout: seconds to wait for an answer; a connection must stand within ten of them.
        retries: how often a request is sent again after a time-out, a lost connection or a status of `AGAIN`.
        backoff: seconds before the first of them, doubled for each further one, times a random number in [0.5, 1.5].

    Raises:
        ValueError: no such URL, or numbers out of range.
    """

    def __init__(self, url: str, *, timeout: float = 600.0, retries: int = 4, backoff: float = 0.5):
        if not timeout > 0 or retries < 0 or not backoff >= 0:
            raise ValueError("a client needs timeout > 0, retries >= 0 and backoff >= 0")
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"{url!r} is not a URL: {format_error(error)}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"a server's URL looks like http://localhost:8000, not {url!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._jitter = random.Random()  # of its own: training seeds the global one
        key = os.environ.get("VLLM_API_KEY")
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=None),  # `concurrently` sets the limit
        )
        weakref.finalize(self, self._http.close)

    def request_json(self, path: str, body: dict[str, Any] | None = None, stop_event: Event | None = None) -> Any:
        """The JSON that `path` answers, to a POST of `body` or to a GET without one. May be called from any thread.

        Args:
            stop: once set, nothing is sent again.

        Raises:
            ConnectionError: no answer, or one of `AGAIN`, as often as was tried.
            ValueError: the server refuses the request, or does not answer in JSON.
        """
        failure = ""
        for tries in range(1, self.retries + 2):
            try:
                response = self._http.request("GET" if body is None else "POST", self.url + path, json=body)
            except httpx2.TimeoutException:
                failure = f"no answer within {self.timeout:g} s"
            except httpx2.RequestError as error:
                failure = format_error(error)
            else:
                if response.status_code not in RETRY_STATUSES:
                    return self._parse_response(response, path)
                failure = f"status {response.status_code} ({_extract_error_message(response)})"
            pause = self.backoff * 2 ** (tries - 1) * self._jitter.uniform(0.5, 1.5)
            if tries > self.retries or (stop_event or Event()).wait(min(pause, MAX_BACKOFF_SECONDS)):
                break
        raise ConnectionError(f"{self.url}{path}: {failure}, tried {tries} time{'s' * (tries > 1)}")

    def _parse_response(self, response: httpx2.Response, path: str) -> Any:
        if response.status_code != 200:
            raise ValueError(
                f"{self.url}{path} refused with status {response.status_code}: {_extract_error_message(response)}"
            )
        try:
            return response.json()
        except ValueError as error:
            raise ValueError(f"{self.url}{path} did not answer in JSON but {response.text[:60]!r}") from error


def _extract_error_message(response: httpx2.Response) -> str:
    """What a server says of an error: vLLM's message, or the beginning of whatever came."""
    try:
        text = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = response.text
    return format_error(ValueError(text or "no message"))


def run_concurrently(
    function: Callable[[ItemT, Event], ResultT], items: Sequence[ItemT], num_threads: int
) -> list[ResultT]:
    """`work(item, stop)` of every item, `threads` of them at a time; the first error sets `stop` and is raised.

    What is under way then is not waited for, and the threads are daemons: a time-out of minutes must hold up neither
    the error nor Ctrl-C, which is why this is no ThreadPoolExecutor.
    """
    todo: SimpleQueue[int] = SimpleQueue()
    done: SimpleQueue[tuple[int, ResultT] | Exception] = SimpleQueue()
    stop = Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                index = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((index, function(items[index], stop)))
            except Exception as error:
                done.put(error)
                stop.set()

    for index in range(len(items)):
        todo.put(index)
    for _ in range(min(num_threads, len(items))):
        Thread(target=serve, daemon=True).start()
    made: dict[int, ResultT] = {}
    try:
        while len(made) < len(items):
            result = done.get()
            if isinstance(result, Exception):
                raise result
            made[result[0]] = result[1]
    finally:
        stop.set()
    return [made[index] for index in range(len(items))]
