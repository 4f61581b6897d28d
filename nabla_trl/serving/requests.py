"""Read requests in the formats of OpenAI's chat completions and completions.

The formats are those of https://platform.openai.com/docs/api-reference, with the fields that vLLM adds where they mean
something here. Fields of neither carry the names of `SearchConfig`: max_flops, beta, target_kl, max_rounds, patience,
num_starts, num_chains, max_rollouts.

A field that the search does not support is refused, unless its value asks for nothing. One error names all mistakes.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from nabla_trl.models.options import MAX_TEMPERATURE
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import MAX_REWARD_WEIGHT, SearchConfig
from nabla_trl.search.options import MirrorSolver
from nabla_trl.serving.fields import ApiError, FieldReader, TooManyMistakes, quote, shorten
from nabla_trl.utils.files import check_depth
from nabla_trl.utils.identity import hash_json

MAX_CHOICES = 128  # answers to one request: prompts × n
MAX_TOP_LOGPROBS = 20
MAX_CHAT_STOPS = 4  # as OpenAI
MAX_COMPLETION_STOPS = 32  # lm-eval sends all that a task has
MAX_STOP_CHARS = 1000
MAX_KEYWORD_CHARS = 2**16  # of all keywords of a chat template
DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI
# A name of OpenAI's cannot hold what looks like a control token.
NAME_PATTERN = re.compile(r"[^\s<|\\/>]+")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TEMPLATE_PARAMETERS = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)

SEARCH_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p"),
    *("max_flops", "beta", "target_kl", "max_rounds", "patience", "num_starts", "num_chains", "max_rollouts"),
)
COMMON_FIELDS = ("model", "n", "seed", "stop", "stream", "stream_options", "logprobs", "max_tokens", *SEARCH_FIELDS)
CHAT_FIELDS = ("messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs")
COMPLETION_FIELDS = ("prompt", "echo")
# They do not change the answer. Their types are checked.
IGNORED_FIELDS: dict[str, tuple[type, str]] = {
    "user": (str, "a string"),
    "metadata": (dict, "an object"),
    "safety_identifier": (str, "a string"),
    "prompt_cache_key": (str, "a string"),
    "prompt_cache_retention": (str, "a string"),
    "request_id": (str, "a string"),
    "cache_salt": (str, "a string"),
}
# Fields that are accepted only with these values, which ask for nothing. null is always accepted.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "priority": (0,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    **{f"guided_{kind}": () for kind in ("json", "regex", "choice", "grammar")},
}
CHAT_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    **NEUTRAL_VALUES,
    "audio": (),
    "modalities": (["text"],),
    "store": (False,),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "echo": (False,),
    "documents": ([],),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "include_reasoning": (True, False),
    "mm_processor_kwargs": ({},),
}
COMPLETION_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    **NEUTRAL_VALUES,
    "suffix": ("",),
    "add_special_tokens": (True,),
    "prompt_embeds": (),
}
EMPTY_VALUES: tuple[Any, ...] = (None, "", [])  # of the fields of an answer that clients send back as a message
TOKEN_LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class ServerLimits:
    """Model name, default configuration and limits of a server.

    Attributes:
        model_name: name of the model in requests.
        default_config: configuration of a request without options. Its `max_new_tokens` is also the upper limit.
        max_request_flops: largest FLOPs budget of a request. Requests without a budget get this budget if
            `default_config` has none. 0: requests without a budget have none, and `flops_bound` limits the others.
        max_request_rounds: most rounds that a request may ask for, if `default_config` has no more.
        max_request_starts: most first responses that a request may ask for, if `default_config` has no more.
        flops_bound: largest FLOPs budget of a request where `max_request_flops` is 0.

    Raises:
        ValueError: `default_config` has a larger budget, or cannot have a budget.
    """

    model_name: str
    default_config: SearchConfig
    max_request_flops: float = 0.0
    max_request_rounds: int = 256
    max_request_starts: int = 16
    flops_bound: float = math.inf

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

    @property
    def flops_limit(self) -> float:
        """Return the largest budget (FLOPs) that a request may ask for."""
        return self.max_request_flops or max(self.flops_bound, self.default_config.max_flops)

    @property
    def rounds_limit(self) -> int:
        """Return the most rounds that a request may ask for."""
        return max(self.max_request_rounds, self.default_config.max_rounds)

    @property
    def starts_limit(self) -> int:
        """Return the most first responses that a request may ask for."""
        return max(self.max_request_starts, self.default_config.num_starts)


def estimate_flops_bound(policy: Policy, reward: Reward, config: SearchConfig, max_rounds: int) -> float:
    """Return a generous estimate of the FLOPs of `max_rounds` rounds, as a bound of the budgets of requests.

    Args:
        config: the longest response is its `max_new_tokens`. The longest prompt is taken to be three times as long.
    """
    length = min(policy.context_length, 4 * config.max_new_tokens)
    sizes = [objective.model_size for objective in reward.objectives]
    scoring = sum(size.compute_forward_flops(0, length) + size.compute_backward_flops(0, length) for size in sizes)
    num_proposals = config.num_chains * config.proposals.proposals_per_round
    return (policy.size.compute_forward_flops(0, length) + scoring) * (max_rounds * num_proposals + config.num_starts)


@dataclass(frozen=True)
class SearchRequest:
    """A valid request.

    Attributes:
        prompts: one chat (a list of messages), or the texts or token ids of prompts.
        seed: of the first choice.
        num_choices: answers to each prompt.
        stop: strings that end an answer, and are not part of it.
        num_top_logprobs: alternatives of each token whose log-probabilities are returned. None: no log-probabilities.
        echo: the answer begins with the prompt.
        only_prompt: no token is generated, and only the prompt is returned.
        template_kwargs: keywords of the chat template.
    """

    prompts: tuple[Any, ...]
    config: SearchConfig
    seed: int
    num_choices: int = 1
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    num_top_logprobs: int | None = None
    echo: bool = False
    only_prompt: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[dict[str, str]]:
        """Return the messages of a chat."""
        return self.prompts[0]

    def get_seed(self, choice: int) -> int:
        """Return the seed of a choice. A request with this seed and n = 1 gets the same answer."""
        if choice % self.num_choices == 0:
            return self.seed
        return int(hash_json([self.seed, choice % self.num_choices], length=8), 16) >> 1


def parse_json(body: bytes) -> Any:
    """Parse the body of a request.

    Raises:
        ApiError: 400, the body is not valid JSON, or nests too deeply.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
        check_depth(value)
    except RecursionError as error:
        raise ApiError(400, "the body is not valid JSON: it nests too deeply") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from error
    return value


def parse_chat_request(body: Any, limits: ServerLimits) -> SearchRequest:
    """Return a chat request whose fields are all supported and valid.

    Raises:
        ApiError: 404 for another model, 400 for any other wrong field. The message names all wrong fields.
    """
    with _read_fields(body) as reader:
        supported = [*COMMON_FIELDS, *CHAT_FIELDS, *IGNORED_FIELDS, *CHAT_NEUTRAL_VALUES]
        options = _read_common_fields(reader, limits, supported, CHAT_NEUTRAL_VALUES)
        messages = _read_messages(reader)
        if reader.fields.get("max_tokens") not in (None, reader.fields.get("max_completion_tokens", None)) and (
            "max_completion_tokens" in reader.fields
        ):
            message = "'max_tokens' and 'max_completion_tokens' differ: set 'max_completion_tokens' alone."
            reader.refuse("max_tokens", message, "invalid_parameter_combination")
        with_logprobs = reader.read_boolean("logprobs")
        num_top = reader.read_integer("top_logprobs", 0, minimum=0, maximum=MAX_TOP_LOGPROBS)
        if num_top and not with_logprobs:
            reader.refuse("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.")
        request = SearchRequest(
            (messages,),
            stop=_read_stop(reader, MAX_CHAT_STOPS),
            num_top_logprobs=num_top if with_logprobs else None,
            template_kwargs=_read_template_kwargs(reader),
            **options,
        )
    return request


def parse_completion_request(body: Any, limits: ServerLimits) -> SearchRequest:
    """Return a completion request whose fields are all supported and valid.

    Raises:
        ApiError: 404 for another model, 400 for any other wrong field. The message names all wrong fields.
    """
    with _read_fields(body) as reader:
        supported = [*COMMON_FIELDS, *COMPLETION_FIELDS, *IGNORED_FIELDS, *COMPLETION_NEUTRAL_VALUES]
        if reader.fields.get("best_of") == reader.fields.get("n"):
            reader.fields.pop("best_of", None)
        if reader.fields.get("logprobs") is False:
            del reader.fields["logprobs"]
        echo = reader.read_boolean("echo")
        only_prompt = echo and reader.fields.get("max_tokens") == 0
        if only_prompt:
            del reader.fields["max_tokens"]
        elif "max_tokens" not in reader.fields:
            reader.fields["max_tokens"] = min(DEFAULT_COMPLETION_TOKENS, limits.default_config.max_new_tokens)
        options = _read_common_fields(reader, limits, supported, COMPLETION_NEUTRAL_VALUES)
        prompts = _read_prompts(reader)
        if len(prompts) * options["num_choices"] > MAX_CHOICES:
            message = f"Invalid 'n': {len(prompts)} prompts × n answers are more than {MAX_CHOICES}."
            reader.refuse("n" if options["num_choices"] > 1 else "prompt", message, "integer_above_max_value")
        request = SearchRequest(
            prompts,
            stop=_read_stop(reader, MAX_COMPLETION_STOPS),
            num_top_logprobs=reader.read_integer("logprobs", None, minimum=0, maximum=MAX_TOP_LOGPROBS),
            echo=echo,
            only_prompt=only_prompt,
            **options,
        )
    return request


def check_model_name(name: str, limits: ServerLimits) -> None:
    """Raise the 404 ApiError if a request names another model."""
    if name != limits.model_name:
        message = f"The model {quote(name)} does not exist: this server has {limits.model_name!r}."
        raise ApiError(404, message, param="model", code="model_not_found")


@contextmanager
def _read_fields(body: Any) -> Iterator[FieldReader]:
    """Read the fields of a request in a `with` block, at whose end all mistakes are raised as one error."""
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_type")
    reader = FieldReader(body)
    with suppress(TooManyMistakes):
        yield reader
    reader.raise_errors()


def _read_common_fields(
    reader: FieldReader, limits: ServerLimits, supported: list[str], neutral_values: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """Read what both kinds of request have, and refuse what is not supported."""
    model = reader.fields.get("model", limits.model_name)
    if not isinstance(model, str):
        reader.refuse_type("model", "a string", model)
    else:
        try:
            check_model_name(model, limits)
        except ApiError as error:
            reader.errors.append(error)
    reader.refuse_unknown(supported)
    bias = reader.fields.get("logit_bias")
    if isinstance(bias, dict) and all(type(value) in (int, float) and value == 0 for value in bias.values()):
        del reader.fields["logit_bias"]
    reader.refuse_other_values(neutral_values)
    for name, (kind, description) in IGNORED_FIELDS.items():
        if name in reader.fields and not isinstance(reader.fields[name], kind):
            reader.refuse_type(name, description, reader.fields[name])
    seed = reader.read_integer("seed", secrets.randbits(31), minimum=-(2**63), maximum=2**63 - 1)
    stream = reader.read_boolean("stream")
    return {
        "config": _read_search_config(reader, limits),
        "seed": seed,
        "num_choices": reader.read_integer("n", 1, minimum=1, maximum=MAX_CHOICES),
        "stream": stream,
        "include_usage": _read_include_usage(reader, stream),
    }


def _read_search_config(reader: FieldReader, limits: ServerLimits) -> SearchConfig:
    """Return the server's default configuration with the options of the request."""
    default = limits.default_config
    values: dict[str, Any] = {
        "temperature": reader.read_number("temperature", minimum=0, maximum=MAX_TEMPERATURE),
        "top_p": reader.read_number("top_p", above=0, maximum=1),
        "top_k": reader.read_integer("top_k", minimum=-1),
        "min_p": reader.read_number("min_p", minimum=0, below=1),
        "max_flops": reader.read_number(
            "max_flops", above=0, maximum=limits.flops_limit if math.isfinite(limits.flops_limit) else None
        ),
        "beta": reader.read_number("beta", minimum=1 / MAX_REWARD_WEIGHT, maximum=MAX_REWARD_WEIGHT),
        "target_kl": reader.read_number("target_kl", above=0, maximum=MAX_REWARD_WEIGHT),
        "max_rounds": reader.read_integer("max_rounds", minimum=0, maximum=limits.rounds_limit),
        "patience": reader.read_integer("patience", minimum=0),
        "num_starts": reader.read_integer("num_starts", minimum=1, maximum=limits.starts_limit),
        "num_chains": reader.read_integer("num_chains", minimum=1, maximum=limits.starts_limit),
        "max_rollouts": reader.read_integer(
            "max_rollouts", minimum=1, maximum=limits.rounds_limit + limits.starts_limit
        ),
    }
    for name in TOKEN_LIMIT_FIELDS:
        limit = reader.read_integer(name, minimum=1, maximum=default.max_new_tokens)
        values["max_new_tokens"] = limit or values.get("max_new_tokens")
    values = {name: value for name, value in values.items() if value is not None}
    values |= {"top_k": max(0, values["top_k"])} if "top_k" in values else {}
    if values.get("max_rounds") == 0 and not values.get("max_flops", default.max_flops):
        message = "Invalid 'max_rounds': 0 sets no limit, which needs a budget: set 'max_flops' as well."
        reader.refuse("max_rounds", message, "integer_below_min_value")
        return default
    solver = default.solver
    if isinstance(solver, MirrorSolver) and ("beta" in values or "target_kl" in values):
        # The server's own β or KL target gives way. Both in one request are refused by SearchConfig.
        values["beta"] = values.get("beta")
        values["solver"] = replace(solver, target_kl=values.pop("target_kl", None))
    elif "target_kl" in values:
        message = f"'target_kl' needs solver mirror, and this server runs solver {solver.name}: use 'beta'."
        reader.refuse("target_kl", message)
        return default
    try:
        return replace(default, **values) if values else default
    except ValueError as error:
        given = [name for name in reader.fields if name in (*SEARCH_FIELDS, *TOKEN_LIMIT_FIELDS)]
        named = [name for name in given if re.search(rf"\b{name}\b", str(error))]
        reader.refuse([*named, *given][0], f"{error}.")
        return default


def _read_include_usage(reader: FieldReader, stream: bool) -> bool:
    options = reader.read_object("stream_options")
    if options and not stream:
        reader.refuse("stream_options", "'stream_options' is only allowed when 'stream' is true.")
    inner = FieldReader(options, "stream_options", reader)
    inner.refuse_unknown(["include_usage", "include_obfuscation", "continuous_usage_stats"])
    inner.refuse_other_values({"include_obfuscation": (False,), "continuous_usage_stats": (False,)})
    return inner.read_boolean("include_usage")


def _read_stop(reader: FieldReader, max_strings: int) -> tuple[str, ...]:
    """Return the stop strings: one text, or a list of at most `max_strings`."""
    value = reader.fields.get("stop")
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list):
        reader.refuse_type("stop", "a string or an array of strings", value)
        return ()
    if len(strings) > max_strings:
        reader.refuse(
            "stop",
            f"Invalid 'stop': array too long. Expected an array with maximum length {max_strings}, but got an array "
            f"with length {len(strings)} instead.",
            "array_above_max_length",
        )
        return ()
    for index, string in enumerate(strings):
        name = "stop" if isinstance(value, str) else f"stop[{index}]"
        if not isinstance(string, str):
            reader.refuse_type(name, "a string", string)
            return ()
        if not string:
            reader.refuse(name, f"Invalid '{name}': a stop string must not be empty.", "empty_string")
        if len(string) > MAX_STOP_CHARS:
            message = f"Invalid '{name}': string too long. Expected at most {MAX_STOP_CHARS} characters."
            reader.refuse(name, message, "string_above_max_length")
        reader.check_text(name, string)
    return tuple(dict.fromkeys(strings))


def _read_template_kwargs(reader: FieldReader) -> dict[str, Any]:
    """Return the keywords of the chat template, which must not be arguments of the function that renders it."""
    keywords = reader.read_object("chat_template_kwargs")
    for name in keywords:
        if name in TEMPLATE_PARAMETERS or name in ("messages", "eos_token", "bos_token") or not name.isidentifier():
            field = f"chat_template_kwargs.{shorten(name)}"
            reader.refuse(field, f"Invalid '{field}': it is no keyword of a chat template.")
    if len(json.dumps(keywords)) > MAX_KEYWORD_CHARS:  # a template may write them, and tokenizing takes that long
        message = f"Invalid 'chat_template_kwargs': it has more than {MAX_KEYWORD_CHARS} characters as JSON."
        reader.refuse("chat_template_kwargs", message, "string_above_max_length")
    return keywords


# --- prompts ------------------------------------------------------------------------------------------


def _read_prompts(reader: FieldReader) -> tuple[Any, ...]:
    """Return prompts, each a text or a list of token ids."""
    value = reader.fields.get("prompt")
    if value is None:
        reader.refuse_missing("prompt")
        return ()
    if not isinstance(value, str | list):
        reader.refuse_type("prompt", "a string or an array", value)
        return ()
    if not value:
        reader.refuse("prompt", "Invalid 'prompt': it is empty.", "empty_array" if value == [] else "empty_string")
        return ()
    is_single = isinstance(value, str) or (isinstance(value[0], int) and not isinstance(value[0], bool))
    prompts = [value] if is_single else value
    if len(prompts) > MAX_CHOICES:
        reader.refuse(
            "prompt",
            f"Invalid 'prompt': array too long. Expected at most {MAX_CHOICES} prompts, but got {len(prompts)}.",
            "array_above_max_length",
        )
        return ()
    for index, prompt in enumerate(prompts):
        name = "prompt" if is_single else f"prompt[{index}]"
        if isinstance(prompt, str):
            reader.check_text(name, prompt)
        elif not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            reader.refuse(
                name, f"Invalid type for '{name}': expected a string or an array of token ids.", "invalid_type"
            )
        if not prompt and isinstance(prompt, str | list):
            reader.refuse(name, f"Invalid '{name}': it is empty.")
    return tuple(prompts)


def _read_messages(reader: FieldReader) -> list[dict[str, str]]:
    value = reader.fields.get("messages")
    if value is None:
        reader.refuse_missing("messages")
        return []
    if not isinstance(value, list):
        reader.refuse_type("messages", "an array of objects", value)
        return []
    if not value:
        message = "Invalid 'messages': empty array. Expected an array with minimum length 1."
        reader.refuse("messages", message, "empty_array")
    return [_read_message(message, f"messages[{index}]", reader) for index, message in enumerate(value)]


def _read_message(message: Any, path: str, reader: FieldReader) -> dict[str, str]:
    """Return role, content and the name, if there is one."""
    if not isinstance(message, dict):
        reader.refuse_type(path, "an object", message)
        return {}
    inner = FieldReader(message, path, reader)
    role = inner.fields.get("role")
    if role is None:
        inner.refuse_missing("role")
    elif not isinstance(role, str):
        inner.refuse_type("role", "a string", role)
    elif role not in ROLES:
        roles = ", ".join(f"'{role}'" for role in ROLES)
        inner.refuse("role", f"Invalid value for '{path}.role': {quote(role)}. Supported values are: {roles}.")
    for name, value in message.items():
        if name not in ("role", "content", "name") and value not in EMPTY_VALUES:
            text = f"Unknown parameter: '{path}.{shorten(name)}'."
            inner.refuse(shorten(name), text, "unknown_parameter")
    named = _read_name(inner)
    return {"role": ROLES.get(role, "") if isinstance(role, str) else "", "content": _read_content(inner), **named}


def _read_name(reader: FieldReader) -> dict[str, str]:
    name = reader.fields.get("name")
    if name is None:
        return {}
    if not isinstance(name, str):
        reader.refuse_type("name", "a string", name)
    elif not NAME_PATTERN.fullmatch(name) or len(name) > 64:
        message = f"Invalid '{reader.name('name')}': expected at most 64 characters without spaces, <, |, \\, / and >."
        reader.refuse("name", message)
    elif reader.check_text("name", name):
        return {"name": name}
    return {}


def _read_content(reader: FieldReader) -> str:
    """Return the content of a message, which is a string or a list of text parts."""
    value = reader.fields.get("content")
    path = reader.name("content")
    if value is None:
        reader.refuse_missing("content")
        return ""
    if isinstance(value, str):
        return reader.check_text("content", value)
    if not isinstance(value, list):
        reader.refuse_type("content", "a string or an array of objects", value)
        return ""
    if not value:
        reader.refuse(
            "content", f"Invalid '{path}': empty array. Expected an array with minimum length 1.", "empty_array"
        )
    texts = []
    for index, part in enumerate(value):
        is_text = isinstance(part, dict) and part.get("type") == "text"
        if isinstance(part, str) or (is_text and isinstance(part.get("text"), str)):
            texts.append(reader.check_text(f"content[{index}]", part if isinstance(part, str) else part["text"]))
        elif is_text:
            field = f"content[{index}].text"
            reader.refuse(field, f"Missing or invalid text: '{reader.name(field)}' must be a string.", "invalid_type")
        else:
            kind = part.get("type") if isinstance(part, dict) else part
            field = f"content[{index}].type" if isinstance(part, dict) else f"content[{index}]"
            message = f"Invalid value for '{reader.name(field)}': {quote(kind)}. Supported values are: 'text'."
            reader.refuse(field, message)
    return "".join(texts)
