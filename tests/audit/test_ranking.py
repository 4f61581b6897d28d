"""The ranking audit on arrays with known properties."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from nabla_trl.audit.ranking import (
    audit_ranking,
    compute_best_of_n_values,
    compute_ranking_audit,
    compute_within_problem_correlation,
    estimate_within_problem_auc,
)
from nabla_trl.baselines.sampling import draw_pool
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.options import Sampling

RNG = np.random.default_rng(0)


def test_best_of_n_equals_the_mean_over_all_subsets():
    rewards, values = RNG.integers(0, 4, (5, 6)).astype(float), RNG.random((5, 6))  # with ties
    for n in (1, 2, 3, 6):
        expected = []
        for row, value in zip(rewards, values, strict=True):
            picks = [list(subset) for subset in combinations(range(6), n)]
            expected.append(np.mean([_best(row[pick], value[pick]) for pick in picks]))
        if n == 1 or n == 6:
            assert compute_best_of_n_values(rewards, values, n) == pytest.approx(expected)
        # With ties the best of a subset is shared over the tied values of the whole row: equal on average.
        assert compute_best_of_n_values(rewards, rewards, n) == pytest.approx(
            [np.mean([row[list(s)].max() for s in combinations(range(6), n)]) for row in rewards]
        )


def _best(row, value):
    return value[row == row.max()].mean()


def test_a_perfect_reward():
    correct = RNG.random((50, 16)) < 0.4
    audit = compute_ranking_audit(correct + 0.01 * RNG.random(correct.shape), correct, np.full(correct.shape, 9.0))
    assert audit.auc == 1.0
    assert audit.correlation > 0.99
    assert audit.best_of_n_accuracy[16]["value"] == correct.any(1).mean()
    assert audit.best_of_n_accuracy[1]["value"] == pytest.approx(correct.mean())
    assert "does not fall beyond chance" in audit.conclusion and audit.auc_interval.low > 0.9


def test_a_random_reward_is_called_out():
    correct = RNG.random((200, 16)) < 0.4
    audit = compute_ranking_audit(RNG.random(correct.shape), correct, RNG.random(correct.shape))
    assert audit.auc == pytest.approx(0.5, abs=0.05)
    assert audit.auc_interval.low < 0.5 < audit.auc_interval.high < 0.6
    assert "do not search" in audit.conclusion


def test_a_random_reward_is_not_called_sound_on_four_problems():
    """A verdict by the value alone would praise one random reward in six here."""
    rng = np.random.default_rng(7)
    praised, lucky = 0, 0
    for _ in range(200):
        correct = rng.random((4, 8)) < 0.5
        audit = compute_ranking_audit(rng.random(correct.shape), correct, np.ones(correct.shape))
        lucky += audit.auc >= 0.6
        praised += audit.conclusion.startswith("the reward ranks")
        assert audit.auc < 0.6 or "too few problems to tell" in audit.conclusion or audit.auc_interval.low > 0.6
    assert lucky > 20 and praised <= 5


def test_a_curve_that_does_not_rise_is_not_said_to_move():
    correct = np.array([[True] * 7 + [False]] * 12)
    rewards = correct + 0.01 * np.random.default_rng(0).random(correct.shape)
    audit = compute_ranking_audit(rewards, correct, np.ones(correct.shape))
    assert "moves" not in audit.conclusion and "too few" in audit.conclusion


def test_a_reward_that_is_hacked_is_overoptimized():
    """Right answers score high, but one wrong sample in thirty scores highest."""
    correct = RNG.random((400, 32)) < 0.4
    rewards = correct + 0.01 * RNG.random(correct.shape)
    rewards[~correct & (RNG.random(correct.shape) < 1 / 30)] += 5
    audit = compute_ranking_audit(rewards, correct, np.ones(correct.shape))
    assert "is over-optimized" in audit.conclusion
    assert audit.best_of_n_accuracy[32]["value"] < audit.best_of_n_accuracy[4]["value"]
    assert audit.best_of_n_reward[32] > audit.best_of_n_reward[4]


def test_length_correlation_sees_length():
    correct = RNG.random((30, 8)) < 0.5
    lengths = RNG.integers(3, 40, correct.shape).astype(float)
    assert compute_ranking_audit(lengths, correct, lengths).length_correlation == pytest.approx(1.0)


def test_lucky_answers_are_told_from_sound_ones():
    correct = np.array([[True, True, False, False]] * 5)
    error_free = np.array([[True, False, False, False]] * 5)
    audit = compute_ranking_audit(np.array([[4.0, 1.0, 2.0, 3.0]] * 5), correct, np.ones(correct.shape), error_free)
    assert audit.step_auc == 1.0
    assert audit.auc == 0.5
    assert audit.correct_with_errors == 0.5
    without = compute_ranking_audit(np.array([[4.0, 1.0, 2.0, 3.0]] * 5), correct, np.ones(correct.shape))
    assert without.step_auc is None and without.correct_with_errors is None


def test_auc_counts_ties_half():
    assert estimate_within_problem_auc(np.array([[1.0, 1.0]]), np.array([[True, False]])).value == 0.5
    one = estimate_within_problem_auc(np.array([[2.0, 1.0, 1.5]]), np.array([[True, False, False]]))
    assert one.value == 1.0 and one.low < 0.3, "a single problem"


def test_correlation_skips_problems_without_variation():
    assert compute_within_problem_correlation(
        np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([[0.0, 1.0], [3.0, 5.0]])
    ) == (pytest.approx(1.0))


@pytest.mark.parametrize(
    ("rewards", "correct", "message"),
    [
        (np.ones((3, 1)), np.ones((3, 1), bool), "two samples"),
        (RNG.random((3, 4)), np.ones((3, 4), bool), "all 12 are correct"),
        (RNG.random((3, 4)), np.zeros((3, 4), bool), "all 12 are incorrect"),
        (np.ones((3, 4)), np.eye(3, 4, dtype=bool), "gave 1 to every sample"),
        (np.full((3, 4), np.nan), np.eye(3, 4, dtype=bool), "12 rewards that are not finite"),
        (RNG.random((2, 2)), np.array([[True, True], [False, False]]), "both correct and incorrect"),
    ],
)
def test_what_cannot_be_audited_is_said(rewards, correct, message):
    with pytest.raises(ValueError, match=message):
        compute_ranking_audit(rewards, correct, np.ones(correct.shape))


def test_problems_without_gold_answers_are_refused(problems, policy, reward):
    pool = draw_pool(problems, 2, policy=policy, reward=reward, sampling=Sampling(max_new_tokens=4))
    with AnswerChecker() as checker, pytest.raises(ValueError, match="gold answer"):
        audit_ranking(pool, checker)
