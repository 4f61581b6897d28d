"""Functions as rewards: what they are called with, what they may return, and where they are refused."""

from __future__ import annotations

import asyncio
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import worlds

from nabla_trl.baselines.sampling import draw_pool, select_best_of_n
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.function import FunctionReward
from nabla_trl.rewards.loading import load_reward
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem

SHORT = Sampling(max_new_tokens=5)


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def draw(policy: Policy, function: Any, problems: list[Problem] | None = None, **options: Any) -> list[Any]:
    reward = load_reward(function, policy=policy, **options)
    return draw_pool(problems or worlds.tiny_problems(), 3, policy=policy, reward=reward, sampling=SHORT).entries


def test_a_function_gets_texts_ids_and_columns(policy: Policy) -> None:
    seen: dict[str, Any] = {}

    def reward(prompts, completions, completion_ids, answer, difficulty, **others) -> list[float]:
        seen.update(prompts=prompts, answer=answer, difficulty=difficulty, others=set(others))
        assert completions == [policy.decode(ids) for ids in completion_ids]
        return [float(len(ids)) for ids in completion_ids]

    problems = [Problem(id=f"p/{n}", question=f"{n}+1", answer=str(n), columns={"difficulty": n}) for n in range(2)]
    entries = draw(policy, reward, problems, batch_size=64)
    assert {*seen["prompts"]} <= {"0+1", "1+1"} and {*seen["difficulty"]} <= {0, 1} and "question" in seen["others"]
    for entry in entries:
        assert [one.reward for one in entry.responses] == [len(one.response_ids) for one in entry.responses]


def test_chats_are_messages_as_in_trl_unless_texts_are_asked_for(policy: Policy) -> None:
    chat = ({"role": "user", "content": "1+2"},)
    mixed = [Problem(id="a", question="1+2", messages=chat), Problem(id="b", question="3")]
    kinds: set[type] = set()

    def reward(prompts, completions) -> list[float]:
        kinds.update(map(type, [*prompts, *completions]))
        return [float(len(one) if isinstance(one, str) else len(one[0]["content"])) for one in completions]

    for problem, option, expected in ((mixed, None, {str, list}), (mixed, False, {str}), (mixed, True, {list})):
        kinds.clear()
        draw(policy, reward, problem, conversational=option)
        assert kinds == expected


async def length_async(completions, **columns) -> list[float]:
    await asyncio.sleep(0)
    return length(completions)


class Scorer:
    def __call__(self, completions, **columns) -> torch.Tensor:
        return torch.tensor(length(completions), requires_grad=True, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "function",
    [
        length,
        length_async,
        Scorer(),
        partial(lambda weight, completions: [weight * len(one) for one in completions], 1.0),
        lambda completions, **columns: np.array(length(completions))[:, None],
        lambda completions, **columns: torch.tensor(length(completions))[None],
        lambda completions, **columns: tuple(torch.tensor(value) for value in length(completions)),
    ],
    ids=["list", "async", "bfloat16 with a gradient", "partial", "column", "row", "scalars"],
)
def test_values_may_be_lists_arrays_and_tensors(policy: Policy, function: Any) -> None:
    for entry in draw(policy, function):
        assert [one.reward for one in entry.responses] == [
            len(policy.decode(one.response_ids)) for one in entry.responses
        ]


def test_coroutines_run_where_a_loop_runs_already(policy: Policy) -> None:
    async def notebook() -> list[Any]:
        return draw(policy, length_async)

    assert asyncio.run(notebook())[0].responses[0].reward >= 0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda completions: [1.0, *length(completions)], ["must return one number per response", "returned"]),
        (lambda completions: [], ["must return one number per response", "returned 0 values"]),
        (lambda completions: 1.0, ["must return one number per response", "not 1.0"]),
        (lambda completions: None, ["must return one number per response", "not None"]),
        (lambda completions: ["good"] * len(completions), ["must return one number", "'good'"]),
        (lambda completions: "x" * len(completions), ["must return one number", "not 'x"]),
        (lambda completions: [[1.0, 2.0]] * len(completions), ["must return one number"]),
        (lambda completions: {"a": 1}, ["must return one number", "{'a': 1}"]),
        (lambda completions: [one[0]["content"] for one in completions], ["failed with", "conversational=True"]),
        (lambda completions: 1 / 0, ["failed with ZeroDivisionError: division by zero"]),
        (lambda texts: [0.0], ["takes texts", "def reward(completions, **columns)"]),
        (lambda: [0.0], ["takes no names"]),
        ([length, length], ["several are an {kind: ensemble"]),
        (7, ["a reward is a name, a mapping, a model or a function, not 7"]),
        (Scorer, ["a reward is a name"]),
    ],
)
def test_what_is_no_reward_function_is_refused_in_one_line(policy: Policy, function: Any, words: list[str]) -> None:
    worlds.refused(lambda: draw(policy, function), *words)


def test_a_reward_that_is_nan_fails_its_problem_alone(policy: Policy) -> None:
    def reward(completions, question, **columns) -> list[float | None]:
        return [None if one == "7" else 1.0 for one in question]

    pool = draw_pool(
        worlds.tiny_problems(), 2, policy=policy, reward=load_reward(reward, policy=policy), sampling=SHORT
    )
    errors = [trace.error for trace in select_best_of_n(pool, 2)]
    assert [error is not None for error in errors] == [False, False, True, False] and "gave nan" in str(errors[2])


def test_a_search_without_the_gradient_improves_and_one_with_it_is_refused(policy: Policy) -> None:
    reward = load_reward(length, policy=policy)
    config = worlds.search_config(solver="none", max_rounds=4, max_new_tokens=6)
    traces = run_search(worlds.tiny_problems(), policy=policy, reward=reward, config=config)
    assert all(trace.error is None and trace.reward >= trace.reward_initial for trace in traces)
    assert all(trace.reward == len(trace.response) for trace in traces) and traces[0].cost.flops > 0
    with_gradient = worlds.search_config(max_rounds=1)
    worlds.refused(
        lambda: run_search(worlds.tiny_problems(), policy=policy, reward=reward, config=with_gradient),
        "length",
        "is a function, which has no gradient",
    )


def test_the_name_tells_other_code_apart_and_not_where_it_lies(policy: Policy) -> None:
    def make(weight: float) -> FunctionReward:
        reward = load_reward(lambda completions: [0.5 * len(one) for one in completions], policy=policy)
        assert isinstance(reward, FunctionReward)
        return reward

    other = load_reward(lambda completions: [2.5 * len(one) for one in completions], policy=policy)
    assert make(1).name == make(2).name != other.name and "0x" not in other.name
    assert load_reward(make(1), policy=policy).name == make(1).name
    assert math.isclose(load_reward(other, policy=policy, batch_size=3).batch_size, 3)
