"""Raw requests, each answered with the status and the shape that OpenAI or vLLM gives them. No sockets.

`AS_EXPECTED` holds what at least one of the two answers so. `DEVIATIONS` holds requests that both accept and this
server refuses, because a search cannot honor them.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
import worlds
from chat_server import NAME

from nabla_trl.search.config import SearchConfig
from nabla_trl.serving.asgi import MAX_BODY_BYTES, ChatService
from nabla_trl.serving.requests import ServerLimits
from nabla_trl.serving.service import SearchService

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "1+2"}
JSON = (("content-type", "application/json"),)


@dataclass(frozen=True)
class Case:
    """A request and its answer.

    Attributes:
        body: a JSON value, or raw bytes.
        param: what the error is about, "" where that is not checked.
    """

    path: str
    body: Any
    status: int
    param: str = ""
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = JSON


def chat(status: int = 200, param: str = "", **fields: Any) -> Case:
    return Case(CHAT, {"model": NAME, "messages": [USER], **fields}, status, param)


def complete(status: int = 200, param: str = "", **fields: Any) -> Case:
    return Case(COMPLETE, {"model": NAME, "prompt": "1+2", **fields}, status, param)


def messages(status: int, param: str, *turns: Any) -> Case:
    return chat(status, param, messages=list(turns))


def get(path: str, status: int, method: str = "GET") -> Case:
    return Case(path, None, status, method=method)


AS_EXPECTED = [
    # Plain requests and values that ask for nothing
    chat(),
    Case(CHAT, {"messages": [USER]}, 200),
    chat(model=None),
    chat(max_tokens=2),
    chat(max_tokens=None),
    chat(max_completion_tokens=2),
    chat(max_tokens=2, max_completion_tokens=2),
    chat(temperature=0),
    chat(temperature=0.7),
    chat(temperature=1),
    chat(temperature=2),
    chat(top_p=1),
    chat(top_p=0.5),
    chat(seed=0),
    chat(seed=-5),
    chat(seed=2**63 - 1),
    chat(n=1),
    chat(n=2),
    chat(n=None),
    chat(stop=None),
    chat(stop=[]),
    chat(stop="#"),
    chat(stop=["#"]),
    chat(stop=["#", ";", "*", "\n"]),
    chat(logprobs=False),
    chat(logprobs=True),
    chat(logprobs=True, top_logprobs=0),
    chat(logprobs=True, top_logprobs=5),
    chat(top_logprobs=0),
    chat(frequency_penalty=0),
    chat(presence_penalty=0.0),
    chat(repetition_penalty=1),
    chat(repetition_penalty=1.0),
    chat(length_penalty=1),
    chat(top_k=-1),
    chat(top_k=0),
    chat(top_k=3),
    chat(min_p=0),
    chat(min_p=0.1),
    chat(stop_token_ids=[]),
    chat(bad_words=[]),
    chat(ignore_eos=False),
    chat(min_tokens=0),
    chat(skip_special_tokens=True),
    chat(spaces_between_special_tokens=True),
    chat(include_stop_str_in_output=False),
    chat(use_beam_search=False),
    chat(best_of=1),
    chat(priority=0),
    chat(logit_bias={}),
    chat(logit_bias=None),
    chat(logit_bias={"5": 0, "6": 0.0}),
    chat(temperature=1e-9),
    chat(service_tier="auto"),
    chat(service_tier="default"),
    chat(parallel_tool_calls=False),
    chat(parallel_tool_calls=True),
    chat(tools=[]),
    chat(tools=None),
    chat(tool_choice="none"),
    chat(tool_choice="auto"),
    chat(functions=[]),
    chat(response_format={"type": "text"}),
    chat(modalities=["text"]),
    chat(store=False),
    chat(metadata={"run": "1"}),
    chat(metadata=None),
    chat(user="me"),
    chat(safety_identifier="me"),
    chat(prompt_cache_key="key"),
    chat(reasoning_effort=None),
    chat(verbosity="medium"),
    chat(chat_template_kwargs={}),
    chat(chat_template_kwargs={"enable_thinking": False}),
    chat(add_generation_prompt=True),
    chat(continue_final_message=False),
    chat(echo=False),
    chat(stream=False),
    chat(stream=True),
    chat(stream=True, stream_options={"include_usage": True}),
    chat(stream=True, stream_options={"include_usage": False}),
    chat(stream=True, stream_options={"include_obfuscation": False}),
    chat(stream=True, stream_options=None),
    chat(stream=True, n=2, stop="#"),
    chat(stream=True, logprobs=True),
    # Messages
    messages(200, "", {**USER, "name": "me"}),
    messages(200, "", {"role": "system", "content": "1"}, USER),
    messages(200, "", {"role": "developer", "content": "1"}, USER),
    messages(200, "", USER, {"role": "assistant", "content": "3"}, USER),
    messages(200, "", USER, {"role": "assistant", "content": "3", "refusal": None, "tool_calls": None}, USER),
    messages(200, "", {"role": "user", "content": [{"type": "text", "text": "1"}]}),
    messages(200, "", {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+2"}]}),
    messages(400, "messages"),
    chat(400, "messages", messages=None),
    chat(400, "messages", messages="1+2"),
    chat(400, "messages", messages=USER),
    chat(400, "messages", messages=5),
    messages(400, "messages[0]", "1+2"),
    messages(400, "messages[0]", ["1+2"]),
    messages(400, "messages[0].role", {"content": "1"}),
    messages(400, "messages[0].role", {"role": "robot", "content": "1"}),
    messages(400, "messages[0].role", {"role": 1, "content": "1"}),
    messages(400, "messages[1].role", USER, {"role": "", "content": "1"}),
    messages(400, "messages[0].content", {"role": "user"}),
    messages(400, "messages[0].content", {"role": "user", "content": None}),
    messages(400, "messages[0].content", {"role": "user", "content": 1}),
    messages(400, "messages[0].content", {"role": "user", "content": {"text": "1"}}),
    messages(400, "messages[0].content", {"role": "user", "content": []}),
    messages(400, "messages[0].content[0].type", {"role": "user", "content": [{"type": "sound", "text": "1"}]}),
    messages(400, "messages[0].content[0].text", {"role": "user", "content": [{"type": "text"}]}),
    messages(400, "messages[0].content[0].text", {"role": "user", "content": [{"type": "text", "text": 1}]}),
    messages(400, "messages[0].name", {**USER, "name": 5}),
    messages(400, "messages[0].name", {**USER, "name": "a b"}),
    messages(400, "messages", {"role": "user", "content": "1" * 500}),
    # Wrong types and values
    chat(404, "model", model="other"),
    chat(400, "model", model=5),
    chat(400, "max_tokens", max_tokens=0),
    chat(400, "max_tokens", max_tokens=-1),
    chat(400, "max_tokens", max_tokens="5"),
    chat(400, "max_tokens", max_tokens=1.5),
    chat(400, "max_tokens", max_tokens=True),
    chat(400, "max_tokens", max_tokens=10**9),
    chat(400, "max_completion_tokens", max_completion_tokens=0),
    chat(400, "max_completion_tokens", max_completion_tokens="x"),
    chat(400, "temperature", temperature=-0.1),
    chat(400, "temperature", temperature=1e-300),
    chat(400, "temperature", temperature=1e300),
    chat(400, "temperature", temperature="hot"),
    chat(400, "temperature", temperature=True),
    chat(400, "temperature", temperature=[1]),
    chat(400, "top_p", top_p=0),
    chat(400, "top_p", top_p=1.5),
    chat(400, "top_p", top_p="1"),
    chat(400, "top_k", top_k=-2),
    chat(400, "top_k", top_k=1.5),
    chat(400, "min_p", min_p=-0.5),
    chat(400, "min_p", min_p=1.5),
    chat(400, "n", n=0),
    chat(400, "n", n=-1),
    chat(400, "n", n=1.5),
    chat(400, "n", n="2"),
    chat(400, "n", n=10**6),
    chat(400, "seed", seed=1.5),
    chat(400, "seed", seed="1"),
    chat(400, "seed", seed=2**64),
    chat(400, "stop", stop=5),
    chat(400, "stop", stop={"a": 1}),
    chat(400, "stop", stop=["a", "b", "c", "d", "e"]),
    chat(400, "stop[0]", stop=[5]),
    chat(400, "stop", stop=""),
    chat(400, "logprobs", logprobs="yes"),
    chat(400, "top_logprobs", top_logprobs=5),
    chat(400, "top_logprobs", logprobs=True, top_logprobs=21),
    chat(400, "top_logprobs", logprobs=True, top_logprobs=-1),
    chat(400, "top_logprobs", logprobs=True, top_logprobs="5"),
    chat(400, "stream", stream="yes"),
    chat(400, "stream", stream=1),
    chat(400, "stream_options", stream_options={"include_usage": True}),
    chat(400, "stream_options", stream=True, stream_options=True),
    chat(400, "stream_options.include_usage", stream=True, stream_options={"include_usage": "yes"}),
    chat(400, "user", user=5),
    chat(400, "metadata", metadata="x"),
    chat(400, "frobnicate", frobnicate=1),
    chat(400, "chat_template_kwargs", chat_template_kwargs="x"),
    chat(400, "chat_template_kwargs.chat_template", chat_template_kwargs={"chat_template": "{{ 1 }}"}),
    chat(400, "response_format", response_format="text"),
    chat(400, "response_format", response_format={"type": "xml"}),
    chat(400, "logit_bias", logit_bias=[1]),
    chat(400, "logit_bias", logit_bias={"5": False}),
    # Completions
    complete(),
    Case(COMPLETE, {"prompt": "1+2"}, 200),
    complete(prompt=["1+2", "7"]),
    complete(prompt=[5, 6]),
    complete(prompt=[[5, 6], [7]]),
    complete(max_tokens=3, temperature=0),
    complete(n=2),
    complete(best_of=1),
    complete(n=2, best_of=2),
    complete(echo=True),
    complete(echo=True, max_tokens=0),
    complete(echo=True, logprobs=1, max_tokens=1, temperature=0),
    complete(logprobs=0),
    complete(logprobs=5),
    complete(logprobs=None),
    complete(suffix=None),
    complete(stop="#"),
    complete(stop=["#", ";"]),
    complete(stream=True),
    complete(stream=True, prompt=["1", "2"], stream_options={"include_usage": True}),
    complete(user="me", logit_bias={}, presence_penalty=0, frequency_penalty=0, seed=1),
    complete(404, "model", model="other"),
    complete(400, "prompt", prompt=None),
    complete(400, "prompt", prompt=5),
    complete(400, "prompt", prompt={"a": 1}),
    complete(400, "prompt", prompt=[]),
    complete(400, "prompt[0]", prompt=[[]]),
    complete(400, "prompt[1]", prompt=["1", 5]),
    complete(400, "prompt", prompt=[5, "1"]),
    complete(400, "prompt", prompt=[-1]),
    complete(400, "prompt", prompt=[10**6]),
    complete(400, "prompt", prompt="1" * 500),
    complete(400, "max_tokens", max_tokens=-1),
    complete(400, "max_tokens", max_tokens="5"),
    complete(400, "logprobs", logprobs=-1),
    complete(400, "logprobs", logprobs=100),
    complete(400, "logprobs", logprobs="1"),
    complete(400, "echo", echo="yes"),
    complete(400, "temperature", temperature="0"),
    complete(400, "messages", messages=[USER]),
    # HTTP
    Case(CHAT, b"", 400),
    Case(CHAT, b"{", 400),
    Case(CHAT, b"[]", 400),
    Case(CHAT, b"null", 400),
    Case(CHAT, b'"1"', 400),
    Case(CHAT, b"\xff\xfe\xfd", 400),
    Case(CHAT, b'{"messages": NaN}', 400),
    Case(CHAT, b"[" * 100_000, 400),
    Case(CHAT, b'{"messages": [], "chat_template_kwargs": {"a": ' + b"[" * 700 + b"]" * 700 + b"}}", 400),
    chat(400, "chat_template_kwargs", chat_template_kwargs={"a": "b" * 70_000}),
    Case(CHAT, b'{"seed": ' + b"9" * 5000 + b"}", 400),
    Case(CHAT, b" " * (MAX_BODY_BYTES + 1), 413),
    Case(CHAT, gzip.compress(b"{}", mtime=0), 415, headers=(*JSON, ("content-encoding", "gzip"))),
    Case(CHAT, b"{}", 400, "messages", headers=(*JSON, ("content-encoding", "identity"))),
    Case(CHAT, b"{}", 400, headers=(("content-type", "application/x-www-form-urlencoded"),)),
    get("/v1/models", 200),
    get(f"/v1/models/{NAME}", 200),
    get("/v1/models/other", 404),
    get("/health", 200),
    get("/metrics", 200),
    get(CHAT, 405),
    get(COMPLETE, 405),
    get("/v1/models", 405, "DELETE"),
    get("/v1/nothing", 404),
    get("/v1/%0d%0a%1b[2J", 404),
    get("/", 404),
]

# Both OpenAI and vLLM answer these (tools only where the model has them).
DEVIATIONS = {
    "a search has no tools": chat(400, "tools", tools=[{"type": "function", "function": {"name": "f"}}]),
    "no constrained decoding (JSON)": chat(400, "response_format", response_format={"type": "json_object"}),
    "π would not be the policy (frequencies)": chat(400, "frequency_penalty", frequency_penalty=0.5),
    "π would not be the policy (presence)": chat(400, "presence_penalty", presence_penalty=0.5),
    "π would not be the policy (bias)": chat(400, "logit_bias", logit_bias={"5": 1}),
    "models of text": messages(
        400, "messages[0].content[0].type", {"role": "user", "content": [{"type": "image_url"}]}
    ),
}


@pytest.fixture(scope="module")
def send() -> Iterator[Any]:
    """Send a case to the application, and return its answer."""
    template = worlds.TEMPLATE.replace("m['role']", "m['role'].replace('system', 'user')")
    policy = worlds.tiny_policy(tokenizer=worlds.char_tokenizer(template=template))
    limits = ServerLimits(NAME, SearchConfig(max_new_tokens=4, max_rollouts=2))
    service = ChatService(SearchService(policy, worlds.tiny_scalar(policy)), limits)
    loop = asyncio.new_event_loop()
    client = httpx2.AsyncClient(transport=httpx2.ASGITransport(service.build_app()), base_url="http://local")

    def send(case: Case) -> httpx2.Response:
        content = case.body if isinstance(case.body, bytes) else None
        if content is None and case.body is not None:
            content = json.dumps(case.body).encode()
        request = client.request(case.method, case.path, content=content, headers=dict(case.headers))
        return loop.run_until_complete(request)

    yield send
    loop.run_until_complete(client.aclose())
    loop.close()
    service.searches.stop()
    service.searches.join()
    service.close()


@pytest.mark.parametrize(
    "case", [*AS_EXPECTED, *DEVIATIONS.values()], ids=lambda case: f"{case.path} {str(case.body)[:80]}"
)
def test_a_raw_request_is_answered_as_openai_or_vllm_do(send, case: Case) -> None:
    answer = send(case)
    assert answer.status_code == case.status, answer.text
    assert answer.headers["x-request-id"]
    if case.status >= 400:
        check_error(answer, case.param)
    elif case.path in (CHAT, COMPLETE):
        (check_stream if case.body.get("stream") else check_answer)(answer, case)


def check_error(answer: httpx2.Response, param: str) -> None:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["message"].isprintable() and isinstance(error["type"], str)
    if param:
        assert error["param"] == param


def check_answer(answer: httpx2.Response, case: Case) -> None:
    body, fields = answer.json(), case.body
    is_chat = case.path == CHAT
    assert body["object"] == ("chat.completion" if is_chat else "text_completion")
    assert isinstance(body["id"], str) and isinstance(body["created"], int) and body["model"] == NAME
    prompts = fields.get("prompt")
    num_prompts = len(prompts) if isinstance(prompts, list) and not isinstance(prompts[0], int) else 1
    assert [choice["index"] for choice in body["choices"]] == list(range(num_prompts * (fields.get("n") or 1)))
    for choice in body["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        text = choice["message"]["content"] if is_chat else choice["text"]
        assert isinstance(text, str) and (not is_chat or choice["message"]["role"] == "assistant")
        stops = fields.get("stop") or []
        assert not any(stop in text for stop in ([stops] if isinstance(stops, str) else stops))
        has_logprobs = fields.get("logprobs") is not None and fields["logprobs"] is not False
        assert (choice["logprobs"] is not None) == has_logprobs
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def check_stream(answer: httpx2.Response, case: Case) -> None:
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.strip().split("\n\n")
    assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert {chunk["object"] for chunk in chunks} == {
        "chat.completion.chunk" if case.path == CHAT else "text_completion"
    }
    assert len({chunk["id"] for chunk in chunks}) == 1
    with_usage = (case.body.get("stream_options") or {}).get("include_usage")
    assert (chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] > 0) == bool(with_usage)
    assert all((chunk["usage"] is None) if with_usage else ("usage" not in chunk) for chunk in chunks[:-1])
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert sum(reason is not None for reason in reasons) == len({c["index"] for k in chunks for c in k["choices"]})


def test_the_table_is_long_enough() -> None:
    assert len(AS_EXPECTED) >= 200 and len(DEVIATIONS) < 8
