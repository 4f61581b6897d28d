"""monitoring: request ids, the access log, /metrics, and pages of other origins."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

import openai
import pytest
from chat_server import CONFIG, NAME, Running, ask, serving
from prometheus_client.parser import text_string_to_metric_families
from watched_reward import PATIENCE

from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.serving.monitoring import escape
from nabla_trl.serving.requests import ServerLimits


@pytest.fixture(scope="module")
def server(policy: Policy, scalar_reward: Reward) -> Iterator[Running]:
    origins = ["http://localhost:3000"]
    with serving(policy, scalar_reward, ServerLimits(NAME, CONFIG), cors_origins=origins, access_log=True) as running:
        yield running


def read_metrics(server: Running) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_metrics_count_requests_tokens_and_work(server) -> None:
    before = read_metrics(server)
    answer = server.ask("1+2", seed=1)
    with pytest.raises(openai.BadRequestError):
        server.ask("1+2", temperature=-1)
    with server.client() as client:
        usage = list(ask(client, "1+2", stream=True, stream_options={"include_usage": True}))[-1].usage
    server.get("/v1/models/unknown")
    server.get("/made/up")
    metrics = read_metrics(server)
    grown = {key: value - before.get(key, 0.0) for key, value in metrics.items()}
    path = "/v1/chat/completions"
    assert (grown["nabla_requests_total", path, "200"], grown["nabla_requests_total", path, "400"]) == (2, 1)
    assert grown["nabla_requests_total", "/v1/models", "404"] == grown["nabla_requests_total", "other", "404"] == 1
    assert grown["nabla_request_seconds_count", path] == 3 and grown["nabla_queue_seconds_count",] == 2
    assert grown["nabla_completion_tokens_total",] == answer.usage.completion_tokens + usage.completion_tokens
    assert grown["nabla_prompt_tokens_total",] == answer.usage.prompt_tokens + usage.prompt_tokens
    flops = answer.usage.nabla["flops"] + usage.nabla["flops"]
    assert grown["nabla_flops_total",] == pytest.approx(flops)
    assert grown["nabla_model_tokens_total", "policy/decode"] > 0
    assert metrics["nabla_requests_running",] == metrics["nabla_requests_waiting",] == 0
    assert metrics["nabla_connections",] >= 1
    assert not any("/made/up" in label for key in metrics for label in key)


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("abc-1", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("\xe9", False), (None, False)],
)
def test_every_answer_has_the_clients_id_or_a_new_one(server, given: str | None, is_kept: bool) -> None:
    headers = {} if given is None else {"X-Request-Id": given.encode("latin-1")}
    for path in ("/health", "/nothing"):
        request_id = server.get(path, headers=headers).headers["x-request-id"]
        assert (request_id == given) == is_kept and request_id.isascii() and 0 < len(request_id) <= 128


def list_lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "nabla_trl.access"]


def test_the_log_has_one_line_per_request(server, caplog) -> None:
    with caplog.at_level(logging.INFO, "nabla_trl.access"):
        server.ask("1+2")
        server.get("/nothing?key=secret", headers={"Authorization": "Bearer secret", "X-Request-Id": "mine"})
        server.get("/%0a%1b[2Jfake%20line")
        deadline = time.monotonic() + PATIENCE
        while len(lines := list_lines(caplog)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)  # a line is written after its response was sent
    assert len(lines) == 3 and all(line.isprintable() and "secret" not in line for line in lines)
    assert lines[0].startswith("127.0.0.1 POST /v1/chat/completions 200 ")
    assert lines[1].startswith("127.0.0.1 GET /nothing 404 ") and lines[1].endswith(" mine")
    assert lines[2].startswith(r"127.0.0.1 GET /\x0a\x1b[2Jfake\x20line 404 ")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v1/models", "/v1/models"),
        ("http://me:secret@host/v1", "http://host/v1"),
        ("//me:secret@host/v1", "//host/v1"),
        ("/\u202e\x7f\x9b", r"/\u202e\x7f\x9b"),
        ("/" + "a" * 5000, "/" + "a" * 116 + "..."),
    ],
)
def test_a_path_in_the_log_is_one_word_without_a_user(path: str, text: str) -> None:
    assert escape(path) == text


def test_pages_of_allowed_origins_may_ask(server, policy, scalar_reward) -> None:
    preflight = {
        "Origin": "http://localhost:3000",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    for origin, status in (("http://localhost:3000", 200), ("http://evil.example", 400)):
        headers = preflight | {"Origin": origin}
        answer = server.request("OPTIONS", "/v1/chat/completions", headers=headers)
        assert answer.status_code == status
        assert answer.headers.get("access-control-allow-origin") == (origin if status == 200 else None)
    answer = server.get("/health", headers={"Origin": "http://localhost:3000"})
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    with serving(policy, scalar_reward) as closed:
        assert closed.request("OPTIONS", "/v1/chat/completions", headers=preflight).status_code == 405
        assert "access-control-allow-origin" not in closed.get("/health", headers=preflight).headers


def test_models_say_how_long_a_prompt_may_be(server, policy) -> None:
    [model] = server.get("/v1/models").json()["data"]
    assert model["max_model_len"] == policy.context_length == 128 and model["id"] == NAME
    assert server.get(f"/v1/models/{NAME}").json() == model
