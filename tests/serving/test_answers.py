"""answers: what completions and chat completions hold, asked over a real server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import openai
import pytest
import torch
from chat_server import NAME, Running, ask, serving
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from nabla_trl.engine.logprobs import compute_token_logprobs
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.serving.answers import cut_at_stop_string
from nabla_trl.serving.requests import ServerLimits

LONG = SearchConfig(max_new_tokens=24, max_rounds=3)
PROMPT = "<|user|>12-3+4*5<|end|><|assistant|>"
QUESTION = "12-3+4*5"


@pytest.fixture(scope="module")
def server(policy: Policy, scalar_reward: Reward) -> Iterator[Running]:
    with serving(policy, scalar_reward, ServerLimits(NAME, LONG)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    return client.completions.create(**{"model": NAME, "prompt": prompt, "max_tokens": 24, **options})


# --- stop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_rollouts": 1}], ids=["search", "plain decoding"])
def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client, options: dict[str, int]) -> None:
    more: dict[str, Any] = {"extra_body": options}
    text = ask(client, QUESTION, seed=1, **more).choices[0].message.content
    assert len(text) > 6
    for stop in (text[2:4], [text[4], "never"]):
        choice = ask(client, QUESTION, seed=1, stop=stop, **more).choices[0]
        assert choice.finish_reason == "stop" or len(choice.message.content) >= 16
        assert all(string not in choice.message.content for string in ([stop] if isinstance(stop, str) else stop))
        stream = list(ask(client, QUESTION, seed=1, stop=stop, stream=True, **more))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == choice.message.content
        shown = [chunk.nabla["text"] for chunk in stream if "text" in (getattr(chunk, "nabla", None) or {})]
        assert shown[-1] == choice.message.content


def test_no_token_is_generated_after_a_stop_string(client) -> None:
    plain: dict[str, Any] = {"extra_body": {"max_rollouts": 1}}
    many = complete(client, PROMPT, n=8, **plain)
    plain["seed"] = max(many.choices, key=lambda choice: len(choice.text)).nabla["seed"]
    free = complete(client, PROMPT, **plain)
    text = free.choices[0].text
    for begin in range(1, 6):
        stop = text[begin : begin + 2]
        cut = complete(client, PROMPT, stop=stop, **plain)
        assert cut.choices[0].text == cut_at_stop_string(text, [stop]) and cut.choices[0].finish_reason == "stop"
        assert len(cut.choices[0].text) + 2 <= cut.usage.completion_tokens < free.usage.completion_tokens


def test_a_stop_string_may_lie_across_tokens_or_within_one(policy) -> None:
    """Tokens of several characters: the string ends within a token, or begins in the one before."""
    texts = ["<unk>", "ab", "cd", "abc", " x", "\n\n", "<eos>"]
    inner = Tokenizer(models.WordLevel({text: index for index, text in enumerate(texts)}, unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>")
    policy = replace(policy, tokenizer=tokenizer, stop_ids=frozenset([6]))
    for response, stop, ends_at in (
        (["ab", "cd"], "bc", 2),
        (["cd", "ab", "cd"], "da", 2),
        (["abc", "cd"], "b", 1),
        (["\n\n", "ab"], "\n", 1),
        (["ab", "\n\n", "cd"], "b\n\nc", 3),
        (["cd", " x", "ab"], "d x", 2),
        (["ab", *["<unk>"] * 9, "cd"], "bc", 11),  # special tokens are not part of the text
        (["cd", "cd"], "ab", None),
    ):
        ids = [texts.index(text) for text in response]
        ends = [length for length in range(1, len(ids) + 1) if policy.is_finished(ids[:length], (stop,))]
        assert (ends or [None])[0] == ends_at, (response, stop)


def test_texts_are_cut_at_the_first_stop_string() -> None:
    assert cut_at_stop_string("a;b#c", ["#", ";"]) == "a"
    assert cut_at_stop_string("abc", ["x"]) == "abc" and cut_at_stop_string("abc", []) == "abc"


# --- completions ------------------------------------------------------------------------------------------


def test_a_raw_prompt_is_what_the_template_writes(client) -> None:
    chat = ask(client, QUESTION, temperature=0, extra_body={"max_rollouts": 1})
    raw = complete(client, PROMPT, temperature=0, extra_body={"max_rollouts": 1})
    assert raw.choices[0].text == chat.choices[0].message.content
    assert (raw.object, raw.usage.prompt_tokens) == ("text_completion", chat.usage.prompt_tokens)
    assert raw.id.startswith("cmpl-") and raw.choices[0].finish_reason == chat.choices[0].finish_reason


def test_texts_and_tokens_one_and_many_give_the_same(client, policy) -> None:
    ids = list(policy.tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
    other = ids[:4] + ids[-2:]
    greedy = {"temperature": 0, "extra_body": {"max_rollouts": 1}}
    text = complete(client, PROMPT, **greedy).choices[0].text
    assert complete(client, ids, **greedy).choices[0].text == text
    many = complete(client, [ids, other, ids], **greedy)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert many.choices[0].text == many.choices[2].text == text
    assert many.usage.prompt_tokens == 2 * len(ids) + len(other)
    assert complete(client, [PROMPT, PROMPT], **greedy).choices[1].text == text


@pytest.mark.parametrize("prompt", [[999], [-1], [5] * 500, "1" * 500, "love"])
def test_prompts_that_cannot_be_read_are_refused(client, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, prompt)
    assert caught.value.param == "prompt" and "request/" not in str(caught.value)


def test_several_answers_have_seeds_that_give_them_again(client) -> None:
    many = ask(client, QUESTION, n=3, seed=7)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in many.choices]
    assert len(set(texts)) > 1
    for choice in many.choices:
        again = ask(client, QUESTION, seed=choice.nabla["seed"])
        assert again.choices[0].message.content == choice.message.content
    assert many.nabla == many.choices[0].nabla and many.usage.nabla["starts"] == 3
    assert many.usage.prompt_tokens == ask(client, QUESTION, seed=7).usage.prompt_tokens


def test_streams_of_several_prompts_add_up_to_their_answers(client) -> None:
    prompts = [PROMPT, "<|user|>7<|end|><|assistant|>"]
    whole = complete(client, prompts, seed=2, echo=True)
    chunks = list(complete(client, prompts, seed=2, echo=True, stream=True, stream_options={"include_usage": True}))
    texts, reasons = ["", ""], [None, None]
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))


# --- log-probabilities ------------------------------------------------------------------------------------


def test_echoed_log_probabilities_are_the_models_own(client, policy) -> None:
    ids = list(policy.tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
    answer = complete(client, ids, echo=True, logprobs=2, max_tokens=1, temperature=0)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(ids) + 1 == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
    assert "".join(logprobs.tokens[: len(ids)]) == PROMPT
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    with torch.no_grad():
        logp = policy.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    expected = [float(logp[index, token]) for index, token in enumerate(ids[1:])]
    assert logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-5)
    for index in range(1, len(ids)):
        top = logprobs.top_logprobs[index]
        assert 2 <= len(top) <= 3 and top[logprobs.tokens[index]] == pytest.approx(expected[index - 1], abs=1e-5)
        assert max(top.values()) == pytest.approx(float(logp[index - 1].max()), abs=1e-5)
    assert all(first <= second for first, second in pairwise(logprobs.text_offset))


def test_the_prompt_alone_is_scored_without_a_search(client) -> None:
    answer = complete(client, PROMPT, echo=True, logprobs=0, max_tokens=0)
    [choice] = answer.choices
    assert choice.text == PROMPT and choice.finish_reason == "length" and answer.usage.completion_tokens == 0
    assert answer.usage.nabla["starts"] == 0 and choice.logprobs.token_logprobs[1] < 0
    [text, end] = list(complete(client, PROMPT, echo=True, max_tokens=0, stream=True))
    assert text.choices[0].text == PROMPT and end.choices[0].finish_reason == "length"


def test_chat_answers_have_log_probabilities_of_their_tokens(client, policy) -> None:
    answer = ask(client, QUESTION, seed=1, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    ids = [policy.tokenizer.convert_tokens_to_ids(entry.token) for entry in content]  # special tokens included
    assert policy.decode(ids) == answer.choices[0].message.content
    assert all(entry.logprob < 0 and len(entry.top_logprobs) == 2 for entry in content)
    assert bytes(content[0].bytes).decode() == content[0].token
    assert ask(client, QUESTION, seed=1).choices[0].logprobs is None


@pytest.mark.parametrize("max_logits", [27, 100, 2**24])
def test_long_sequences_are_scored_piece_by_piece(policy, monkeypatch, max_logits: int) -> None:
    from nabla_trl.engine import logprobs

    monkeypatch.setattr(logprobs, "MAX_LOGITS", max_logits)
    ids = list(policy.tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
    result = compute_token_logprobs(policy, ids, 1)
    with torch.no_grad():
        logp = policy.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    expected = logp[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()
    assert result.logprobs[0] is None and result.logprobs[1:] == pytest.approx(expected, abs=1e-5)
    assert [row[0][0] for row in result.top[1:]] == logp[:-1].argmax(-1).tolist()
