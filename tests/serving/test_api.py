"""api and asgi: OpenAI's chat completions, asked by the official client over a real server."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import httpx2
import openai
import pytest
import worlds
from watched_reward import PATIENCE, Gate, Watched

from nabla_trl.cli.commands import serve
from nabla_trl.cli.main import main
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.serving import asgi
from nabla_trl.serving.api import ApiError, ChatRequest, ServerLimits, build_usage, parse_json, parse_request
from nabla_trl.serving.service import SEARCH_SEED, SearchProgress, SearchService, make_request_problem
from nabla_trl.traces.schema import Trace

CONFIG = SearchConfig(max_new_tokens=6, max_rounds=3)
NAME = "org/policy"
OFFER = ServerLimits(NAME, CONFIG)


class Running:
    """A server on a free port, and clients of it."""

    def __init__(self, url: str, server: asgi.ChatServer):
        self.url, self.server = url, server

    def client(self, key: str = "unused", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=PATIENCE, **options)

    def ask(self, question: str, **options: Any) -> Any:
        with self.client() as client:
            return ask(client, question, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url.removesuffix("/v1") + path, timeout=PATIENCE, **options)

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
    policy: Policy, reward: Reward, offer: ServerLimits = OFFER, *, max_queue: int = 1000, **options: Any
) -> Iterator[Any]:
    listener, ready = serve.bind_socket("127.0.0.1", 0), Event()
    service = asgi.ChatService(SearchService(policy, reward, max_queue=max_queue), offer, **options)
    server = asgi.ChatServer(service, ready.set)
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        yield Running(serve.format_base_url(listener), server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        service.searches.join()
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(policy: Policy, scalar_reward: Reward) -> Iterator[Running]:
    with serving(
        policy, scalar_reward, ServerLimits(NAME, CONFIG, max_request_flops=1e9), api_key="sesame"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client("sesame") as client:
        yield client


@pytest.fixture
def watched(scalar_reward: Reward) -> Watched:
    return Watched(scalar_reward)


def direct(policy: Policy, reward: Reward, question: str, seed: int, config: SearchConfig = CONFIG) -> Trace:
    """What the library gives, without a server."""
    problem = make_request_problem([{"role": "user", "content": question}], seed)
    return run_search([problem], policy=policy, reward=reward, config=config, seed=SEARCH_SEED)[0]


# --- requests that are read -------------------------------------------------------------------------------


def read(offer: ServerLimits = OFFER, **fields: Any) -> ChatRequest:
    return parse_request({"model": NAME, "messages": [{"role": "user", "content": "1+2"}], **fields}, offer)


def test_a_plain_request_takes_the_servers_configuration_and_any_seed() -> None:
    first, second = read(), read()
    assert first.config is CONFIG and not first.stream
    assert first.seed != second.seed


def test_options_reach_the_configuration() -> None:
    request = read(max_completion_tokens=4, temperature=0.5, top_p=0.9, max_rounds=2, max_flops=10**9, seed=7, top_k=3)
    assert request.seed == 7
    assert request.config == SearchConfig(
        max_new_tokens=4, temperature=0.5, top_p=0.9, max_rounds=2, max_flops=1e9, top_k=3
    )


@pytest.mark.parametrize("server_options", [{}, {"solver": {"target_kl": 1.0}}, {"beta": 0.25}, {"solver": "none"}])
def test_a_step_of_the_request_replaces_the_servers(server_options: dict[str, Any]) -> None:
    offer = ServerLimits(NAME, SearchConfig(**server_options))
    assert read(offer, beta=0.5).config == SearchConfig(**{"solver": offer.default_config.solver.name, "beta": 0.5})
    if server_options == {"solver": "none"}:
        with pytest.raises(ApiError, match="target_kl needs solver mirror, and this server runs solver none"):
            read(offer, target_kl=3)
    else:
        assert read(offer, target_kl=3).config == SearchConfig(solver={"target_kl": 3.0})


def test_the_servers_budget_is_the_default_and_the_limit() -> None:
    assert read(ServerLimits(NAME, CONFIG, max_request_flops=5.0)).config.max_flops == 5.0
    assert read(ServerLimits(NAME, SearchConfig(max_flops=3.0), max_request_flops=5.0)).config.max_flops == 3.0
    assert read(ServerLimits(NAME, CONFIG, max_request_flops=5.0), max_flops=5).config.max_flops == 5.0
    worlds.refused(
        lambda: ServerLimits(NAME, SearchConfig(max_flops=9.0), max_request_flops=5.0),
        "max_flops",
        "max_request_flops",
    )
    worlds.refused(
        lambda: ServerLimits(NAME, SearchConfig(acceptance="metropolis"), max_request_flops=5.0), "metropolis"
    )


def test_messages_may_have_parts_and_empty_fields() -> None:
    messages = [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]},
        {"role": "assistant", "content": "d", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "e"},
    ]
    pairs = [(message["role"], message["content"]) for message in read(messages=messages).messages]
    assert pairs == [("system", "a"), ("user", "bc"), ("assistant", "d"), ("user", "e")]


def test_what_asks_for_nothing_is_taken() -> None:
    neutral = {"n": 1, "tools": [], "logprobs": False, "response_format": {"type": "text"}, "presence_penalty": 0.0}
    assert read(**neutral, user="me", stop=None, functions=None).config is CONFIG


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": 2}, "n", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
        ({"logprobs": True}, "logprobs", "unsupported_value"),
        ({"stop": ["#"]}, "stop", "unsupported_value"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
        ({"bata": 0.5}, "bata", "unknown_parameter"),
        ({"batch_size": 4}, "batch_size", "unknown_parameter"),
        ({"num_starts": 10**9}, "num_starts", "unknown_parameter"),
        ({"messages": []}, "messages", None),
        ({"messages": "1+2"}, "messages", None),
        ({"messages": ["1+2"]}, "messages[0]", None),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages[0].role", None),
        ({"messages": [{"role": ["user"], "content": "1"}]}, "messages[0].role", None),
        ({"messages": [{"role": "user"}]}, "messages[0].content", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", None),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", None),
        ({"messages": [{"role": "user", "content": "1", "name": "x"}]}, "messages[0].name", "unknown_parameter"),
        ({"model": None}, "model", None),
        ({"seed": 1.5}, "seed", "invalid_type"),
        ({"seed": True}, "seed", "invalid_type"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", None),
        ({"stream": True, "stream_options": {"obfuscate": 1}}, "stream_options.obfuscate", "unknown_parameter"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"beta": 10**400}, "beta", "invalid_type"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": 7}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": 0}, None, "invalid_value"),
        ({"beta": -1}, None, "invalid_value"),
        ({"beta": 1, "target_kl": 1}, None, "invalid_value"),
        ({"max_flops": -1}, None, "invalid_value"),
        ({"top_p": 0}, None, "invalid_value"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], param: str | None, code: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert caught.value.status == 400
    error = caught.value.body["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


@pytest.mark.parametrize(("old", "new"), [("flops", "max_flops"), ("rounds", "max_rounds"), ("kl", "target_kl")])
def test_the_refusal_of_a_renamed_field_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ApiError, match=f"^{old} is not supported: it is now '{new}'$"):
        read(**{old: 1})


@pytest.mark.parametrize("flops", [0, 5.1])
def test_budgets_above_the_limit_are_refused(flops: float) -> None:
    with pytest.raises(ApiError, match="limited to 5"):
        read(ServerLimits(NAME, CONFIG, max_request_flops=5.0), max_flops=flops)


def test_rounds_above_the_limit_are_refused() -> None:
    limits = ServerLimits(NAME, SearchConfig(max_rounds=4), max_request_rounds=8)
    assert read(limits, max_rounds=8).config.max_rounds == 8
    with pytest.raises(ApiError, match="max_rounds is limited to 8"):
        read(limits, max_rounds=9)
    own_rounds = ServerLimits(NAME, SearchConfig(max_rounds=12), max_request_rounds=8)
    assert read(own_rounds, max_rounds=12).config.max_rounds == 12


@pytest.mark.parametrize("body", [b"", b"{", b'{"beta": NaN}', b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="not valid JSON"):
        parse_json(body)


# --- answers ----------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_library_gives(client, policy, scalar_reward) -> None:
    completion = ask(client, "12-3+4*5", seed=3, extra_body={"beta": 0.5, "max_flops": 5e7})
    trace = direct(
        policy, scalar_reward, "12-3+4*5", 3, SearchConfig(max_new_tokens=6, max_rounds=3, beta=0.5, max_flops=5e7)
    )
    [choice] = completion.choices
    assert (choice.message.role, choice.message.content) == ("assistant", trace.response)
    assert choice.finish_reason == ("stop" if trace.finished else "length")
    assert (completion.object, completion.model) == ("chat.completion", NAME) and completion.id.startswith("chatcmpl-")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (
        len(trace.prompt_ids),
        len(trace.response_ids),
    )
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    cost = completion.usage.nabla
    assert cost["flops"] == pytest.approx(trace.cost.flops) and cost["seconds"] > 0
    assert cost["tokens"] == trace.cost.tokens
    assert completion.nabla["reward"] == pytest.approx(trace.reward, abs=1e-5)
    assert completion.nabla["seed"] == 3 and completion.system_fingerprint == trace.meta["config_hash"]


def test_usage_counts_what_all_chains_did(policy, scalar_reward) -> None:
    config = SearchConfig(max_new_tokens=8, max_rounds=2, num_starts=3, num_chains=2)
    progress: list[SearchProgress] = []
    engine = SearchService(policy, scalar_reward)
    problem = make_request_problem([{"role": "user", "content": "12-3+4*5"}], 0)
    usage = build_usage(engine.submit_request(problem, config, progress.append).result(PATIENCE))["nabla"]
    engine.stop()
    accepted = sum(update.round is not None for update in progress)
    assert (usage["starts"], usage["proposals"], usage["accepted"], usage["rejected"]) == (
        3,
        4,
        accepted,
        4 - accepted,
    )


def test_a_request_without_a_seed_names_the_one_it_got(client) -> None:
    completion = ask(client, "12-3+4*5")
    again = ask(client, "12-3+4*5", seed=completion.nabla["seed"])
    assert again.choices[0].message.content == completion.choices[0].message.content


def test_a_stream_tells_of_revisions_and_adds_up_to_the_completion(client, policy, scalar_reward) -> None:
    trace = direct(policy, scalar_reward, "12-3+4*5", 1)
    accepted = [revision for revision in trace.revisions if revision.accepted]
    assert accepted
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(client, "12-3+4*5", seed=1, **options))
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(deltas) == trace.response and chunks[0].choices[0].delta.role == "assistant"
    updates = [chunk.nabla for chunk in chunks[1:-3]]
    assert [update["text"] for update in updates] == [policy.decode(ids) for ids, _ in trace.list_incumbents()]
    assert [update["round"] for update in updates] == [None, *(revision.round for revision in accepted)]
    assert chunks[-2].choices[0].finish_reason == ("stop" if trace.finished else "length")
    assert chunks[-2].nabla["stop"] == "max_rounds"
    assert chunks[-1].choices == [] and chunks[-1].usage.nabla["proposals"] == 3
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_clients_own_stream_helper_reads_it(client) -> None:
    messages: Any = [{"role": "user", "content": "7"}]
    with client.chat.completions.stream(model=NAME, messages=messages, seed=3) as stream:
        completion = stream.get_final_completion()
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].message.content == ask(client, "7", seed=3).choices[0].message.content


def test_the_model_is_listed(client, server) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "nabla_trl"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_health_needs_no_key(server) -> None:
    assert server.get("/health").json() == {"status": "ok", "waiting": 0, "running": 0}


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"n": 2}, openai.BadRequestError, "unsupported_value"),
        ({"extra_body": {"max_flops": 2e9}}, openai.BadRequestError, "invalid_value"),
        ({"messages": [{"role": "user", "content": "1" * 200}]}, openai.BadRequestError, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "love"}]}, openai.BadRequestError, "invalid_value"),
        ({"messages": [{"role": "user", "content": "love"}], "stream": True}, openai.BadRequestError, "invalid_value"),
    ],
)
def test_the_client_raises_the_right_error(client, options: dict[str, Any], kind: type, code: str) -> None:
    with pytest.raises(kind) as caught:
        ask(client, "1+2", **options)
    assert caught.value.code == code and caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("key", ["wrong", "sesam", "sesamee", "Sesame"])
def test_without_the_key_nothing_is_told(server, key: str) -> None:
    with server.client(key) as stranger:
        for action in (lambda: ask(stranger, "1+2"), stranger.models.list, lambda: stranger.models.retrieve("x")):
            with pytest.raises(openai.AuthenticationError) as caught:
                action()
            assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("value", [None, b"sesame", b"Basic sesame", b"Bearer", b"Bearer s\xc3\xa9same"])
def test_other_headers_are_no_key(server, value: bytes | None) -> None:
    answer = server.get("/v1/models", headers={} if value is None else {b"authorization": value})
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert server.get("/v1/models", headers={"Authorization": "bearer sesame"}).status_code == 200


def test_other_mistakes_have_the_apis_shape(policy, scalar_reward) -> None:
    with serving(policy, scalar_reward) as server:
        answers = {
            404: server.get("/v1/completions"),
            405: server.get("/v1/chat/completions"),
            413: server.post(b'"' + b"1" * (asgi.MAX_BODY_BYTES + 1)),
            400: server.post(b"{"),
        }
        typed = server.post(b"{}", **{"content-type": "text/plain"})
    for status, answer in [*answers.items(), (400, typed)]:
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_search_that_breaks_is_status_500_for_its_request_alone(policy, watched, caplog) -> None:
    def broken(questions: list[str]) -> None:
        if "7" in questions:
            raise RuntimeError("no such luck")

    watched.before = broken
    with serving(policy, watched) as server, ThreadPoolExecutor(8) as pool:
        futures = {question: pool.submit(server.ask, question, seed=0) for question in worlds.QUESTIONS}
        for question, future in futures.items():
            if question == "7":
                with pytest.raises(openai.InternalServerError, match="no such luck"):
                    future.result(PATIENCE)
            else:
                assert future.result(PATIENCE).choices[0].finish_reason


def test_a_request_out_of_time_is_status_504_and_its_search_ends(policy, watched) -> None:
    watched.before = gate = Gate("7")
    with serving(policy, watched, request_timeout=0.2) as server:
        with pytest.raises(openai.InternalServerError) as caught:
            server.ask("7")
        assert caught.value.status_code == 504 and caught.value.code == "timeout"
        assert caught.value.response.headers["x-should-retry"] == "false"
        gate.opened.set()
    assert watched.scored == [["7"]]


def test_a_stream_out_of_time_ends_with_an_error(policy, watched) -> None:
    scored = iter([None, Gate("7")])
    gates: list[Gate] = []

    def hold(questions: list[str]) -> None:
        if (gate := next(scored)) is not None:
            gates.append(gate)
            gate(questions)

    watched.before = hold
    with serving(policy, watched, request_timeout=0.5) as server, server.client() as client:
        with pytest.raises(openai.APIError, match="took longer"):
            list(ask(client, "7", stream=True))
        gates[0].opened.set()


def test_more_than_may_wait_get_status_429(policy, watched) -> None:
    watched.before = gate = Gate("1+2")
    with serving(policy, watched, max_queue=1) as server, ThreadPoolExecutor(8) as pool:
        first = pool.submit(server.ask, "1+2")
        assert gate.reached.wait(PATIENCE)
        rest = [pool.submit(server.ask, "7") for _ in range(3)]
        refused = [future.exception(PATIENCE) for future in _first_done(rest, 2)]
        assert all(isinstance(error, openai.RateLimitError) for error in refused)
        assert refused[0].code == "rate_limit_exceeded" and refused[0].response.headers["retry-after"] == "1"
        gate.opened.set()
        assert first.result(PATIENCE).choices[0].finish_reason
        assert sum(future.exception(PATIENCE) is None for future in rest) == 1


def _first_done(futures: list[Any], number: int) -> list[Any]:
    done = Event()
    for future in futures:
        future.add_done_callback(lambda _: done.set() if sum(f.done() for f in futures) >= number else None)
    assert done.wait(PATIENCE)
    return [future for future in futures if future.done()]


# --- many, and those that go ------------------------------------------------------------------------------


def test_200_requests_at_once_lose_none_and_get_what_each_gets_alone(policy, scalar_reward) -> None:
    config = SearchConfig(max_new_tokens=3, max_rounds=1, batch_size=64)
    requests = [(worlds.QUESTIONS[seed % 4], seed) for seed in range(200)]
    with serving(policy, scalar_reward, ServerLimits(NAME, config)) as server, server.client() as client:
        with ThreadPoolExecutor(200) as pool:
            completions = list(pool.map(lambda pair: ask(client, pair[0], seed=pair[1]), requests))
        singles = [ask(client, question, seed=seed) for question, seed in requests[:8]]
    problems = [make_request_problem([{"role": "user", "content": question}], seed) for question, seed in requests]
    traces = run_search(problems, policy=policy, reward=scalar_reward, config=config, seed=SEARCH_SEED)
    contents = [completion.choices[0].message.content for completion in completions]
    assert contents == [trace.response for trace in traces]
    assert contents[:8] == [completion.choices[0].message.content for completion in singles]
    assert len({completion.id for completion in completions}) == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_search_of_a_client_that_goes_is_ended(policy, watched, stream: bool) -> None:
    watched.before = gate = Gate("7")
    with serving(policy, watched, ServerLimits(NAME, SearchConfig(max_new_tokens=6, max_rounds=50))) as server:
        body = {"model": NAME, "messages": [{"role": "user", "content": "7"}], "stream": stream}
        _hang_up(server, body, gate.reached)
        assert _eventually(lambda: server.get("/health").json()["running"] == 0)
        gate.opened.set()
        assert server.ask("1+2", extra_body={"max_rounds": 1}).choices[0].finish_reason
    assert [questions for questions in watched.scored if "7" in questions] == [["7"]]


def test_a_stream_that_is_left_in_the_middle_is_ended(policy, watched) -> None:
    gate = Gate("7")
    scored = iter([False] + [True] * 99)
    watched.before = lambda questions: gate(questions) if next(scored) else None
    with serving(policy, watched, ServerLimits(NAME, SearchConfig(max_new_tokens=6, max_rounds=50))) as server:
        with server.client() as client:
            stream = ask(client, "7", stream=True)
            assert next(iter(stream)).choices[0].delta.role == "assistant"
            assert gate.reached.wait(PATIENCE)
            stream.close()
        assert _eventually(lambda: server.get("/health").json()["running"] == 0)
        gate.opened.set()
    assert len(watched.scored) == 2


def _hang_up(server: Running, body: dict[str, Any], reached: Event) -> None:
    """Send a request, and close the connection once it has been reached."""
    content, address = json.dumps(body).encode(), httpx2.URL(server.url)
    headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    with socket.create_connection((address.host, address.port), timeout=PATIENCE) as connection:
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{headers}\r\n\r\n".encode() + content)
        assert reached.wait(PATIENCE)


def _eventually(true: Any) -> bool:
    """Asked until it is so: each question takes the server a turn of its loop."""
    return any(true() for _ in range(200))


# --- the end, and the command -----------------------------------------------------------------------------


def test_stopping_finishes_what_runs_and_tells_those_who_wait(policy, watched) -> None:
    watched.before = gate = Gate("1+2")
    with serving(policy, watched) as server, ThreadPoolExecutor(8) as pool:
        runs = pool.submit(server.ask, "1+2")
        assert gate.reached.wait(PATIENCE)
        waits = pool.submit(server.ask, "7")
        assert _eventually(lambda: server.get("/health").json()["waiting"] == 1)
        server.stop()
        error = waits.exception(PATIENCE)
        assert isinstance(error, openai.InternalServerError) and error.status_code == 503
        gate.opened.set()
        assert runs.result(PATIENCE).usage.nabla["proposals"] == 3


def test_the_command_serves_until_ctrl_c(policy, scalar_reward, monkeypatch, tmp_path, capsys) -> None:
    """In this process, whose main thread takes the signal."""
    for name, model in (("policy", policy.model), ("reward", worlds.tiny_model(kind="score", seed=1))):
        model.save_pretrained(tmp_path / name)
        policy.tokenizer.save_pretrained(tmp_path / name)
    capsys.readouterr()
    results: list[Any] = []

    def visit(url: str) -> None:
        try:
            with openai.OpenAI(base_url=url, api_key="key", max_retries=0) as client:
                results.append(ask(client, "12-3+4*5", seed=3, model="mine"))
            with openai.OpenAI(base_url=url, api_key="other", max_retries=0) as client:
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()
                results.append("refused")
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    def run(service: asgi.ChatService, listener: socket.socket, started: Any) -> None:
        visitor = Thread(target=visit, args=[serve.format_base_url(listener)])
        try:
            real(service, listener, lambda: (started(), visitor.start()))
        finally:
            visitor.join(PATIENCE)

    real = asgi.run_server
    monkeypatch.setattr(asgi, "run_server", run)
    monkeypatch.setenv(serve.API_KEY_ENV_VAR, "key")
    models = ["--policy", str(tmp_path / "policy"), "--reward", str(tmp_path / "reward")]
    options = ["--port", "0", "--served_model_name", "mine", "--max_new_tokens", "6", "--max_rounds", "3"]
    assert main(["serve", *models, *options]) == 130
    out, err = capsys.readouterr()
    assert out.startswith("serving mine at http://127.0.0.1:") and out.count("\n") == 1 and err == "stopped\n"
    assert results[0].choices[0].message.content == direct(policy, scalar_reward, "12-3+4*5", 3).response
    assert results[1:] == ["refused"]


def test_an_address_in_use_is_refused_before_anything_is_loaded(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--policy", "/nowhere", "--reward", "/nowhere", "--port", port]) == 1
    assert capsys.readouterr().err.startswith(f"error: cannot listen on 127.0.0.1, port {port}: ")


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_a_missing_extra_is_named(capsys, monkeypatch, missing: str) -> None:
    import nabla_trl.serving

    monkeypatch.delitem(sys.modules, "nabla_trl.serving.asgi")
    monkeypatch.delattr(nabla_trl.serving, "asgi")
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["serve", "--policy", "/nowhere", "--reward", "/nowhere"]) == 1
    assert capsys.readouterr().err == f"error: nabla-trl serve needs {missing}: pip install nabla-trl[serve]\n"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--port", "70000"], "port"),
        (["--request_timeout", "nan"], "request_timeout"),
        (["--api_key", ""], "api_key"),
        (["--api_key", "sésame"], "key"),
        (["--max_flops", "2", "--max_request_flops", "1"], "max_request_flops"),
        (["--max_request_rounds", "0"], "max_request_rounds"),
    ],
)
def test_options_that_mean_nothing_are_refused(capsys, options: list[str], word: str) -> None:
    assert main(["serve", "--policy", "/nowhere", "--reward", "/nowhere", *options]) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and word in err
