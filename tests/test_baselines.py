"""Best-of-N, self-consistency and greedy over one pool."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import worlds

from nabla_trl import baselines
from nabla_trl.answers import normalize_answer
from nabla_trl.compute import Cost, Meter
from nabla_trl.config import ReasonerConfig
from nabla_trl.evaluate import Bench
from nabla_trl.generate import Sampling
from nabla_trl.methods import steps
from nabla_trl.search import solve
from nabla_trl.terms import Sample

SAMPLING = Sampling(max_new_tokens=8)


def pool(problems, count, policy, reward, **kwargs):
    return baselines.draw_pool(problems, count, policy=policy, reward=reward, sampling=SAMPLING, **kwargs)


def ids(made):
    return [[draw.ids for draw in entry.draws] for entry in made.entries]


def test_a_smaller_pool_is_a_prefix_whatever_the_batch(problems, policy, reward):
    large = pool(problems, 6, policy, reward, seed=3)
    small = pool(list(reversed(problems)), 2, policy, reward, seed=3, batch_size=3)
    assert ids(small)[::-1] == [row[:2] for row in ids(large)]
    assert ids(pool(problems, 6, policy, reward, seed=4)) != ids(large)


def test_draws_of_one_problem_differ(problems, policy, reward):
    for row in ids(pool(problems, 6, policy, reward)):
        assert len(set(map(tuple, row))) > 1


def test_best_of_n_is_the_highest_reward_among_the_first_n(problems, policy, reward):
    made = pool(problems, 5, policy, reward)
    for count in (1, 3, 5):
        for entry, trace in zip(made.entries, baselines.best_of(made, count), strict=True):
            assert trace.method == f"best_of_{count}"
            assert trace.reward == max(draw.reward for draw in entry.draws[:count])
            assert trace.response_ids in [draw.ids for draw in entry.draws[:count] if draw.reward == trace.reward]


def test_recorded_rewards_are_those_of_the_responses(problems, policy, reward):
    made = pool(problems, 3, policy, reward)
    for trace, problem in zip(baselines.best_of(made, 3), problems, strict=True):
        fresh = [Sample(problem, trace.prompt_ids, trace.response_ids)]
        values, _ = reward.score(fresh, reward.prompt_memos(fresh, Meter()), meter=Meter())
        assert trace.reward == pytest.approx(values[0], abs=1e-4)


def test_cost_adds_up_and_best_of_1_pays_for_no_reward(problems, policy, reward):
    made = pool(problems, 4, policy, reward)
    one, four = baselines.best_of(made, 1), baselines.best_of(made, 4)
    for entry, single, several in zip(made.entries, one, four, strict=True):
        drawn = sum(len(draw.ids) for draw in entry.draws)
        assert set(single.cost.tokens) == {"policy/prefill", "policy/decode"}
        assert single.cost.tokens["policy/decode"] == len(entry.draws[0].ids)
        assert several.cost.tokens["policy/decode"] == drawn
        assert several.cost.tokens["policy/prefill"] == len(entry.prompt) - 1
        parts = [entry.prefill, entry.scored_prefill]
        parts += [cost for draw in entry.draws for cost in (draw.generation, draw.scoring)]
        assert several.cost.flops == pytest.approx(sum(parts, Cost()).flops)
        assert single.cost.flops < several.cost.flops


def test_self_consistency_takes_the_commonest_answer(problems, policy, reward):
    made = pool(problems, 9, policy, reward, seed=1)
    for entry, trace in zip(made.entries, baselines.self_consistency(made, 9), strict=True):
        votes = Counter(normalize_answer(draw.answer) for draw in entry.draws if draw.answer is not None)
        assert votes, "the world gives answers"
        assert votes[normalize_answer(trace.answer)] == max(votes.values())
        assert not any(name.startswith("re") for name in trace.cost.tokens)


def test_greedy_takes_the_likeliest_tokens(problems, policy, reward):
    for trace in baselines.greedy(problems, policy=policy, reward=reward, max_new_tokens=8):
        ids = torch.tensor([trace.prompt_ids + trace.response_ids])
        logits = policy.model(input_ids=ids).logits[0].masked_fill(policy.forbidden, -torch.inf)
        begin = len(trace.prompt_ids) - 1
        assert trace.response_ids == logits[begin:-1].argmax(-1).tolist()


def test_the_first_draw_is_the_start_of_the_search(problems, policy, reward):
    """Best-of-1 and the reasoner begin alike, so that their comparison is paired."""
    config = ReasonerConfig(solver="none", rounds=1, max_new_tokens=8)
    traces = solve(problems, policy=policy, reward=reward, config=config, seed=5)
    single = baselines.best_of(pool(problems, 2, policy, reward, seed=5), 1)
    assert [trace.initial_ids for trace in traces] == [trace.response_ids for trace in single]


def test_without_a_reward_only_self_consistency_and_samples_work(problems, policy):
    made = pool(problems, 2, policy, None)
    assert all(trace.error is None for trace in baselines.self_consistency(made, 2))
    assert all("gave nan" in trace.error for trace in baselines.best_of(made, 2))


def test_a_problem_that_cannot_run_is_an_error_row_beside_the_others(problems, policy, reward):
    bad = replace(problems[1], question="?" * 3)
    made = pool([problems[0], bad, problems[2]], 2, policy, reward)
    traces = baselines.best_of(made, 2)
    assert [trace.error is None for trace in traces] == [True, False, True]
    assert "does not know" in traces[1].error
    assert math.isnan(traces[1].reward)
    good = pool([problems[0], problems[2]], 2, policy, reward)
    assert [traces[0].response_ids, traces[2].response_ids] == [t.response_ids for t in baselines.best_of(good, 2)]


def test_prompts_are_read_once(policy, reward):
    problem = worlds.tiny_problems()[:1]
    entry = pool(problem, 6, policy, reward).entries[0]
    assert entry.prefill.tokens == {"policy/prefill": len(entry.prompt) - 1}
    assert all("policy/prefill" not in draw.generation.tokens for draw in entry.draws)


def test_a_reference_that_drew_the_response_is_not_asked_again(problems, policy, logratio_reward):
    """Its likelihood is known from drawing: the same reward, at the cost of the other model alone."""
    made = pool(problems, 2, policy, logratio_reward)
    for entry in made.entries:
        for draw in entry.draws:
            afresh = [Sample(entry.problem, entry.prompt, draw.ids)]
            values, _ = logratio_reward.score(afresh, logratio_reward.prompt_memos(afresh, Meter()), meter=Meter())
            assert draw.reward == pytest.approx(values[0], abs=1e-4)
            assert set(draw.scoring.tokens) == {"reward/forward"}


def test_what_another_policy_showed_does_not_count(problems, policy, logratio_reward):
    other = worlds.tiny_policy(seed=7)
    made = pool(problems, 1, other, logratio_reward)
    for entry in made.entries:
        assert set(entry.draws[0].scoring.tokens) == {"reward/forward", "reference/forward"}


def test_a_reward_that_fails_costs_only_the_methods_that_need_it(problems, policy, scalar_reward, monkeypatch):
    monkeypatch.setattr(
        type(scalar_reward), "score", lambda self, samples, memos, **_: ([math.nan] * len(samples), [])
    )
    made = pool(problems, 2, policy, scalar_reward)
    for single, several in zip(baselines.best_of(made, 1), baselines.best_of(made, 2), strict=True):
        assert single.error is None and math.isnan(single.reward)
        assert "gave nan" in several.error
        assert several.cost.flops > single.cost.flops, "work that came to nothing is paid for"


def test_a_rival_of_another_vocabulary_is_only_drawn_from(problems, policy):
    shuffled, new_ids = worlds.permuted_tokenizer(policy.tokenizer)
    model = worlds.permuted_model(worlds.tiny_model(seed=2), new_ids, len(shuffled) + 6)
    rival = worlds.freeze_policy(model, shuffled, "rival")
    reward = worlds.log_ratio(policy, rival, policy, "ratio")
    bench = Bench(policy, reward, ReasonerConfig(max_new_tokens=8), (0,))
    (step,) = steps(["reward_model_sampling"], bench, None, lambda: 0.0)
    for trace in step.work(problems, 0):
        assert trace.error is None and trace.method == "reward_model_sampling"
        assert trace.prompt_ids == rival.encode(next(p for p in problems if p.id == trace.problem_id))
