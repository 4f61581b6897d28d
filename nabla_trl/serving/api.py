"""OpenAI's chat completions, as far as a search can honour them: requests read or refused, answers and errors written.

Plain dicts in and out, without HTTP. The shapes are those of https://platform.openai.com/docs/api-reference/chat. What
the API does not have goes by the names of `ReasonerConfig` in a request, and under the key "nabla" in an answer:

    request   max_flops, beta, target_kl, max_rounds, patience, top_k, min_p
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

from nabla_trl.search.config import SearchConfig
from nabla_trl.search.options import MirrorSolver
from nabla_trl.serving.service import SearchProgress
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.fields import coerce_fields

# Fields of a request that are options of the search. None of them makes a batch take more memory.
SEARCH_OPTION_BY_FIELD = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p")},
    **{name: name for name in ("max_flops", "beta", "target_kl", "max_rounds", "patience")},
}
API_FIELDS = ("model", "messages", "seed", "stream", "stream_options")
IGNORED_FIELDS = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # change no answer
# Fields that are taken at these values alone, which ask for nothing.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
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
TEMPLATE_ROLE_BY_API_ROLE = {
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
        error_type: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": message, "type": error_type, "param": param, "code": code}}


@dataclass(frozen=True)
class ServerLimits:
    """What a server grants.

    Attributes:
        model: the name it goes by.
        config: of requests that say nothing else; its `max_new_tokens` is also the most that one may ask for.
        max_flops: the largest budget that a request may ask for, and the one of requests that name none if
            `config` has none either; 0 = no limit.

    Raises:
        ValueError: the configuration's own budget is larger, or it can have none.
    """

    model_name: str
    default_config: SearchConfig
    max_request_flops: float = 0.0

    def __post_init__(self) -> None:
        if not self.max_request_flops >= 0:
            raise ValueError(f"max_flops must not be negative, and is {self.max_request_flops}")
        if self.max_request_flops and not self.default_config.max_flops:
            object.__setattr__(self, "default_config", replace(self.default_config, max_flops=self.max_request_flops))
        if self.max_request_flops and self.default_config.max_flops > self.max_request_flops:
            raise ValueError(
                f"flops, {self.default_config.max_flops:g} by default, must be at most max_flops, {self.max_request_flops:g}"
            )


@dataclass(frozen=True)
class ChatRequest:
    messages: list[dict[str, str]]
    config: SearchConfig
    seed: int
    stream: bool = False
    include_usage: bool = False


# --- requests -----------------------------------------------------------------------------------------


def parse_json(body: bytes) -> Any:
    """The JSON of a request; ApiError where it is none."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error


def parse_request(body: Any, limits: ServerLimits) -> ChatRequest:
    """A request that can be honoured as it stands.

    Raises:
        ApiError: 404 another model; 400 whatever else.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    _refuse_unknown_fields(given)
    if not isinstance(given.get("model"), str):
        raise ApiError(400, f"model must be given, as text: {limits.model_name!r} is served here", param="model")
    check_model_name(given["model"], limits)
    stream = _read_typed_field(given, "stream", bool, False)
    return ChatRequest(
        messages=_read_messages(given.get("messages")),
        config=_read_search_config(given, limits),
        seed=_read_seed(given),
        stream=stream,
        include_usage=_read_include_usage(given, stream),
    )


def check_model_name(name: str, limits: ServerLimits) -> None:
    if name != limits.model_name:
        message = f"the model {name!r} does not exist: {limits.model_name!r} is served here"
        raise ApiError(404, message, param="model", code="model_not_found")


def _refuse_unknown_fields(fields: Mapping[str, Any]) -> None:
    known = [*API_FIELDS, *SEARCH_OPTION_BY_FIELD, *IGNORED_FIELDS, *NEUTRAL_VALUES]
    for name, value in fields.items():
        if name not in known:
            match = get_close_matches(name, known, n=1)
            hint = f": did you mean {match[0]}?" if match else ""
            raise ApiError(400, f"{name} is not supported{hint}", param=name, code="unknown_parameter")
        if name in NEUTRAL_VALUES and value not in NEUTRAL_VALUES[name]:
            allowed = " or ".join(json.dumps(one) for one in NEUTRAL_VALUES[name])
            message = f"{name} is not supported, other than {allowed}"
            raise ApiError(400, message, param=name, code="unsupported_value")


def _read_search_config(fields: Mapping[str, Any], limits: ServerLimits) -> SearchConfig:
    """The server's configuration with the options of the request."""
    values: dict[str, Any] = {}
    for name, option in SEARCH_OPTION_BY_FIELD.items():
        if name in fields:
            try:
                values |= coerce_fields({option: fields[name]}, [SearchConfig, MirrorSolver], source="the request")
            except (ValueError, OverflowError) as error:
                raise ApiError(400, str(error), param=name, code="invalid_type") from error
    _check_limits(values, limits)
    solver = limits.default_config.solver
    if isinstance(solver, MirrorSolver) and ("beta" in values or "target_kl" in values):
        # The server's own β or KL target gives way. Both in one request are refused by SearchConfig.
        values["beta"] = values.get("beta")
        values["solver"] = replace(solver, target_kl=values.pop("target_kl", None))
    elif "target_kl" in values:
        message = f"target_kl needs solver mirror, and this server runs solver {solver.name}: use beta"
        raise ApiError(400, message, param="target_kl", code="invalid_value")
    try:
        return replace(limits.default_config, **values) if values else limits.default_config
    except ValueError as error:
        raise ApiError(400, str(error), code="invalid_value") from error


def _check_limits(values: Mapping[str, Any], limits: ServerLimits) -> None:
    longest = limits.default_config.max_new_tokens
    if values.get("max_new_tokens", 0) > longest:
        message = f"max_tokens is limited to {longest} on this server"
        raise ApiError(400, message, param="max_tokens", code="invalid_value")
    if limits.max_request_flops and "max_flops" in values and not 0 < values["max_flops"] <= limits.max_request_flops:
        message = (
            f"max_flops is limited to {limits.max_request_flops:g} per problem on this server, and must be above 0"
        )
        raise ApiError(400, message, param="max_flops", code="invalid_value")


def _read_messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list of one message or more", param="messages")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _read_message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(400, f"{where} must be an object with role and content", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in TEMPLATE_ROLE_BY_API_ROLE:
        raise ApiError(
            400, f"{where}: the role must be one of {', '.join(TEMPLATE_ROLE_BY_API_ROLE)}", param=f"{where}.role"
        )
    other = next((name for name, one in message.items() if name not in ("role", "content") and one is not None), None)
    if other is not None:  # a client that sends an answer back sends its empty fields too
        raise ApiError(400, f"{where}: {other} is not supported", param=f"{where}.{other}", code="unknown_parameter")
    return {
        "role": TEMPLATE_ROLE_BY_API_ROLE[role],
        "content": _read_content(message.get("content"), f"{where}.content"),
    }


def _read_content(value: Any, where: str) -> str:
    """A text, or the parts of one."""
    parts = value if isinstance(value, list) and value else [{"type": "text", "text": value}]
    texts = [part["text"] for part in parts if _is_text_part(part)]
    if len(texts) < len(parts):
        raise ApiError(400, f"{where} must be text, or a list of parts of type text", param=where)
    text = "".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{where} holds half of a surrogate pair", param=where) from error
    return text


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _read_seed(fields: Mapping[str, Any]) -> int:
    """The request's, or any."""
    seed = _read_typed_field(fields, "seed", int, secrets.randbits(31))
    if not -(2**63) <= seed < 2**63:
        raise ApiError(400, "seed must fit into 64 bits", param="seed", code="invalid_value")
    return seed


def _read_include_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    options = _read_typed_field(fields, "stream_options", dict, {})
    if options and not stream:
        raise ApiError(400, "stream_options belongs to stream: true", param="stream_options")
    other = next((name for name in options if name != "include_usage"), None)
    if other is not None:
        where = f"stream_options.{other}"
        raise ApiError(400, f"{where} is not supported", param=where, code="unknown_parameter")
    return _read_typed_field(options, "include_usage", bool, False)


def _read_typed_field(fields: Mapping[str, Any], name: str, expected_type: type, default: Any) -> Any:
    value = fields.get(name, default)
    if not isinstance(value, expected_type) or (expected_type is int and isinstance(value, bool)):
        named = {bool: "true or false", int: "a whole number", dict: "an object"}[expected_type]
        raise ApiError(400, f"{name} must be {named}", param=name, code="invalid_type")
    return value


# --- answers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatCompletion:
    """The shapes of one answer, whole or in chunks."""

    model_name: str
    request: ChatRequest
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def build_completion(self, trace: Trace) -> dict[str, Any]:
        message = {"role": "assistant", "content": trace.response, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": get_finish_reason(trace)}
        return {
            **self._build_header("chat.completion"),
            "system_fingerprint": trace.meta["config_hash"],
            "choices": [choice],
            "usage": build_usage(trace),
            "nabla": self._build_search_result(trace),
        }

    def build_chunk(
        self, delta: dict[str, str], *, finish_reason: str | None = None, **extra_fields: Any
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {
            **self._build_header("chat.completion.chunk"),
            "choices": [choice],
            **self._build_empty_usage(),
            **extra_fields,
        }

    def build_progress_chunk(self, progress: SearchProgress) -> dict[str, Any]:
        """A chunk without content: what is refined may yet change, and what a client adds up must not."""
        return self.build_chunk({}, nabla={name: replace_nonfinite(value) for name, value in asdict(progress).items()})

    def build_final_chunks(self, trace: Trace) -> list[dict[str, Any]]:
        """The response; how it ended; what it cost, if asked for."""
        chunks = [
            self.build_chunk({"content": trace.response}),
            self.build_chunk({}, finish_reason=get_finish_reason(trace), nabla=self._build_search_result(trace)),
        ]
        if self.request.include_usage:
            chunks.append({**self._build_header("chat.completion.chunk"), "choices": [], "usage": build_usage(trace)})
        return chunks

    def _build_header(self, object_type: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_type, "created": self.created, "model": self.model_name}

    def _build_empty_usage(self) -> dict[str, Any]:
        return {"usage": None} if self.request.include_usage else {}

    def _build_search_result(self, trace: Trace) -> dict[str, Any]:
        rewards = {
            "reward_initial": replace_nonfinite(trace.reward_initial),
            "reward": replace_nonfinite(trace.reward),
        }
        return {"seed": self.request.seed, "answer": trace.answer, **rewards, "stop": trace.stop_reason}


def get_finish_reason(trace: Trace) -> str:
    return "stop" if trace.finished else "length"


def build_usage(trace: Trace) -> dict[str, Any]:
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


def replace_nonfinite(value: Any) -> Any:
    """JSON knows no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def build_model_entry(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "nabla_trl"}
