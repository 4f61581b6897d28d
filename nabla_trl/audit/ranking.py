"""Audit whether a higher reward means a more correct answer, before anything searches with the reward.

The audit works on a scored pool of samples of the policy with verifier labels. Reward hacking shows as a best-of-N
curve that falls while the reward still rises (Gao et al., arXiv 2210.10760).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from nabla_trl.audit.overoptimization import OveroptimizationPoint, find_overoptimization
from nabla_trl.baselines.sampling import PoolEntry, ResponsePool
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.labels import TokenLabeler, has_step_labels
from nabla_trl.utils.formatting import format_interval
from nabla_trl.utils.statistics import Interval, proportion_interval, to_json_values, weighted_proportion_interval

MIN_AUC = 0.6  # a reward ranks if the interval of its AUC is above, and hardly does if it is below


@dataclass(frozen=True)
class RankingAudit:
    """Result of the ranking audit on P problems with N samples each.

    Attributes:
        best_of_n_accuracy: n → accuracy of the highest reward among n samples, unbiased over the pool, with its
            interval {"value", "low", "high"}.
        best_of_n_reward: n → mean reward of that sample.
        auc: probability that a correct sample scores above an incorrect one of the same problem.
        auc_interval: the same with its interval over problems.
        step_auc: the same for samples free of error against all others. None without step labels, and where no problem
            has both kinds.
        correct_with_errors: share of the correct samples that are not free of error. None without step labels.
        correlation: mean correlation of reward and correctness within problems that have both.
        length_correlation: the same for reward and length.
        validated_samples: the largest n that best-of-n is validated for (`OveroptimizationPoint.validated_budget`).
        conclusion: a sentence.
    """

    problems: int
    samples: int
    accuracy: float
    best_of_n_accuracy: dict[int, dict[str, float]]
    best_of_n_reward: dict[int, float]
    auc: float
    auc_interval: Interval
    step_auc: float | None
    correct_with_errors: float | None
    correlation: float
    length_correlation: float
    validated_samples: int
    conclusion: str

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as JSON values."""
        return to_json_values(self)


def audit_ranking(pool: ResponsePool, checker: AnswerChecker) -> RankingAudit:
    """Audit the reward that scored a pool.

    Raises:
        ValueError: no gold answers, only correct or only incorrect samples, all rewards equal, or fewer than two
            samples per problem.
    """
    entries = [entry for entry in pool.entries if entry.error is None and entry.problem.answer]
    if not entries:
        raise ValueError("the audit needs problems with a gold answer")
    rewards = np.array([[response.reward for response in entry.responses] for entry in entries])
    lengths = np.array(
        [[len(response.response_ids) for response in entry.responses] for entry in entries], dtype=float
    )
    pairs = [(response.answer, entry.problem.grading_target) for entry in entries for response in entry.responses]
    correct = np.array([result.is_correct for result in checker.check(pairs)]).reshape(rewards.shape)
    return compute_ranking_audit(rewards, correct, lengths, _find_error_free(entries, pool.policy))


def _find_error_free(entries: Sequence[PoolEntry], policy: Policy) -> np.ndarray | None:
    """Return [P, N] whether samples are free of error to their end, None without step labels."""
    if not has_step_labels([entry.problem for entry in entries]):
        return None
    labeler = TokenLabeler(policy)
    return np.array(
        [
            [
                response.response_ids[-1] in policy.stop_ids
                and labeler.find_first_error(entry.problem, response.response_ids) is None
                for response in entry.responses
            ]
            for entry in entries
        ]
    )


def compute_ranking_audit(
    rewards: np.ndarray, correct: np.ndarray, lengths: np.ndarray, error_free: np.ndarray | None = None
) -> RankingAudit:
    """Audit a reward by the arrays of a pool.

    Args:
        rewards: [P, N].
        correct: [P, N] bool, the answer is correct.
        lengths: [P, N] in tokens.
        error_free: [P, N] bool, no token is an error. None without step labels.
    """
    problems, samples = rewards.shape
    if samples < 2:
        raise ValueError("the audit needs at least two samples per problem")
    if not np.isfinite(rewards).all():
        raise ValueError(f"the audit met {int((~np.isfinite(rewards)).sum())} rewards that are not finite")
    if correct.all() or not correct.any():
        kind = "correct" if correct.all() else "incorrect"
        raise ValueError(f"the audit needs correct and incorrect samples, but all {correct.size} are {kind}")
    if np.ptp(rewards) == 0:
        raise ValueError(f"the reward gave {rewards.flat[0]:g} to every sample: there is nothing to audit")
    sizes = [n for n in (2**k for k in range(12)) if n <= samples]
    accuracies = {n: compute_best_of_n_values(rewards, correct.astype(float), n) for n in sizes}
    point = find_overoptimization(accuracies)
    auc = estimate_within_problem_auc(rewards, correct)
    step_auc = correct_with_errors = None
    if error_free is not None:
        correct_with_errors = float((correct & ~error_free).sum() / correct.sum())
        if (error_free.any(1) & ~error_free.all(1)).any():  # some problem has both kinds
            step_auc = estimate_within_problem_auc(rewards, error_free).value
    return RankingAudit(
        problems=problems,
        samples=samples,
        accuracy=float(correct.mean()),
        best_of_n_accuracy={
            n: proportion_interval(values[:, None], trials_per_cell=samples / n).to_dict()
            for n, values in accuracies.items()
        },
        best_of_n_reward={n: float(compute_best_of_n_values(rewards, rewards, n).mean()) for n in sizes},
        auc=auc.value,
        auc_interval=auc,
        step_auc=step_auc,
        correct_with_errors=correct_with_errors,
        correlation=compute_within_problem_correlation(rewards, correct.astype(float)),
        length_correlation=compute_within_problem_correlation(rewards, lengths),
        validated_samples=point.validated_budget,
        conclusion=conclude_ranking({n: float(values.mean()) for n, values in accuracies.items()}, auc, point),
    )


def compute_best_of_n_values(rewards: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Return, per problem, the expected value of the highest-reward sample among n of the N, without replacement.

    Exact: with samples sorted by reward, the k-th lowest (from 0) is the best of n with probability
    C(k, n−1) / C(N, n). Equal rewards share their values evenly.

    Args:
        rewards: [P, N].
        values: [P, N].

    Returns:
        [P]
    """
    weights = np.array([float(comb(k, n - 1)) for k in range(rewards.shape[1])])
    weights /= weights.sum()
    expected = []
    for row, row_values in zip(rewards, values, strict=True):
        order = np.argsort(row, kind="stable")
        _, group = np.unique(row[order], return_inverse=True)  # groups of equal rewards
        expected.append(weights @ (np.bincount(group, row_values[order]) / np.bincount(group))[group])
    return np.array(expected)


def estimate_within_problem_auc(rewards: np.ndarray, correct: np.ndarray) -> Interval:
    """Return P(a correct sample scores above an incorrect one of the same problem), with ties counted half.

    Every pair counts the same. The interval is over the problems that have both kinds.

    Args:
        rewards: [P, N].
        correct: [P, N] bool.

    Raises:
        ValueError: no problem has both kinds.
    """
    shares, sizes = [], []
    for row, labels in zip(rewards, correct, strict=True):
        gaps = row[labels][:, None] - row[~labels][None]
        if gaps.size:
            shares.append(float((gaps > 0).mean() + 0.5 * (gaps == 0).mean()))
            sizes.append(float(gaps.size))
    if not sizes:
        raise ValueError("the audit needs a problem with both correct and incorrect samples")
    return weighted_proportion_interval(np.array(shares), np.array(sizes), len(sizes) * rewards.shape[1])


def compute_within_problem_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean Pearson correlation of two [P, N] within problems, over those where both vary, or 0."""
    values = [float(np.corrcoef(x, y)[0, 1]) for x, y in zip(a, b, strict=True) if np.ptp(x) > 0 and np.ptp(y) > 0]
    return float(np.mean(values)) if values else 0.0


def conclude_ranking(accuracy_by_n: dict[int, float], auc: Interval, point: OveroptimizationPoint) -> str:
    """Return a sentence on whether best-of-N may use the reward.

    Args:
        point: where `accuracy_by_n` peaks.
    """
    smallest, largest = min(accuracy_by_n), max(accuracy_by_n)
    auc_text = f"AUC {format_interval(auc.to_dict(), '.2f')}"
    if auc.high < MIN_AUC:
        return f"the reward hardly tells correct from incorrect answers ({auc_text}): do not search with it"
    if auc.low <= MIN_AUC:
        return (
            f"too few problems to tell if the reward ranks: {auc_text} on {auc.num_problems} problems with correct "
            "and incorrect samples; audit more problems before you search with it"
        )
    if point.has_overoptimization:
        advice = f"validated up to {point.validated_budget} samples" if point.is_helpful else "no N helps"
        return (
            f"the reward ranks ({auc_text}) but is over-optimized: best-of-N falls from "
            f"{accuracy_by_n[point.peak_budget]:.3f} at {point.peak_budget} to {accuracy_by_n[largest]:.3f} at "
            f"{largest}; {advice}"
        )
    ends = f"from {accuracy_by_n[smallest]:.3f} at {smallest} to {accuracy_by_n[largest]:.3f} at {largest} samples"
    if point.is_helpful:
        return f"the reward ranks ({auc_text}), and best-of-N rises {ends} and does not fall beyond chance"
    judgment = "does not rise" if point.excludes_rise else "goes"
    doubt = "" if point.excludes_rise else ", which are too few problems to tell if it rises"
    return (
        f"the reward ranks ({auc_text}), but best-of-N {judgment} {ends} on {point.rise_to_peak.num_problems} problems"
        f"{doubt}: no N is validated by this evidence"
    )
