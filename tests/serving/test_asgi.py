"""asgi: OpenAI's completions, asked by the official client over a real server."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread
from typing import Any

import httpx2
import openai
import pytest
import worlds
from chat_server import CONFIG, NAME, Running, ask, direct, serving
from watched_reward import PATIENCE, Gate, Watched

from nabla_trl.cli.commands import serve
from nabla_trl.cli.main import main
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.serving import asgi
from nabla_trl.serving import server as http_server
from nabla_trl.serving.prompts import make_request_problem
from nabla_trl.serving.requests import ServerLimits
from nabla_trl.serving.service import SEARCH_SEED


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
    with serving(policy, scalar_reward, ServerLimits(NAME, config)) as server, server.client() as client:
        chunks = list(ask(client, "12-3+4*5", seed=0, stream=True, stream_options={"include_usage": True}))
    accepted = sum(getattr(chunk, "nabla", {}).get("round") is not None for chunk in chunks)
    usage = chunks[-1].usage.nabla
    counts = (usage["starts"], usage["proposals"], usage["accepted"], usage["rejected"])
    assert counts == (3, 4, accepted, 4 - accepted)


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
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "unsupported_value"),
        ({"extra_body": {"max_flops": 2e9}}, openai.BadRequestError, "decimal_above_max_value"),
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
            404: server.get("/v1/embeddings"),
            405: server.get("/v1/chat/completions"),
            413: server.post(b'"' + b"1" * (asgi.MAX_BODY_BYTES + 1)),
            400: server.post(b"{"),
        }
        typed = server.post(b"{}", **{"content-type": "text/plain"})
    for status, answer in [*answers.items(), (400, typed)]:
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_bodies_are_held_within_a_bound(policy, scalar_reward, monkeypatch) -> None:
    monkeypatch.setattr(asgi, "MAX_HELD_BYTES", 100_000)
    with serving(policy, scalar_reward) as server, server.client() as client:
        answer = server.post(b" " * 200_000)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "overloaded"
        assert answer.headers["retry-after"] == "1"
        for _ in range(3):  # what was held is given back
            assert server.post(b" " * 90_000).status_code == 400
        assert ask(client, "1+2").choices[0].finish_reason
        assert server.server.service.num_held_bytes == 0


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
    with serving(policy, watched, request_timeout=2.0) as server:
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
    with serving(policy, watched, request_timeout=2.0) as server, server.client() as client:
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

    def run(service: asgi.ChatService, listener: socket.socket, started: Any, **options: Any) -> None:
        visitor = Thread(target=visit, args=[serve.format_base_url(listener)])
        try:
            real(service, listener, lambda: (started(), visitor.start()), **options)
        finally:
            visitor.join(PATIENCE)

    real = http_server.run_server
    monkeypatch.setattr(http_server, "run_server", run)
    monkeypatch.setenv(serve.API_KEY_ENV_VAR, "key")
    models = ["--policy", str(tmp_path / "policy"), "--reward", str(tmp_path / "reward")]
    options = ["--port", "0", "--served_model_name", "mine", "--max_new_tokens", "6", "--max_rounds", "3"]
    options += ["--no_access_log"]
    assert main(["serve", *models, *options]) == 130
    out, err = capsys.readouterr()
    assert out.startswith("serving mine at http://127.0.0.1:") and out.count("\n") == 1 and err == "stopped\n"
    assert results[0].choices[0].message.content == direct(policy, scalar_reward, "12-3+4*5", 3).response
    assert results[1:] == ["refused"]


def test_an_address_in_use_is_refused_before_anything_is_loaded(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--policy", "/nowhere", "--reward", "/nowhere", "--port", port]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot listen on 127.0.0.1, port {port}: ")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a b", "x" * 300])
def test_a_host_that_is_none_is_named(capsys, host: str) -> None:
    assert main(["serve", "--policy", "/nowhere", "--reward", "/nowhere", "--host", host, "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot listen on {host!r}"[:60])


@pytest.mark.parametrize("missing", ["starlette", "uvicorn", "prometheus_client"])
def test_a_missing_extra_is_named(capsys, monkeypatch, missing: str) -> None:
    import nabla_trl.serving

    for module in ("asgi", "server", "monitoring"):
        monkeypatch.delitem(sys.modules, f"nabla_trl.serving.{module}")
        monkeypatch.delattr(nabla_trl.serving, module)
    for name in [name for name in sys.modules if name.partition(".")[0] == missing]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["serve", "--policy", "/nowhere", "--reward", "/nowhere"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"error: nabla-trl serve needs {missing}: pip install nabla-trl[serve]" and len(lines) == 4


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--port", "70000"], "port"),
        (["--request_timeout", "nan"], "request_timeout"),
        (["--api_key", ""], "api_key"),
        (["--api_key", "sésame"], "key"),
        (["--max_flops", "2", "--max_request_flops", "1"], "max_request_flops"),
        (["--max_request_rounds", "0"], "max_request_rounds"),
        (["--max_request_starts", "0"], "max_request_starts"),
        (["--max_connections", "0"], "max_connections"),
        (["--header_timeout", "0"], "header_timeout"),
        (["--shutdown_timeout", "nan"], "shutdown_timeout"),
        (["--cors_origins", "example.org"], "cors_origins"),
    ],
)
def test_options_that_mean_nothing_are_refused(capsys, options: list[str], word: str) -> None:
    assert main(["serve", "--policy", "/nowhere", "--reward", "/nowhere", *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.endswith("3 faults. Nothing was started.\n") and word in err
