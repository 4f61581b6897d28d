"""OpenAI's chat completions, as far as a search can honour them: requests read or refused, answers and errors written.

Plain dicts in and out, without HTTP. The shapes are those of https://platform.openai.com/docs/api-reference/chat. What
the API does not have goes by the names of `ReasonerConfig` in a request, and under the key "nabla" in an answer:

    request   flops, beta, kl, rounds, patience, top_k, sample_min_p
    answer    nabla: {seed, answer, reward_initial, reward, stop}
    usage     nabla: {flops, seconds, tokens, starts, proposals, accepted, rejected}
    chunk     nabla: {chain, round, position, reward_before, reward, flops, text}, a `service.Progress`

A field that cannot be honoured is refused rather than ignored.
"""

from __future__ import annotations

import json
import math
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from nabla_trl.search.config import ReasonerConfig
from nabla_trl.serving.service import Progress
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.fields import checked

# Fields of a request that are options of the search. None of them makes a batch take more memory.
OPTIONS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    **{name: name for name in ("temperature", "top_p", "top_k", "sample_min_p")},
    **{name: name for name in ("flops", "beta", "kl", "rounds", "patience")},
}
OWN = ("model", "messages", "seed", "stream", "stream_options")
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # change no answer
# Fields that are taken at these values alone, which ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "stop": ([],),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}  # the API's: a template's


class ApiError(Exception):
    """What a client is told, with the HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Offer:
    """What a server grants.

    Attributes:
        model: the name it goes by.
        config: of requests that say nothing else; its `max_new_tokens` is also the most that one may ask for.
        max_flops: the largest budget that a request may ask for, and the one of requests that name none if
            `config` has none either; 0 = no limit.

    Raises:
        ValueError: the configuration's own budget is larger, or it can have none.
    """

    model: str
    config: ReasonerConfig
    max_flops: float = 0.0

    def __post_init__(self) -> None:
        if not self.max_flops >= 0:
            raise ValueError(f"max_flops must not be negative, and is {self.max_flops}")
        if self.max_flops and not self.config.flops:
            object.__setattr__(self, "config", replace(self.config, flops=self.max_flops))
        if self.max_flops and self.config.flops > self.max_flops:
            raise ValueError(f"flops, {self.config.flops:g} by default, must be at most max_flops, {self.max_flops:g}")


@dataclass(frozen=True)
class ChatRequest:
    messages: list[dict[str, str]]
    config: ReasonerConfig
    seed: int
    stream: bool = False
    include_usage: bool = False


# --- requests -----------------------------------------------------------------------------------------


def read_json(body: bytes) -> Any:
    """The JSON of a request; ApiError where it is none."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error


def read_request(body: Any, offer: Offer) -> ChatRequest:
    """A request that can be honoured as it stands.

    Raises:
        ApiError: 404 another model; 400 whatever else.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    _refuse_unknown(given)
    if not isinstance(given.get("model"), str):
        raise ApiError(400, f"model must be given, as text: {offer.model!r} is served here", param="model")
    check_model(given["model"], offer)
    stream = _typed(given, "stream", bool, False)
    return ChatRequest(
        messages=_messages(given.get("messages")),
        config=_config(given, offer),
        seed=_seed(given),
        stream=stream,
        include_usage=_include_usage(given, stream),
    )


def check_model(name: str, offer: Offer) -> None:
    if name != offer.model:
        message = f"the model {name!r} does not exist: {offer.model!r} is served here"
        raise ApiError(404, message, param="model", code="model_not_found")


def _refuse_unknown(given: Mapping[str, Any]) -> None:
    known = [*OWN, *OPTIONS, *LABELS, *NEUTRAL]
    for name, value in given.items():
        if name not in known:
            match = get_close_matches(name, known, n=1)
            hint = f": did you mean {match[0]}?" if match else ""
            raise ApiError(400, f"{name} is not supported{hint}", param=name, code="unknown_parameter")
        if name in NEUTRAL and value not in NEUTRAL[name]:
            allowed = " or ".join(json.dumps(one) for one in NEUTRAL[name])
            message = f"{name} is not supported, other than {allowed}"
            raise ApiError(400, message, param=name, code="unsupported_value")


def _config(given: Mapping[str, Any], offer: Offer) -> ReasonerConfig:
    """The server's configuration with the options of the request."""
    values: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        if name in given:
            try:
                values |= checked({option: given[name]}, [ReasonerConfig], where="the request")
            except (ValueError, OverflowError) as error:
                raise ApiError(400, str(error), param=name, code="invalid_type") from error
    _check_limits(values, offer)
    for name, other in (("beta", "kl"), ("kl", "beta")):  # the server's own gives way; both in a request are refused
        if name in values:
            values.setdefault(other, None)
    try:
        return replace(offer.config, **values) if values else offer.config
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from error


def _check_limits(values: Mapping[str, Any], offer: Offer) -> None:
    longest = offer.config.max_new_tokens
    if values.get("max_new_tokens", 0) > longest:
        message = f"max_tokens is limited to {longest} on this server"
        raise ApiError(400, message, param="max_tokens", code="invalid_value")
    if offer.max_flops and "flops" in values and not 0 < values["flops"] <= offer.max_flops:
        message = f"flops is limited to {offer.max_flops:g} per problem on this server, and must be above 0"
        raise ApiError(400, message, param="flops", code="invalid_value")


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list of one message or more", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} must be an object with role and content", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ApiError(400, f"{where}: the role must be one of {', '.join(ROLES)}", param=f"{where}.role")
    other = next((name for name, one in message.items() if name not in ("role", "content") and one is not None), None)
    if other is not None:  # a client that sends an answer back sends its empty fields too
        raise ApiError(400, f"{where}: {other} is not supported", param=f"{where}.{other}", code="unknown_parameter")
    return {"role": ROLES[role], "content": _content(message.get("content"), f"{where}.content")}


def _content(value: Any, where: str) -> str:
    """A text, or the parts of one."""
    parts = value if isinstance(value, list) and value else [{"type": "text", "text": value}]
    texts = [part["text"] for part in parts if _is_text(part)]
    if len(texts) < len(parts):
        raise ApiError(400, f"{where} must be text, or a list of parts of type text", param=where)
    text = "".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{where} holds half of a surrogate pair", param=where) from error
    return text


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _seed(given: Mapping[str, Any]) -> int:
    """The request's, or any."""
    seed = _typed(given, "seed", int, secrets.randbits(31))
    if not -(2**63) <= seed < 2**63:
        raise ApiError(400, "seed must fit into 64 bits", param="seed", code="invalid_value")
    return seed


def _include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = _typed(given, "stream_options", dict, {})
    if options and not stream:
        raise ApiError(400, "stream_options belongs to stream: true", param="stream_options")
    other = next((name for name in options if name != "include_usage"), None)
    if other is not None:
        where = f"stream_options.{other}"
        raise ApiError(400, f"{where} is not supported", param=where, code="unknown_parameter")
    return _typed(options, "include_usage", bool, False)


def _typed(given: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.get(name, default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        named = {bool: "true or false", int: "a whole number", dict: "an object"}[kind]
        raise ApiError(400, f"{name} must be {named}", param=name, code="invalid_type")
    return value


# --- answers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """The shapes of one answer, whole or in chunks."""

    model: str
    request: ChatRequest
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, trace: Trace) -> dict[str, Any]:
        message = {"role": "assistant", "content": trace.response, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(trace)}
        return {
            **self._head("chat.completion"),
            "system_fingerprint": trace.meta["config_hash"],
            "choices": [choice],
            "usage": usage(trace),
            "nabla": self._outcome(trace),
        }

    def chunk(self, delta: dict[str, str], *, finish: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **self._no_usage(), **more}

    def progress(self, progress: Progress) -> dict[str, Any]:
        """A chunk without content: what is refined may yet change, and what a client adds up must not."""
        return self.chunk({}, nabla={name: finite(value) for name, value in asdict(progress).items()})

    def last_chunks(self, trace: Trace) -> list[dict[str, Any]]:
        """The response; how it ended; what it cost, if asked for."""
        chunks = [
            self.chunk({"content": trace.response}),
            self.chunk({}, finish=finish_reason(trace), nabla=self._outcome(trace)),
        ]
        if self.request.include_usage:
            chunks.append({**self._head("chat.completion.chunk"), "choices": [], "usage": usage(trace)})
        return chunks

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _no_usage(self) -> dict[str, Any]:
        return {"usage": None} if self.request.include_usage else {}

    def _outcome(self, trace: Trace) -> dict[str, Any]:
        rewards = {"reward_initial": finite(trace.reward_initial), "reward": finite(trace.reward)}
        return {"seed": self.request.seed, "answer": trace.answer, **rewards, "stop": trace.stop}


def finish_reason(trace: Trace) -> str:
    return "stop" if trace.finished else "length"


def usage(trace: Trace) -> dict[str, Any]:
    """Tokens of the prompt and of the response that is given; under "nabla" the work of all chains, rejected or not.

    Seconds are the problem's share of those of its batch.
    """
    prompt, response = len(trace.prompt_ids), len(trace.response_ids)
    refined = {name: int(trace.meta[name]) for name in ("starts", "proposals", "accepted")}
    refined["rejected"] = refined["proposals"] - refined["accepted"]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": response,
        "total_tokens": prompt + response,
        "nabla": {**trace.cost.to_dict(), **refined},
    }


def finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def model_card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "nabla_trl"}
