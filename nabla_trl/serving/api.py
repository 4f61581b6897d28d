"""Read requests and write answers in the format of OpenAI's chat completions.

The functions take and return plain dicts, without HTTP. The format is that of
https://platform.openai.com/docs/api-reference/chat. Fields that OpenAI does not have carry the names of `SearchConfig`
in a request, and stand under the key "nabla" in an answer:

    request   max_flops, beta, target_kl, max_rounds, patience, top_k, min_p
    answer    nabla: {seed, answer, reward_initial, reward, stop}
    usage     nabla: {flops, seconds, tokens, starts, proposals, accepted, rejected}
    chunk     nabla: {chain, round, position, reward_before, reward, flops, text}, a `service.SearchProgress`

A field that the search does not support is refused, not ignored.
"""

from __future__ import annotations

import json
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nabla_trl.search.config import SearchConfig
from nabla_trl.search.options import MirrorSolver
from nabla_trl.serving.service import SearchProgress
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.fields import coerce_fields, format_suggestion
from nabla_trl.utils.formatting import finite_or_none
from nabla_trl.utils.renamed import describe_new_key

# Request fields that are options of the search. None of them increases the memory of a batch.
SEARCH_OPTION_BY_FIELD = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p")},
    **{name: name for name in ("max_flops", "beta", "target_kl", "max_rounds", "patience")},
}
API_FIELDS = ("model", "messages", "seed", "stream", "stream_options")
IGNORED_FIELDS = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # they do not change the answer
# Fields that are accepted only with these values, which request nothing.
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
TEMPLATE_ROLE_BY_API_ROLE = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class ApiError(Exception):
    """An error response: HTTP status, headers and JSON body."""

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
    """Model name, default configuration and limits of a server.

    Attributes:
        model_name: name of the model in requests.
        default_config: configuration of a request without options. Its `max_new_tokens` is also the upper limit.
        max_request_flops: largest FLOPs budget of a request. Requests without a budget get this budget if
            `default_config` has none. 0 sets no limit.
        max_request_rounds: most rounds that a request may ask for, if `default_config` has no more.

    Raises:
        ValueError: `default_config` has a larger budget, or cannot have a budget.
    """

    model_name: str
    default_config: SearchConfig
    max_request_flops: float = 0.0
    max_request_rounds: int = 256

    def __post_init__(self) -> None:
        if not self.max_request_flops >= 0:
            raise ValueError(f"max_request_flops must be at least 0, not {self.max_request_flops}")
        if self.max_request_flops and not self.default_config.max_flops:
            config = replace(self.default_config, max_flops=self.max_request_flops)
            object.__setattr__(self, "default_config", config)
        if self.max_request_flops and self.default_config.max_flops > self.max_request_flops:
            raise ValueError(
                f"max_flops ({self.default_config.max_flops:g}), the default budget of a request, must be at most "
                f"max_request_flops ({self.max_request_flops:g})"
            )


@dataclass(frozen=True)
class ChatRequest:
    """A valid chat request."""

    messages: list[dict[str, str]]
    config: SearchConfig
    seed: int
    stream: bool = False
    include_usage: bool = False


# --- requests -----------------------------------------------------------------------------------------


def parse_json(body: bytes) -> Any:
    """Parse the body of a request.

    Raises:
        ApiError: 400, the body is not valid JSON.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error


def parse_request(body: Any, limits: ServerLimits) -> ChatRequest:
    """Return a request whose fields are all supported and valid.

    Raises:
        ApiError: 404 for another model, 400 for any other invalid field.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    fields = {name: value for name, value in body.items() if value is not None}
    _refuse_unknown_fields(fields)
    if not isinstance(fields.get("model"), str):
        raise ApiError(400, f"model must be a string: this server has {limits.model_name!r}", param="model")
    check_model_name(fields["model"], limits)
    seed = _read_typed_field(fields, "seed", int, secrets.randbits(31))
    if not -(2**63) <= seed < 2**63:
        raise ApiError(400, "seed must fit into 64 bits", param="seed", code="invalid_value")
    stream = _read_typed_field(fields, "stream", bool, False)
    return ChatRequest(
        messages=_read_messages(fields.get("messages")),
        config=_read_search_config(fields, limits),
        seed=seed,
        stream=stream,
        include_usage=_read_include_usage(fields, stream),
    )


def check_model_name(name: str, limits: ServerLimits) -> None:
    """Raise the 404 ApiError if a request names another model."""
    if name != limits.model_name:
        message = f"the model {name!r} does not exist: this server has {limits.model_name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _refuse_unknown_fields(fields: Mapping[str, Any]) -> None:
    supported = [*API_FIELDS, *SEARCH_OPTION_BY_FIELD, *IGNORED_FIELDS, *NEUTRAL_VALUES]
    for name, value in fields.items():
        if name not in supported:
            hint = describe_new_key(name, supported) or format_suggestion(name, supported)
            raise ApiError(400, f"{name} is not supported{hint}", param=name, code="unknown_parameter")
        if name in NEUTRAL_VALUES and value not in NEUTRAL_VALUES[name]:
            values = " or ".join(map(json.dumps, NEUTRAL_VALUES[name]))
            message = f"{name} is not supported with values other than {values}"
            raise ApiError(400, message, param=name, code="unsupported_value")


def _read_search_config(fields: Mapping[str, Any], limits: ServerLimits) -> SearchConfig:
    """Return the server's default configuration with the options of the request."""
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
    max_new_tokens, max_flops = limits.default_config.max_new_tokens, limits.max_request_flops
    if values.get("max_new_tokens", 0) > max_new_tokens:
        message = f"max_tokens is limited to {max_new_tokens} on this server"
        raise ApiError(400, message, param="max_tokens", code="invalid_value")
    if max_flops and "max_flops" in values and not 0 < values["max_flops"] <= max_flops:
        message = f"max_flops is limited to {max_flops:g} per problem on this server, and must be above 0"
        raise ApiError(400, message, param="max_flops", code="invalid_value")
    max_rounds = max(limits.max_request_rounds, limits.default_config.max_rounds)
    if values.get("max_rounds", 0) > max_rounds:
        message = f"max_rounds is limited to {max_rounds} on this server"
        raise ApiError(400, message, param="max_rounds", code="invalid_value")


def _read_messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ApiError(400, "messages must be a list of at least one message", param="messages")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def _read_message(message: Any, param: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ApiError(400, f"{param} must be an object with role and content", param=param)
    role = message.get("role")
    if not isinstance(role, str) or role not in TEMPLATE_ROLE_BY_API_ROLE:
        roles = ", ".join(TEMPLATE_ROLE_BY_API_ROLE)
        raise ApiError(400, f"{param}: the role must be one of {roles}", param=f"{param}.role")
    for name, value in message.items():
        if name not in ("role", "content") and value is not None:  # clients send the empty fields of an answer back
            error = f"{param}: {name} is not supported"
            raise ApiError(400, error, param=f"{param}.{name}", code="unknown_parameter")
    content = _read_content(message.get("content"), f"{param}.content")
    return {"role": TEMPLATE_ROLE_BY_API_ROLE[role], "content": content}


def _read_content(value: Any, param: str) -> str:
    """Return the content of a message, which is a string or a list of text parts."""
    parts = value if isinstance(value, list) and value else [{"type": "text", "text": value}]
    texts = []
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise ApiError(400, f"{param} must be a string, or a list of parts of type text", param=param)
        texts.append(part["text"])
    text = "".join(texts)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{param} contains half of a surrogate pair", param=param) from error
    return text


def _read_include_usage(fields: Mapping[str, Any], stream: bool) -> bool:
    options = _read_typed_field(fields, "stream_options", dict, {})
    if options and not stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    for name in options:
        if name != "include_usage":
            param = f"stream_options.{name}"
            raise ApiError(400, f"{param} is not supported", param=param, code="unknown_parameter")
    return _read_typed_field(options, "include_usage", bool, False)


def _read_typed_field(fields: Mapping[str, Any], name: str, expected_type: type, default: Any) -> Any:
    value = fields.get(name, default)
    if not isinstance(value, expected_type) or (expected_type is int and isinstance(value, bool)):
        description = {bool: "true or false", int: "a whole number", dict: "an object"}[expected_type]
        raise ApiError(400, f"{name} must be {description}", param=name, code="invalid_type")
    return value


# --- answers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatCompletion:
    """The answer to one request, as a completion or as the chunks of a stream."""

    model_name: str
    request: ChatRequest
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def build_completion(self, trace: Trace) -> dict[str, Any]:
        """Return the answer as one object."""
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
        """Return a chunk of a stream with the new part of the message."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        empty_usage = {"usage": None} if self.request.include_usage else {}
        return {**self._build_header("chat.completion.chunk"), "choices": [choice], **empty_usage, **extra_fields}

    def build_progress_chunk(self, progress: SearchProgress) -> dict[str, Any]:
        """Return a chunk without content, because a client cannot take back content that later changes."""
        rewards = {name: finite_or_none(getattr(progress, name)) for name in ("reward_before", "reward")}
        return self.build_chunk({}, nabla=asdict(progress) | rewards)

    def build_final_chunks(self, trace: Trace) -> list[dict[str, Any]]:
        """Return chunks with the response, its finish reason and, if requested, the usage."""
        chunks = [
            self.build_chunk({"content": trace.response}),
            self.build_chunk({}, finish_reason=get_finish_reason(trace), nabla=self._build_search_result(trace)),
        ]
        if self.request.include_usage:
            chunks.append({**self._build_header("chat.completion.chunk"), "choices": [], "usage": build_usage(trace)})
        return chunks

    def _build_header(self, object_type: str) -> dict[str, Any]:
        return {"id": self.id, "object": object_type, "created": self.created, "model": self.model_name}

    def _build_search_result(self, trace: Trace) -> dict[str, Any]:
        rewards = {
            "reward_initial": finite_or_none(trace.reward_initial),
            "reward": finite_or_none(trace.reward),
        }
        return {"seed": self.request.seed, "answer": trace.answer, **rewards, "stop": trace.stop_reason}


def get_finish_reason(trace: Trace) -> str:
    """Return "stop" if the response has an end, and "length" if it is cut off."""
    return "stop" if trace.finished else "length"


def build_usage(trace: Trace) -> dict[str, Any]:
    """Return the tokens of prompt and final response, and under "nabla" the work of all chains.

    The work includes rejected proposals. Its seconds are the problem's share of the seconds of its batch.
    """
    prompt, response = len(trace.prompt_ids), len(trace.response_ids)
    counts = {name: int(trace.meta[name]) for name in ("starts", "proposals", "accepted")}
    counts["rejected"] = counts["proposals"] - counts["accepted"]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": response,
        "total_tokens": prompt + response,
        "nabla": {**trace.cost.to_dict(), **counts},
    }


def build_model_entry(name: str, created: int) -> dict[str, Any]:
    """Return a model as GET /v1/models lists it."""
    return {"id": name, "object": "model", "created": created, "owned_by": "nabla_trl"}
