"""A server on a free port in this process, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import httpx2
import openai
from watched_reward import PATIENCE

from nabla_trl.cli.commands import serve
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.serving import asgi
from nabla_trl.serving.prompts import make_request_problem
from nabla_trl.serving.requests import ServerLimits
from nabla_trl.serving.server import ChatServer
from nabla_trl.serving.service import SEARCH_SEED, SearchService
from nabla_trl.traces.schema import Trace

CONFIG = SearchConfig(max_new_tokens=6, max_rounds=3)
NAME = "org/policy"
OFFER = ServerLimits(NAME, CONFIG)


class Running:
    """A server on a free port, and clients of it."""

    def __init__(self, url: str, server: ChatServer):
        self.url, self.server = url, server

    def client(self, key: str = "unused", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=PATIENCE, **options)

    def ask(self, question: str, **options: Any) -> Any:
        with self.client() as client:
            return ask(client, question, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url.removesuffix("/v1") + path, timeout=PATIENCE, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        return httpx2.request(method, self.url.removesuffix("/v1") + path, timeout=PATIENCE, **options)

    def post(self, content: bytes, **headers: str) -> httpx2.Response:
        headers = {"content-type": "application/json", **headers}
        return httpx2.post(f"{self.url}/chat/completions", content=content, headers=headers, timeout=PATIENCE)

    def stop(self) -> None:
        self.server.should_exit = True


def ask(client: openai.OpenAI, question: str, **options: Any) -> Any:
    options = {"model": NAME, "messages": [{"role": "user", "content": question}], **options}
    return client.chat.completions.create(**options)


@contextmanager
def serving(
    policy: Policy,
    reward: Reward,
    offer: ServerLimits = OFFER,
    *,
    max_queue: int = 1000,
    server_options: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Any]:
    """Serve until the end of the block.

    Args:
        server_options: as for `ChatServer`.
        options: as for `ChatService`.
    """
    listener, ready = serve.bind_socket("127.0.0.1", 0), Event()
    service = asgi.ChatService(SearchService(policy, reward, max_queue=max_queue), offer, **options)
    server = ChatServer(service, ready.set, **(server_options or {}))
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        yield Running(serve.format_base_url(listener), server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        service.searches.stop()
        service.searches.join()
        service.close()
        assert not thread.is_alive()


def direct(policy: Policy, reward: Reward, question: str, seed: int, config: SearchConfig = CONFIG) -> Trace:
    """What the library gives, without a server."""
    problem = make_request_problem([{"role": "user", "content": question}], seed)
    return run_search([problem], policy=policy, reward=reward, config=config, seed=SEARCH_SEED)[0]
