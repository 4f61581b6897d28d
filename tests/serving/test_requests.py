"""requests: what is read from the body of a request, and what is refused."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import worlds
from chat_server import CONFIG, NAME, OFFER

from nabla_trl.search.config import SearchConfig
from nabla_trl.serving.fields import ApiError
from nabla_trl.serving.requests import (
    CHAT_FIELDS,
    CHAT_NEUTRAL_VALUES,
    COMMON_FIELDS,
    COMPLETION_FIELDS,
    IGNORED_FIELDS,
    SearchRequest,
    ServerLimits,
    estimate_flops_bound,
    parse_chat_request,
    parse_completion_request,
    parse_json,
)


def read(offer: ServerLimits = OFFER, **fields: Any) -> SearchRequest:
    return parse_chat_request({"model": NAME, "messages": [{"role": "user", "content": "1+2"}], **fields}, offer)


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
        with pytest.raises(ApiError, match="'target_kl' needs solver mirror, and this server runs solver none"):
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


CHAT_NEUTRAL = {
    "n": 1,
    "top_logprobs": 0,
    "logprobs": False,
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "length_penalty": 1.0,
    "top_k": -1,
    "min_p": 0,
    "top_p": 1,
    "logit_bias": {},
    "stop": [],
    "stop_token_ids": [],
    "bad_words": [],
    "ignore_eos": False,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "service_tier": "auto",
    "parallel_tool_calls": False,
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "store": False,
    "metadata": {"a": "b"},
    "user": "me",
    "safety_identifier": "me",
    "prompt_cache_key": "k",
    "chat_template_kwargs": {},
    "add_generation_prompt": True,
    "stream": False,
    "stream_options": {},
    "priority": 0,
    "prediction": None,
    "audio": None,
    "guided_json": None,
}


@pytest.mark.parametrize("name", CHAT_NEUTRAL)
def test_what_asks_for_nothing_is_accepted(name: str) -> None:
    request = read(**{name: CHAT_NEUTRAL[name]})
    assert request.config == CONFIG and request.num_top_logprobs is None and request.num_choices == 1
    assert read(**{name: None}).config is CONFIG


def test_all_of_it_at_once_and_no_model() -> None:
    body = {"messages": [{"role": "user", "content": "1+2", "name": "me"}], **CHAT_NEUTRAL}
    request = parse_chat_request(body, OFFER)
    assert request.config == CONFIG and request.messages == [{"role": "user", "content": "1+2", "name": "me"}]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"n": 1.0}, "n", "invalid_type"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
        ({"store": True}, "store", "unsupported_value"),
        ({"store": 0}, "store", "unsupported_value"),
        ({"frequency_penalty": False}, "frequency_penalty", "unsupported_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": 1}, "logprobs", "invalid_type"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"stop": 3}, "stop", "invalid_type"),
        ({"stop": [3]}, "stop[0]", "invalid_type"),
        ({"stop": ""}, "stop", "empty_string"),
        ({"stop": list("abcde")}, "stop", "array_above_max_length"),
        ({"stop": ["a" * 1001]}, "stop[0]", "string_above_max_length"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
        ({"chat_template_kwargs": {"chat_template": "{{1}}"}}, "chat_template_kwargs.chat_template", "invalid_value"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize", "invalid_value"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "invalid_type"),
        ({"user": 3}, "user", "invalid_type"),
        ({"bata": 0.5}, "bata", "unknown_parameter"),
        ({"batch_size": 4}, "batch_size", "unknown_parameter"),
        ({"num_starts": 10**9}, "num_starts", "integer_above_max_value"),
        ({"num_chains": 2}, "num_chains", "invalid_value"),
        ({"max_rollouts": 10**9}, "max_rollouts", "integer_above_max_value"),
        ({"max_rounds": 0}, "max_rounds", "integer_below_min_value"),
        ({"max_rounds": 0, "patience": 10**9}, "max_rounds", "integer_below_min_value"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": "1+2"}, "messages", "invalid_type"),
        ({"messages": ["1+2"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": ["user"], "content": "1"}]}, "messages[0].role", "invalid_type"),
        ({"messages": [{"content": "1"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "empty_array"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "invalid_type",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content", "invalid_value"),
        ({"messages": [{"role": "user", "content": "1", "name": "<|end|>"}]}, "messages[0].name", "invalid_value"),
        ({"messages": [{"role": "user", "content": "1", "nome": "x"}]}, "messages[0].nome", "unknown_parameter"),
        ({"model": 3}, "model", "invalid_type"),
        ({"seed": 1.5}, "seed", "invalid_type"),
        ({"seed": True}, "seed", "invalid_type"),
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"obfuscate": 1}}, "stream_options.obfuscate", "unknown_parameter"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "invalid_type"),
        ({"temperature": "0.5"}, "temperature", "invalid_type"),
        ({"temperature": -1}, "temperature", "decimal_below_min_value"),
        ({"beta": 10**400}, "beta", "decimal_above_max_value"),
        ({"beta": 1e400}, "beta", "decimal_above_max_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_tokens": "6"}, "max_tokens", "invalid_type"),
        ({"max_tokens": 7}, "max_tokens", "integer_above_max_value"),
        ({"max_completion_tokens": 7}, "max_completion_tokens", "integer_above_max_value"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "integer_below_min_value"),
        ({"max_completion_tokens": 2, "max_tokens": 3}, "max_tokens", "invalid_parameter_combination"),
        ({"beta": -1}, "beta", "decimal_below_min_value"),
        ({"beta": 1e-300}, "beta", "decimal_below_min_value"),
        ({"beta": 1, "target_kl": 1}, "beta", "invalid_value"),
        ({"max_flops": -1}, "max_flops", "decimal_below_min_value"),
        ({"top_p": 0}, "top_p", "decimal_below_min_value"),
        ({"top_p": 1.1}, "top_p", "decimal_above_max_value"),
        ({"min_p": 1}, "min_p", "decimal_above_max_value"),
        ({"top_k": -2}, "top_k", "integer_below_min_value"),
    ],
)
def test_what_cannot_be_honored_is_refused(fields: dict[str, Any], param: str | None, code: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert caught.value.status == 400
    error = caught.value.body["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert str(param) in error["message"] and "max_new_tokens" not in error["message"]


def test_one_error_names_all_mistakes() -> None:
    fields: dict[str, Any] = {"temperature": "hot", "top_p": 7, "bata": 1, "tools": [{}]}
    with pytest.raises(ApiError) as caught:
        read(**fields, messages=[{"role": "robot", "content": 1}])
    names = [*fields, "messages[0].role", "messages[0].content"]
    assert all(f"'{name}'" in str(caught.value) for name in names), str(caught.value)


def test_another_model_is_not_found_and_its_request_read_all_the_same() -> None:
    with pytest.raises(ApiError, match=r"The model 'o\?' does not exist.*'seed'") as caught:
        read(model="o\n", seed="x")
    assert caught.value.status == 404 and caught.value.body["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "1"}], **{f"x{n}": 1 for n in range(50_000)}},
        {"messages": [{"role": "x"}] * 50_000},
        {"messages": [{"role": "user", "content": "1"}], "y" * 10**6: 1},
        {"messages": [{"role": "user", "content": [{"type": "y" * 10**6}]}]},
        {"messages": [{"role": "user", "content": "1"}], "\ud800\x1b[2J": 1},
        {"messages": [{"role": "user", "content": "1"}], "logit_bias": {str(n): 1 for n in range(50_000)}},
    ],
)
def test_an_error_is_short_however_wrong_the_request(body: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat_request(body, OFFER)
    assert len(str(caught.value)) < 1500 and str(caught.value).isprintable()


def test_a_top_k_of_minus_one_disables_the_filter() -> None:
    limits = ServerLimits(NAME, SearchConfig(top_k=5, max_new_tokens=6))
    assert read(limits).config.top_k == 5
    assert read(limits, top_k=-1).config.top_k == read(limits, top_k=0).config.top_k == 0


def test_stop_strings_and_choices_and_log_probabilities() -> None:
    assert read(stop="#").stop == ("#",)
    assert read(stop=["#", ";", "#"]).stop == ("#", ";")
    assert read(logprobs=True).num_top_logprobs == 0 and read(logprobs=True, top_logprobs=3).num_top_logprobs == 3
    request = read(n=3, seed=5)
    assert request.get_seed(0) == 5 and len({request.get_seed(choice) for choice in range(3)}) == 3
    assert all(0 <= request.get_seed(choice) < 2**31 for choice in range(3))


# --- completions ------------------------------------------------------------------------------------------


def complete(**fields: Any) -> SearchRequest:
    return parse_completion_request({"model": NAME, "prompt": "1+2", **fields}, OFFER)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("1+2", ("1+2",)), (["1+2", "3"], ("1+2", "3")), ([5, 6], ([5, 6],)), ([[5], [6, 7]], ([5], [6, 7]))],
)
def test_prompts_are_texts_or_tokens_one_or_many(prompt: Any, prompts: tuple[Any, ...]) -> None:
    request = complete(prompt=prompt)
    assert request.prompts == prompts and not request.echo and not request.only_prompt


def test_completions_have_sixteen_tokens_as_openais() -> None:
    limits = ServerLimits(NAME, SearchConfig(max_new_tokens=64))
    assert parse_completion_request({"prompt": "1"}, limits).config.max_new_tokens == 16
    assert parse_completion_request({"prompt": "1", "max_tokens": 64}, limits).config.max_new_tokens == 64
    assert complete().config.max_new_tokens == 6


def test_echo_without_tokens_returns_the_prompt_alone() -> None:
    assert complete(echo=True, max_tokens=0, logprobs=1).only_prompt
    with pytest.raises(ApiError, match="max_tokens"):
        complete(max_tokens=0)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": ["1", 2]}, "prompt[1]"),
        ({"prompt": [1, "2"]}, "prompt"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": ["1"] * 129}, "prompt"),
        ({"prompt": ["1"] * 100, "n": 2}, "n"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
        ({"echo": 1}, "echo"),
    ],
)
def test_wrong_completion_requests_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        complete(**fields)
    assert caught.value.status == 400 and caught.value.body["error"]["param"] == param


def test_completions_take_what_asks_for_nothing() -> None:
    request = complete(suffix="", best_of=1, logprobs=False, echo=False, user="me", logit_bias={}, n=1)
    assert request.config == CONFIG and request.num_top_logprobs is None
    assert complete(n=2, best_of=2).num_choices == 2
    assert len(complete(stop=[str(n) for n in range(8)]).stop) == 8  # lm-eval sends all that a task has


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [("flops", "max_flops"), ("rounds", "max_rounds"), ("kl", "target_kl")])
def test_the_refusal_of_a_renamed_field_names_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ApiError, match=f"^Unknown parameter: '{old}': it is now '{new}'.$"):
        read(**{old: 1})


@pytest.mark.parametrize("flops", [0, 5.1])
def test_budgets_above_the_limit_are_refused(flops: float) -> None:
    with pytest.raises(ApiError, match="'max_flops'"):
        read(ServerLimits(NAME, CONFIG, max_request_flops=5.0), max_flops=flops)


def test_budgets_are_bounded_by_default() -> None:
    limits = ServerLimits(NAME, CONFIG, flops_bound=1e9)
    assert read(limits).config.max_flops == 0  # requests without a budget end by their rounds
    assert read(limits, max_flops=1e9, max_rounds=0).config.max_flops == 1e9
    with pytest.raises(ApiError, match="<= 1000000000, but got 1000000001 instead"):
        read(limits, max_flops=10**9 + 1)


def test_the_bound_is_what_many_rounds_cost(policy, scalar_reward) -> None:
    bounds = [estimate_flops_bound(policy, scalar_reward, CONFIG, rounds) for rounds in (1, 256)]
    assert 0 < 100 * bounds[0] < bounds[1] < 300 * bounds[0]


def test_rounds_above_the_limit_are_refused() -> None:
    limits = ServerLimits(NAME, SearchConfig(max_rounds=4), max_request_rounds=8)
    assert read(limits, max_rounds=8).config.max_rounds == 8
    with pytest.raises(ApiError, match="'max_rounds': integer above maximum value"):
        read(limits, max_rounds=9)
    own_rounds = ServerLimits(NAME, SearchConfig(max_rounds=12), max_request_rounds=8)
    assert read(own_rounds, max_rounds=12).config.max_rounds == 12


@pytest.mark.parametrize("body", [b"", b"{", b'{"beta": NaN}', b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="not valid JSON"):
        parse_json(body)


ODD_VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 16, 2**63, 10**30, -(10**400), -0.0, 0.5, 1.0, 1e-320, 1e308, math.inf),
    *(
        "",
        "1+2",
        "auto",
        "\ud800",
        "\x00",
        "<|end|>",
        "x" * 2000,
        [],
        {},
        [None],
        [5],
        [[5]],
        ["a"],
        ["a"] * 40,
        [2**70],
    ),
    *(
        {"type": "text"},
        {"5": 0},
        {"include_usage": True},
        {"\ud800": {"self": []}},
        [{"role": "user", "content": "1"}],
    ),
    [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}],
)


@pytest.mark.parametrize("parse", [parse_chat_request, parse_completion_request])
def test_odd_values_of_any_field_are_read_or_refused_in_words_that_can_be_sent(parse: Any) -> None:
    rng = random.Random(0)
    names = [*COMMON_FIELDS, *CHAT_FIELDS, *COMPLETION_FIELDS, *IGNORED_FIELDS, *CHAT_NEUTRAL_VALUES, "\ud800", "a\nb"]
    first = {"messages": [{"role": "user", "content": "1"}]} if parse is parse_chat_request else {"prompt": "1"}
    num_read = 0
    for _ in range(2000):
        fields = {rng.choice(names): rng.choice(ODD_VALUES) for _ in range(rng.randrange(1, 4))}
        try:
            parse({**first, **fields}, OFFER)
            num_read += 1
        except ApiError as error:
            text = json.dumps(error.body, ensure_ascii=False)
            assert text.isprintable() and text.encode() and len(text) < 3000
    assert 50 < num_read < 1900
