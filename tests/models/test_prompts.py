"""How a policy is asked: worked examples, template keywords, think blocks; and where its responses end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import worlds
from vllm_server import FakeVllm, serving

from nabla_trl.baselines import sampling
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations
from nabla_trl.models.loading import load_policy
from nabla_trl.models.options import PromptOptions, Sampling
from nabla_trl.models.policy import GenerationOutput, GenerationRequest, Policy
from nabla_trl.models.prompts import check_prompt_options, format_few_shot
from nabla_trl.models.sampling import make_rng
from nabla_trl.models.vllm_backend import connect_vllm
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.datasets import build_sft_rows
from nabla_trl.training.online import check_stop_strings

SHOWN = Problem("q", "3+4", "7", few_shot_examples=(("1+1", "It is 2."), ("2+2", "It is 4.")))
TEXT = "Question: 1+1\nAnswer: It is 2.\n\nQuestion: 2+2\nAnswer: It is 4.\n\nQuestion: 3+4\nAnswer:"
LETTERS = sorted(set(TEXT + "\n ") - set(worlds.CHARS))
# As Qwen3's: thinking is on unless the keyword says otherwise, and then an empty block is written.
THINKING = worlds.TEMPLATE.replace(
    "{{ '<|assistant|>' }}",
    "{{ '<|assistant|>' }}{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
)
SAMPLED = Sampling(max_new_tokens=24)


def base_policy(seed: int = 0, template: str | None = None, context: int = 256, **options: object) -> Policy:
    """A policy that can write the examples; without a chat template unless one is given."""
    tokens = (*worlds.TOKENS, *LETTERS, "<think>", "</think>")
    policy = worlds.tiny_policy(tokenizer=worlds.char_tokenizer(tokens, template=template), seed=seed, context=context)
    return replace(policy, prompt_options=PromptOptions(**options))  # type: ignore[arg-type]


# --- prompts ----------------------------------------------------------------------------------------------


def test_a_policy_without_a_template_is_shown_worked_examples() -> None:
    policy = base_policy()
    assert policy.tokenizer.decode(policy.encode(SHOWN)) == format_few_shot(SHOWN) == TEXT
    assert policy.get_stop_strings(SHOWN) == ("\nQuestion:",)
    bare = replace(SHOWN, few_shot_examples=(), stop_strings=("#",))
    assert policy.tokenizer.decode(policy.encode(bare)) == "3+4\n" and policy.get_stop_strings(bare) == ("#",)


def test_a_style_can_be_chosen() -> None:
    assert base_policy(template=worlds.TEMPLATE).get_stop_strings(SHOWN) == ()
    shown = base_policy(template=worlds.TEMPLATE, style="few_shot")
    assert shown.tokenizer.decode(shown.encode(SHOWN)) == TEXT and shown.get_stop_strings(SHOWN) == ("\nQuestion:",)
    worlds.refused(lambda: shown.encode(replace(SHOWN, few_shot_examples=())), "q", "few_shot needs worked examples")
    worlds.refused(lambda: PromptOptions("chatty"), "auto, chat, few_shot", "'chatty'")
    worlds.refused(lambda: PromptOptions("few_shot", {"a": 1}), "chat_template_kwargs")


@pytest.mark.parametrize("reward_of", [worlds.tiny_scalar, worlds.tiny_logratio])
def test_examples_are_shown_where_a_reward_is_searched_with(reward_of: Callable[[Policy], Reward]) -> None:
    """The probe of a reward is of no task, and has no examples."""
    shown = base_policy(template=worlds.TEMPLATE, style="few_shot")
    config = SearchConfig(max_rounds=2, max_new_tokens=8)
    [trace] = run_search([SHOWN], policy=shown, reward=reward_of(shown), config=config)
    assert trace.error is None and trace.prompt == TEXT


def test_problems_without_examples_are_refused_before_any_work() -> None:
    PromptOptions("few_shot").check_problems([SHOWN])
    PromptOptions().check_problems([replace(SHOWN, few_shot_examples=())])
    bare = replace(SHOWN, few_shot_examples=(), task="pens")
    worlds.refused(lambda: PromptOptions("few_shot").check_problems([SHOWN, bare]), "few_shot", "task pens has none")


def test_keywords_reach_the_template_and_are_told_of() -> None:
    options = PromptOptions.parse("auto", '{"enable_thinking": false}')
    policy = base_policy(template=THINKING)
    quiet = replace(policy, prompt_options=options)
    decoded = [one.tokenizer.decode(one.encode(SHOWN)) for one in (policy, quiet)]
    assert decoded[1] == decoded[0] + "<think>\n\n</think>\n\n"
    assert options.get_changed_settings() == {"chat_template_kwargs": '{"enable_thinking": false}'}
    assert PromptOptions().get_changed_settings() == {}
    [trace] = sampling.decode_greedily([SHOWN], policy=quiet, reward=None, max_new_tokens=2)
    assert (
        trace.prompt_ids == quiet.encode(SHOWN) and trace.meta["chat_template_kwargs"] == '{"enable_thinking": false}'
    )


@pytest.mark.parametrize(
    ("text", "words"), [("{", ["not JSON"]), ("[1]", ["must be a JSON object"]), ('"a"', ["must be a JSON object"])]
)
def test_keywords_that_are_none(text: str, words: list[str]) -> None:
    worlds.refused(lambda: PromptOptions.parse("auto", text), "chat_template_kwargs", *words)


def test_options_that_a_template_cannot_heed_are_refused(tmp_path: object) -> None:
    plain, thinking = worlds.char_tokenizer(template=None), worlds.char_tokenizer(template=THINKING)
    check_prompt_options(PromptOptions("chat", {"enable_thinking": True}), thinking, "m")
    worlds.refused(
        lambda: check_prompt_options(PromptOptions("chat"), plain, "m"), "m has no chat template", "prompt_style"
    )
    off = PromptOptions(chat_template_kwargs={"enable_thinkin": False})
    worlds.refused(lambda: check_prompt_options(off, plain, "m"), "m has no chat template", "chat_template_kwargs")
    worlds.refused(lambda: check_prompt_options(off, thinking, "m"), "the chat template of m has no 'enable_thinkin'")
    thinking.save_pretrained(str(tmp_path))
    worlds.refused(lambda: load_policy(str(tmp_path), prompt_options=off), "no 'enable_thinkin'")


def test_a_response_that_begins_inside_a_think_block_has_no_answer_before_its_end() -> None:
    policy = base_policy(template=worlds.TEMPLATE.replace("'<|assistant|>'", "'<|assistant|><think>'"))
    inside, after = (list(policy.tokenizer(text)["input_ids"]) for text in ("1+1=2", "1+1=2</think>#3"))
    # The tags are special tokens here, and Qwen's are not: only what is decoded shows them.
    policy.tokenizer.decode = lambda ids, **_: "".join(policy.tokenizer.convert_ids_to_tokens(ids))
    assert extract_answer(policy.decode_response(inside)) is None
    assert extract_answer(policy.decode_response(after)) == "3"
    assert extract_answer(base_policy(template=worlds.TEMPLATE).decode_response(inside)) == "2"


# --- where responses end ----------------------------------------------------------------------------------


def _draw(policy: Policy, stop: tuple[str, ...], batch_size: int = 256) -> list[GenerationOutput]:
    prompts = {f"q{index}": policy.encode(problem) for index, problem in enumerate(worlds.tiny_problems())}
    requests = [
        GenerationRequest(f"{key}-{draw}", ids, make_rng(0, key, draw), 24, stop_strings=stop)
        for key, ids in prompts.items()
        for draw in range(8)
    ]
    return generate_continuations(
        policy,
        requests,
        SAMPLED,
        flop_counter=FlopCounter(),
        top_k_candidates=4,
        return_cache=True,
        return_log_importance_weight=True,
        batch_size=batch_size,
    )


def _first_end(policy: Policy, ids: Sequence[int], stop: Sequence[str]) -> int:
    """Tokens up to the first that completes a string; all where none does."""
    texts = [policy.decode(list(ids[:length])) for length in range(1, len(ids) + 1)]
    return next((n for n, text in enumerate(texts, start=1) if any(one in text for one in stop)), len(ids))


@pytest.mark.parametrize("stop", [("7",), ("#", "=1"), ("12", "a", "0b")])
def test_drafts_are_those_without_the_strings_cut_where_one_is_complete(stop: tuple[str, ...]) -> None:
    policy = worlds.tiny_policy(seed=2)
    free, stopped = _draw(policy, ()), _draw(policy, stop)
    ends = [_first_end(policy, output.ids, stop) for output in free]
    assert sum(end < len(output.ids) for end, output in zip(ends, free, strict=True)) > 5
    for end, whole, cut in zip(ends, free, stopped, strict=True):
        assert cut.ids == whole.ids[:end]
        assert cut.finished == (whole.finished or any(one in policy.decode(cut.ids) for one in stop))
        assert torch.equal(cut.candidates, whole.candidates[:end])
        torch.testing.assert_close(cut.logp, whole.logp[:end], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            cut.get_cache().tokens, whole.get_cache().cut(cut.get_cache().length).tokens, rtol=1e-4, atol=1e-5
        )
    singles = _draw(policy, stop, batch_size=1)
    assert [output.ids for output in singles] == [output.ids for output in stopped]


def test_a_string_may_begin_in_what_is_given_but_not_in_the_prompt() -> None:
    policy = worlds.tiny_policy(seed=2)
    prompt = policy.encode(worlds.tiny_problems()[0])
    stream = make_rng(0, "q")
    [free] = generate_continuations(
        policy, [GenerationRequest("q", prompt, None, 6)], Sampling(temperature=0.0), flop_counter=FlopCounter()
    )
    given, then = free.ids[:1], free.ids[1]
    string = policy.decode(free.ids[:2])
    assert len(string) == 2
    inside, outside = (
        GenerationRequest("q", prompt + given, stream, 5, stop_strings=(string,), response_tokens_in_prefix=count)
        for count in (1, 0)
    )
    ended, on = generate_continuations(
        policy, [inside, outside], Sampling(temperature=0.0), flop_counter=FlopCounter()
    )
    assert ended.ids == [then] and ended.finished
    assert on.ids == free.ids[1:]


def test_search_baselines_and_rows_for_training_end_at_the_same_tokens() -> None:
    policy = base_policy(seed=4)
    reward = worlds.tiny_scalar(policy, context=256)
    problems = [
        replace(SHOWN, id=f"q{n}", question=q, stop_strings=tuple("4679abf")) for n, q in enumerate(worlds.QUESTIONS)
    ]
    config = SearchConfig(proposals={"proposals_per_round": 2}, max_rounds=6, max_new_tokens=16, top_k_candidates=8)
    traces = run_search(problems, policy=policy, reward=reward, config=config, seed=1)
    pool = sampling.draw_pool(
        problems, 4, policy=policy, reward=reward, sampling=config.get_sampling(), seed=1, batch_size=8
    )
    assert [trace.initial_ids for trace in traces] == [entry.responses[0].response_ids for entry in pool.entries]
    drawn = [draw.response_ids for entry in pool.entries for draw in entry.responses]
    reached = [ids for trace in traces for ids, _ in trace.list_incumbents()]
    reached += [base[: one.position] + list(one.suffix) for trace in traces for one, base in trace.replay_revisions()]
    stops = policy.get_stop_strings(problems[0])
    assert any(policy.is_finished(ids, stops) and ids[-1] not in policy.stop_ids for ids in reached)
    for ids in [*drawn, *reached]:
        assert _first_end(policy, ids, stops) == len(ids)
    for trace in traces:
        trace.validate()
        assert trace.error is None and trace.finished == policy.is_finished(trace.response_ids, stops)
    rows = build_sft_rows(traces).rows
    assert len(rows) == sum(trace.finished for trace in traces) > 0
    for row in rows:
        assert policy.is_finished([token for token in row["labels"] if token >= 0], stops)


def test_a_servers_responses_end_at_the_same_strings() -> None:
    policy = worlds.tiny_policy(seed=2)
    rows = len(policy.forbidden_mask)
    requests = [
        GenerationRequest(problem.id, policy.encode(problem), None, 12, stop_strings=("=1", "7"))
        for problem in worlds.tiny_problems()
    ]
    [free] = generate_continuations(
        policy, [replace(requests[0], stop_strings=())], Sampling(temperature=0.0), flop_counter=FlopCounter()
    )
    string = policy.decode(free.ids[:2])
    requests.append(
        GenerationRequest(
            "given",
            requests[0].prefix_ids + free.ids[:1],
            None,
            8,
            stop_strings=(string,),
            response_tokens_in_prefix=1,
        )
    )
    with serving(FakeVllm(policy.model, policy.tokenizer, policy.name, max_logprobs=rows)) as fake:
        outputs = generate_continuations(
            connect_vllm(policy, fake.url), requests, Sampling(temperature=0.0), flop_counter=FlopCounter()
        )
    expected = generate_continuations(policy, requests, Sampling(temperature=0.0), flop_counter=FlopCounter())
    assert expected[-1].ids == free.ids[1:2]
    assert [(one.ids, one.finished) for one in outputs] == [(one.ids, one.finished) for one in expected]
    assert all(len(one.logp) == len(one.ids) for one in outputs)


def test_answers_are_looked_for_before_the_string() -> None:
    policy = base_policy()
    ids = list(policy.tokenizer("3+4=7\nQuestion: 5+6")["input_ids"])
    assert (
        policy.decode_response(ids, ("\nQuestion:",)) == "3+4=7"
        and policy.decode_response(ids) == "3+4=7\nQuestion: 5+6"
    )


def test_training_that_draws_by_trl_is_refused_where_strings_end_responses() -> None:
    check_stop_strings(base_policy(template=worlds.TEMPLATE), [SHOWN])
    worlds.refused(lambda: check_stop_strings(base_policy(), [SHOWN]), "rloo, grpo", "Question:", "chat template")
