"""Preset `released` against a literal reference of what github.com/VITA-Group/Nabla-Reasoner computes.

The reference follows optimize.py and templates.py of commit 46a1571 with the flags of its scripts: whole one-hot rows
through the embeddings of both models, Adam by autograd, one response at a time, nothing reused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import worlds
from torch import Tensor

from nabla_trl.gradient.score import ScoreObjective
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import Search, run_search
from nabla_trl.search.state import ScoredResponse

STEPS, LEARNING_RATE, MIN_RATE_RATIO, LIKELIHOOD_WEIGHT, REWARD_WEIGHT = 20, 0.01, 0.1, 1e-3, 1.0
VOCABULARY = len(worlds.TOKENS)
END = worlds.TOKENS.index(worlds.END)


def optimize(policy: Policy, reward: Reward, question: str, past: Sequence[int], ahead_logits: Tensor) -> Tensor:
    """Return the logits [A, V] of the tokens after `past`, of which only the first row is updated."""
    language_model, reward_model = policy.model, reward.objectives[0].model
    embed, embed_reward = (model.get_input_embeddings().weight for model in (language_model, reward_model))
    before, after = format_turns(policy, question)
    prompt_ids = torch.tensor([*before, *past])
    latents = torch.nn.Parameter(ahead_logits.clone()[None])
    optimizer = torch.optim.Adam([latents], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(MIN_RATE_RATIO, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        soft = latents.softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, soft.max(-1, keepdim=True)[1], 1.0)
        one_hot = (hard - soft).detach() + soft
        inputs = torch.cat((embed[prompt_ids][None], one_hot @ embed), 1)
        predicted = language_model(inputs_embeds=inputs).logits[:, len(prompt_ids) - 1 : -1]
        log_likelihood = (F.log_softmax(predicted, -1) * one_hot).sum() * LIKELIHOOD_WEIGHT
        turn = torch.cat((embed_reward[prompt_ids][None], one_hot @ embed_reward, embed_reward[after][None]), 1)
        score = reward_model(inputs_embeds=turn).logits[0][0]
        (-(log_likelihood + REWARD_WEIGHT * score)).backward()
        assert latents.grad is not None
        latents.grad[:, 1:] = 0
        optimizer.step()
        schedule.step()
    return latents.detach()[0]


def format_turns(policy: Policy, question: str) -> tuple[list[int], list[int]]:
    """Return the ids before and after an answer, both models' template being the same here."""
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": "PLACEHOLDER"}]
    text = policy.tokenizer.apply_chat_template(chat, tokenize=False).split("PLACEHOLDER")
    before, after = (policy.tokenizer.encode(part, add_special_tokens=False) for part in text)
    return before, after


Scanned = list[tuple[ScoredResponse, list[int]]]


@pytest.fixture(scope="module")
def world() -> tuple[Policy, Reward]:
    policy = worlds.tiny_policy()
    return policy, worlds.tiny_scalar(policy)


@pytest.fixture(scope="module")
def released(world: tuple[Policy, Reward]) -> Scanned:
    return scan(world)


def scan(world: tuple[Policy, Reward], **solver: Any) -> Scanned:
    """Return the responses that a search scanned, and the positions whose logits it optimized."""
    config = SearchConfig.from_preset(
        "released",
        top_k_candidates=VOCABULARY,
        max_new_tokens=8,
        max_rollouts=4,
        proposals={"confidence": 1.0},
        solver=solver,
    )
    scanned: dict[int, ScoredResponse] = {}

    def watch(search: Search) -> None:
        for chain in search.chains:
            scanned[id(chain.incumbent)] = chain.incumbent

    problems = worlds.tiny_problems(["1+2", "1+7", "4+2"])
    run_search(problems, policy=world[0], reward=world[1], config=config, seed=1, on_round=watch)
    return [
        (response, (~response.stale_mask).nonzero().flatten().tolist())
        for response in scanned.values()
        if response.stale_mask is not None
    ]


def spread(values: Tensor, candidates: Tensor, rest: float) -> Tensor:
    """Return values [T, K] at the candidates as [T, V]."""
    return torch.full((len(values), VOCABULARY), rest).scatter(1, candidates, values)


def test_its_logits_are_those_of_the_released_code(world: tuple[Policy, Reward], released: Scanned) -> None:
    """Of unlikely tokens the signs alone are equal: Adam's ε meets a loss that is 1000 times smaller there."""
    policy, reward = world
    compared = finished = 0
    for response, positions in released:
        readable = reward.in_vocabulary[response.candidates]
        readable |= response.candidates == torch.tensor(response.response_ids)[:, None]
        start = spread(response.logp.masked_fill(~readable, -math.inf), response.candidates, -math.inf)
        optimized = spread(response.get_proposal_scores(), response.candidates, -math.inf)
        for position in positions:
            ids = response.response_ids
            reference = optimize(policy, reward, response.problem.question, ids[:position], start[position:])
            allowed = start[position].isfinite()
            logp = start[position][allowed]
            shift = (optimized[position] - start[position])[allowed]
            expected = (reference[0] - start[position])[allowed]
            assert torch.equal(shift.sign()[logp > math.log(1e-6)], expected.sign()[logp > math.log(1e-6)])
            likely = logp > math.log(1e-3)
            torch.testing.assert_close(shift[likely], expected[likely], rtol=1e-2, atol=1e-4)
            compared += 1
            finished += ids[-1] == END
    assert compared >= 10 and finished >= 4


@pytest.mark.parametrize(
    "change", [{"hard_tokens": "response"}, {"schedule": "cosine"}, {"repeat_turn_end": False}], ids=str
)
def test_each_of_its_peculiarities_counts(
    world: tuple[Policy, Reward], released: Scanned, change: dict[str, Any]
) -> None:
    others = {tuple(response.response_ids): (response, positions) for response, positions in scan(world, **change)}
    differences = []
    for response, positions in released:
        other, other_positions = others.get(tuple(response.response_ids), (response, []))
        rows = [position for position in positions if position in other_positions]
        change_of_rows = response.get_proposal_scores()[rows] - other.get_proposal_scores()[rows]
        differences += change_of_rows.nan_to_num().abs().flatten().tolist()
    assert max(differences) > 0.005  # four times what the test above tolerates


def test_the_turn_ends_once_unless_it_is_asked_for(world: tuple[Policy, Reward]) -> None:
    policy, reward = world
    [objective] = reward.objectives
    [repeated] = reward.with_repeated_turn_end().objectives
    assert isinstance(objective, ScoreObjective) and isinstance(repeated, ScoreObjective)
    problem = worlds.tiny_problems(["1+2"])[0]
    sample = worlds.Sample(problem, policy.encode(problem), [3, END])
    assert objective.encode(sample).sequence_ids[-2:] == [3, END]
    assert repeated.encode(sample).sequence_ids[-3:] == [3, END, END]
    cut = replace(sample, response_ids=[3])
    assert repeated.encode(cut).sequence_ids == objective.encode(cut).sequence_ids


def test_what_argmax_needs() -> None:
    argmax = {"name": "ste", "hard_tokens": "argmax"}
    worlds.refused(lambda: SearchConfig(solver=argmax), "hard_tokens argmax needs proposals sequential")
    proposals = {"name": "sequential", "min_gradient_norm": 0.1}
    worlds.refused(
        lambda: SearchConfig(solver=argmax, proposals=proposals), "min_gradient_norm needs hard_tokens response"
    )
    for option, value in (("hard_tokens", "soft"), ("schedule", "linear")):
        worlds.refused(
            lambda option=option, value=value: SearchConfig(solver={"name": "ste", option: value}),
            f"{option} must be one of",
        )


def test_gradients_of_a_scan_stay_within_the_budget(world: tuple[Policy, Reward]) -> None:
    options: dict[str, Any] = {"top_k_candidates": VOCABULARY, "max_new_tokens": 8, "proposals": {"confidence": 1.0}}
    problems = worlds.tiny_problems(["1+2", "4+2"])
    free = SearchConfig.from_preset("released", **options)
    for trace in run_search(problems, policy=world[0], reward=world[1], config=free):
        budget = 0.6 * trace.cost.flops
        config = replace(free, max_flops=budget, max_rollouts=0)
        problem = next(problem for problem in problems if problem.id == trace.problem_id)
        [limited] = run_search([problem], policy=world[0], reward=world[1], config=config)
        assert limited.stop_reason == "max_flops" and limited.cost.flops < 1.1 * budget
