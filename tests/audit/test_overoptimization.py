"""The over-optimization audit: curves of hand-made searches peak where they should, and real ones are read rightly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import numpy as np
import pytest
import worlds

from nabla_trl.audit.overoptimization import (
    SearchCurve,
    audit_overoptimization,
    compute_search_curve,
    find_overoptimization,
    make_round_grid,
)
from nabla_trl.audit.ranking import compute_ranking_audit
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import Cost
from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import load_reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import load_problems
from nabla_trl.traces.schema import Revision, Trace

RNG = np.random.default_rng(0)
END = worlds.TOKENS.index(worlds.END)
VALIDATED_SAMPLES = compute_ranking_audit(
    RNG.random((9, 4)), np.eye(9, 4, dtype=bool), np.ones((9, 4))
).validated_samples


@pytest.fixture
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker() as answer_checker:
        yield answer_checker


def trace(*answers: tuple[int, str], gold: str = "3", error: str | None = None) -> Trace:
    """A search whose incumbent answers as told from each round on: (0, first answer), (round, next answer), …

    The reward is the number of changes so far; one rejected proposal comes in every round without a change.
    """
    ids = [[worlds.TOKENS.index("#"), worlds.TOKENS.index(text), END] for _, text in answers]
    revisions = []
    for index, (number, _) in enumerate(answers[1:], start=1):
        for row in range(revisions[-1].round + 1 if revisions else 0, number - 1):
            revisions.append(revision(row, ids[index - 1], ids[index - 1], index - 1.0, accepted=False))
        revisions.append(revision(number - 1, ids[index - 1], ids[index], index - 1.0, accepted=True))
    return Trace(
        problem_id="p",
        task="custom",
        method="nabla",
        seed=0,
        prompt="",
        response="",
        prompt_ids=[1],
        initial_ids=ids[0],
        response_ids=ids[-1],
        reward_initial=0.0,
        reward=len(answers) - 1.0,
        answer=None,
        gold=gold,
        correct=None,
        revisions=revisions,
        cost=Cost(),
        stop_reason="max_rounds",
        finished=True,
        meta={},
        error=error,
    )


def revision(number: int, old: Sequence[int], new: Sequence[int], reward: float, accepted: bool) -> Revision:
    return Revision(number, 1, old[1], new[1], tuple(new[1:]), reward, reward + 1.0, accepted, 0.0)


def curve_of(rows: Sequence[Sequence[Trace]], policy: Policy, checker: AnswerChecker, rounds: int) -> SearchCurve:
    for row in rows:
        for search in row:
            search.validate()
    return compute_search_curve(rows, policy, checker, rounds)


# --- the rule -------------------------------------------------------------------------------------------


def scores(*means: float, count: int = 200) -> dict[int, np.ndarray]:
    """Budgets 0, 1, 2, 4, … with these shares of right answers, nested so that differences are as sure as can be."""
    problems = np.arange(count) / count
    return {0 if not index else 2 ** (index - 1): (problems < mean) * 1.0 for index, mean in enumerate(means)}


@pytest.mark.parametrize(
    ("means", "peak", "validated", "overoptimized"),
    [
        ((0.2, 0.5, 0.8), 2, 2, False),
        ((0.2, 0.5, 0.8, 0.6, 0.3), 2, 2, True),
        ((0.2, 0.8, 0.8, 0.8, 0.3), 1, 4, True),
        ((0.2, 0.8, 0.3, 0.8), 1, 1, False),  # a dip ends the validated budgets, though the end is not below the peak
        ((0.5, 0.5, 0.5), 0, 0, False),
        ((0.5, 0.4, 0.2), 0, 0, True),
        ((0.5,), 0, 0, False),
    ],
)
def test_where_a_curve_peaks(means, peak, validated, overoptimized):
    point = find_overoptimization(scores(*means))
    assert (point.peak_budget, point.validated_budget, point.has_overoptimization) == (peak, validated, overoptimized)
    assert point.drop_from_peak.value == pytest.approx(means[-1] - max(means))


def test_what_chance_may_do_is_neither_a_gain_nor_a_fall():
    """The same shares on few problems, won and lost by different ones, prove nothing."""
    base = np.r_[np.ones(5), np.zeros(5)]
    point = find_overoptimization({0: base, 1: base[::-1] + np.r_[np.zeros(4), 1, np.zeros(5)], 2: base})
    assert (point.peak_budget, point.is_helpful, point.has_overoptimization, point.validated_budget) == (
        1,
        False,
        False,
        0,
    )


def test_a_gain_that_is_lost_again_by_some_problems_is_validated_up_to_there():
    gained = np.r_[np.ones(40), np.zeros(60)]
    point = find_overoptimization({0: np.zeros(100), 1: gained, 2: np.r_[np.zeros(2), gained[2:]], 4: np.zeros(100)})
    assert point.has_overoptimization and point.validated_budget == 2  # two of a hundred may be chance


def test_a_curve_needs_budgets():
    worlds.refused(lambda: find_overoptimization({}), "at least one budget")


# --- searches made by hand --------------------------------------------------------------------------------


def test_budgets_double_and_end_with_all_rounds():
    assert [make_round_grid(rounds) for rounds in (1, 4, 6)] == [[0, 1], [0, 1, 2, 4], [0, 1, 2, 4, 6]]


def test_incumbents_after_each_number_of_rounds():
    search = trace((0, "1"), (1, "3"), (5, "2"))
    search.validate()
    answers = [worlds.TOKENS[ids[1]] for ids, _ in search.list_incumbents_at([0, 1, 2, 4, 5, 16])]
    assert answers == ["1", "3", "3", "3", "2", "2"]
    assert [value for _, value in search.list_incumbents_at([0, 1, 5])] == [0.0, 1.0, 2.0]


def test_a_search_that_goes_too_far_is_overoptimized(policy, checker):
    rows = [[trace((0, "1"), (1, "3"), (6, "2"))] for _ in range(30)] + [[trace((0, "1"))] for _ in range(10)]
    curve = curve_of(rows, policy, checker, 8)
    assert {rounds: interval.value for rounds, interval in curve.accuracy.items()} == {
        0: 0,
        1: 0.75,
        2: 0.75,
        4: 0.75,
        8: 0,
    }
    assert curve.reward == {0: 0.0, 1: 0.75, 2: 0.75, 4: 0.75, 8: 1.5}
    assert curve.overoptimization.has_overoptimization and curve.overoptimization.validated_budget == 4
    assert "falls from 0.750 at 1 rounds to 0.000 at 8 while the reward goes from 0.750 to 1.500" in curve.conclusion
    assert curve.conclusion.endswith("the search is validated up to 4 rounds")


def test_a_search_that_helps_does_not_fall(policy, checker):
    rows = [[trace((0, "1"), (number % 7 + 1, "3"))] for number in range(28)]
    curve = curve_of(rows, policy, checker, 8)
    assert curve.accuracy[4].value == pytest.approx(4 / 7) and curve.overoptimization.validated_budget == 8
    assert curve.conclusion == "accuracy rises from 0.000 to 1.000 at 8 rounds and does not fall beyond chance up to 8"


def test_a_search_that_changes_nothing_is_not_validated(policy, checker):
    for count, words in ((9, "too few problems to tell if accuracy rises"), (90, "accuracy does not rise")):
        curve = curve_of([[trace((0, "1"), (1, "2"))] for _ in range(count)], policy, checker, 2)
        assert curve.overoptimization.validated_budget == 0 and f"{words}: 0.000 at first" in curve.conclusion


def test_seeds_are_averaged_and_errors_are_wrong_and_have_no_reward(policy, checker):
    rows = [[trace((0, "3")), trace((0, "1"))], [trace((0, "3"), (1, "3"), error="NaN"), trace((0, "3"), (1, "3"))]]
    curve = curve_of(rows, policy, checker, 1)
    assert curve.accuracy[0].value == 0.5 and curve.accuracy[0].num_seeds == 2
    assert curve.reward == {0: 0.0, 1: 0.5}  # one problem's mean is 0, the other's 1


def test_searches_that_all_failed_are_refused(policy, checker):
    rows = [[trace((0, "3"), error="the reward gave nan")]]
    worlds.refused(lambda: compute_search_curve(rows, policy, checker, 1), "every search", "gave nan")


# --- searches that ran --------------------------------------------------------------------------------------


def test_a_real_search_is_read_as_it_went(checker):
    policy = load_policy("data/tiny/policy")
    reward = load_reward("logratio:data/tiny/clean", policy=policy)
    problems = load_problems("digit_chains", split="train", max_problems=12)
    config = SearchConfig(
        max_rounds=3, patience=1, max_rollouts=2, max_flops=1.0, max_new_tokens=48, min_p=0.02, candidate_min_p=0.02
    )
    audit = audit_overoptimization(
        problems,
        policy=policy,
        reward=reward,
        config=config,
        checker=checker,
        validated_samples=VALIDATED_SAMPLES,
        seeds=(0, 1),
    )
    unlimited = replace(config, patience=0, max_rollouts=0, max_flops=0.0)
    for name, search_config in {"nabla": unlimited, "control": unlimited.with_no_gradient()}.items():
        runs = [run_search(problems, policy=policy, reward=reward, config=search_config, seed=seed) for seed in (0, 1)]
        traces = [trace for run in runs for trace in run]
        correct = [trace.answer == trace.gold for trace in traces]
        curve = audit.curves[name]
        assert list(curve.accuracy) == [0, 1, 2, 3]
        assert curve.accuracy[3].value == pytest.approx(np.mean(correct))
        assert curve.reward[3] == pytest.approx(np.mean([trace.reward for trace in traces]))
        assert curve.reward[0] == pytest.approx(np.mean([trace.reward_initial for trace in traces]))
        assert sorted(curve.reward.values()) == list(curve.reward.values())
    assert audit.curves["nabla"].accuracy[0] == audit.curves["control"].accuracy[0]
    assert audit.validated_limits.max_rounds == audit.curves["nabla"].overoptimization.validated_budget
    assert audit.validated_limits.max_samples == VALIDATED_SAMPLES
    assert audit.to_dict()["validated_limits"] == asdict(audit.validated_limits)


def test_without_a_gradient_there_is_one_curve(policy, scalar_reward, checker):
    problems = [Problem(f"q{n}", f"{n}+1", answer=str(n)) for n in range(3)]
    config = SearchConfig(solver="none", max_rounds=1, max_new_tokens=6)
    audit = audit_overoptimization(
        problems,
        policy=policy,
        reward=scalar_reward,
        config=config,
        checker=checker,
        validated_samples=VALIDATED_SAMPLES,
    )
    assert list(audit.curves) == ["control"] and audit.conclusion == audit.curves["control"].conclusion


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": SearchConfig(max_rounds=0, patience=3)}, ["limit of rounds"]),
        ({"seeds": ()}, ["at least one seed"]),
        ({"problems": worlds.tiny_problems()}, ["gold answer"]),
    ],
)
def test_what_cannot_be_audited_is_said(policy, scalar_reward, checker, changes, words):
    options = {"config": SearchConfig(max_rounds=1), "problems": [Problem("q", "1+1", answer="2")], **changes}
    problems = options.pop("problems")
    worlds.refused(
        lambda: audit_overoptimization(
            problems,
            policy=policy,
            reward=scalar_reward,
            checker=checker,
            validated_samples=VALIDATED_SAMPLES,
            **options,
        ),
        *words,
    )


def test_a_handful_of_problems_validates_nothing() -> None:
    """One problem, or two alike, have an interval without width; a sign-flip test is not taken in."""
    for count, helps in ((1, False), (2, False), (20, True)):
        point = find_overoptimization({1: np.zeros(count), 2: np.ones(count)})
        assert (point.is_helpful, point.validated_budget) == (helps, 2 if helps else 1)
        assert find_overoptimization({1: np.ones(count), 2: np.zeros(count)}).validated_budget == 1
