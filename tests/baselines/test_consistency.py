"""Votes without a reward: how many responses they read, what they charge, and whom they choose."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from scipy.stats import beta

from nabla_trl.baselines.consistency import (
    compute_majority_probability,
    count_responses_to_read,
    select_by_adaptive_consistency,
    select_by_confidence_vote,
)
from nabla_trl.baselines.sampling import draw_pool, select_by_self_consistency
from nabla_trl.evaluation.method import Method
from nabla_trl.grading.voting import vote
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.tasks.problem import Problem


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (4, 0), (7, 3), (20, 19), (40, 5)])
def test_the_probability_of_a_majority_is_that_of_the_beta_distribution(first: int, second: int) -> None:
    assert compute_majority_probability(first, second) == pytest.approx(beta.sf(0.5, first + 1, second + 1))


@pytest.mark.parametrize(
    ("answers", "num_read"),
    [
        (["1"] * 9, 4),  # 1 - 2**-5 > 0.95
        (["1", "2", "1", "1", "1", "1", "1", "1"], 7),  # six to one
        (["1", "2"] * 4, 8),  # never safe
        ([None, None, "1", "1", "1", "1"], 6),
        ([None] * 3, 3),
        ([], 0),
    ],
)
def test_reading_stops_once_the_lead_is_safe(answers: list[str | None], num_read: int) -> None:
    assert count_responses_to_read(answers) == num_read


def test_only_what_was_read_is_charged(policy: Policy, problems: list[Problem]) -> None:
    pool = draw_pool(problems, 12, policy=policy, reward=None, sampling=Sampling(max_new_tokens=2), seed=3)
    pool.entries[0].responses[:] = [replace(response, answer="7") for response in pool.entries[0].responses]
    stopped_early = 0
    for entry, trace in zip(pool.entries, select_by_adaptive_consistency(pool, 12), strict=True):
        num_read = count_responses_to_read([response.answer for response in entry.responses])
        stopped_early += num_read < 12
        [same] = [
            other for other in select_by_self_consistency(pool, num_read) if other.problem_id == trace.problem_id
        ]
        assert (trace.response_ids, trace.cost.flops) == (same.response_ids, same.cost.flops)
        assert trace.method == "adaptive_consistency_12"
    assert stopped_early


def test_a_confidence_vote_weighs_answers_by_likelihood_per_token(policy: Policy, problems: list[Problem]) -> None:
    pool = draw_pool(problems, 8, policy=policy, reward=None, sampling=Sampling(max_new_tokens=3), seed=3)
    for entry, trace in zip(pool.entries, select_by_confidence_vote(pool, 8), strict=True):
        assert all(-20 < response.mean_logp < 0 for response in entry.responses)
        winners = vote([one.answer for one in entry.responses], [one.mean_logp for one in entry.responses])
        if winners:
            assert trace.response_ids == entry.responses[winners[0]].response_ids
        assert math.isclose(trace.cost.flops, sum((one.generation_cost for one in entry.responses),
                                                  entry.policy_prefill_cost).flops)  # fmt: skip


def test_the_methods_have_names() -> None:
    for name in ("adaptive_consistency_16", "confidence_vote_16", "particle_filter_8", "particle_filter@best_of_8"):
        assert Method.parse(name).is_runnable and str(Method.parse(name)) == name
