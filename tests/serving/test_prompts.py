"""prompts: requests in tokens, however long they are, and whatever template they ask for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import worlds
from chat_server import CONFIG, NAME, OFFER

from nabla_trl.models.policy import Policy
from nabla_trl.models.prompts import PromptTooLong
from nabla_trl.rewards.reward import Reward
from nabla_trl.serving.fields import ApiError
from nabla_trl.serving.prompts import PromptEncoder, make_request_problem
from nabla_trl.serving.requests import parse_chat_request, parse_completion_request
from nabla_trl.tasks.problem import Problem, compute_content_hash

THINKING = worlds.TEMPLATE.replace("'<|assistant|>' }}", "'<|assistant|>' }}{% if enable_thinking %}abc{% endif %}")


class Tokenizer:
    """A tokenizer that notes how many characters it reads."""

    def __init__(self, tokenizer: Any, longest_token: int):
        self.tokenizer, self.longest_token, self.num_chars = tokenizer, longest_token, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **options: Any) -> Any:
        self.num_chars += len(text)
        return self.tokenizer(text, **options)

    def get_vocab(self) -> dict[str, int]:
        return self.tokenizer.get_vocab() | {" " * self.longest_token: 999}


@pytest.fixture
def encoder(policy: Policy, scalar_reward: Reward) -> Iterator[PromptEncoder]:
    encoder = PromptEncoder(policy, scalar_reward)
    yield encoder
    encoder.close()


def encode_chat(encoder: PromptEncoder, content: str, **fields: Any) -> list[Problem]:
    body = {"messages": [{"role": "user", "content": content}], "seed": 1, **fields}
    return encoder.encode(parse_chat_request(body, OFFER))


def test_a_chat_is_written_as_the_template_says(encoder, policy) -> None:
    [problem] = encode_chat(encoder, "1+2", stop=["#"])
    plain = make_request_problem([{"role": "user", "content": "1+2"}], 1)
    assert list(problem.prompt_ids) == policy.encode(plain) == policy.encode(problem)
    assert (problem.id, problem.question, problem.stop_strings) == (plain.id, "1+2", ("#",))


def test_keywords_reach_the_template(policy, scalar_reward) -> None:
    policy = replace(policy, tokenizer=worlds.char_tokenizer(template=THINKING))
    encoder = PromptEncoder(policy, scalar_reward)
    texts = [
        policy.tokenizer.decode(encode_chat(encoder, "1", chat_template_kwargs=kwargs)[0].prompt_ids)
        for kwargs in ({}, {"enable_thinking": True}, {"enable_thinking": False}, {"other": 1})
    ]
    encoder.close()
    assert texts[1] == texts[0] + "abc" and texts[2] == texts[3] == texts[0]


@pytest.mark.parametrize("longest_token", [1, 10_000])
def test_a_huge_prompt_is_refused_after_a_small_part_of_it(policy, scalar_reward, longest_token: int) -> None:
    """Also where one token may write so much that the number of bytes says nothing."""
    tokenizer = Tokenizer(policy.tokenizer, longest_token)
    encoder = PromptEncoder(replace(policy, tokenizer=tokenizer), scalar_reward)
    tokenizer.num_chars = 0
    for content in ("1" * 1_000_000, "love" * 250_000):
        with pytest.raises(ApiError) as caught:
            encode_chat(encoder, content)
        assert caught.value.body["error"]["code"] == "context_length_exceeded"
        assert caught.value.body["error"]["param"] == "messages" and "request/" not in str(caught.value)
    request = parse_completion_request({"model": NAME, "prompt": "1" * 1_000_000}, OFFER)
    with pytest.raises(ApiError, match="1000000 bytes"):
        encoder.encode(request)
    encoder.close()
    assert tokenizer.num_chars < 50_000


def test_a_text_that_fits_is_not_refused_however_it_is_cut(policy) -> None:
    tokenizer = Tokenizer(policy.tokenizer, 10_000)
    patient = replace(policy, tokenizer=tokenizer)
    patient.check_text_length("1" * 127, "short")
    patient.backend = type("Backend", (), {"get_context_length": lambda self, policy: 20_000})()
    patient.check_text_length("1" * 20_000, "long")
    with pytest.raises(PromptTooLong):
        patient.check_text_length("1" * 200_000, "too long")


def test_more_messages_than_tokens_are_refused_without_writing_them(encoder) -> None:
    body = {"messages": [{"role": "user", "content": "1"}] * 200}
    with pytest.raises(ApiError, match="more messages than policy can read tokens") as caught:
        encoder.encode(parse_chat_request(body, OFFER))
    assert caught.value.body["error"]["code"] == "context_length_exceeded"


def test_a_prompt_that_is_only_scored_need_not_fit_the_reward(encoder, monkeypatch) -> None:
    def refuse(*args: Any) -> int:
        raise PromptTooLong("too long for the reward")

    monkeypatch.setattr(encoder.reward, "compute_max_new_tokens", refuse)
    body = {"prompt": [5, 6, 7], "echo": True, "max_tokens": 0, "logprobs": 0}
    assert encoder.encode(parse_completion_request(body, OFFER))[0].prompt_ids == (5, 6, 7)
    with pytest.raises(ApiError, match="too long for the reward"):
        encoder.encode(parse_completion_request({**body, "max_tokens": 1}, OFFER))


def test_every_choice_is_a_problem_of_its_own(encoder) -> None:
    request = parse_completion_request({"prompt": ["1", "2"], "n": 3, "seed": 4, "max_tokens": 6}, OFFER)
    problems = encoder.encode(request)
    assert len({problem.id for problem in problems}) == 6 and request.config == CONFIG
    assert [problem.question for problem in problems] == ["1"] * 3 + ["2"] * 3


def test_the_hash_of_a_problem_without_a_prompt_in_tokens_is_what_it_was() -> None:
    problem = Problem(id="a", question="1+2")
    assert compute_content_hash(problem) == "6955853ce8c4"
    assert compute_content_hash(replace(problem, prompt_ids=(1, 2))) != compute_content_hash(problem)
