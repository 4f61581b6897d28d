"""The reward audit: does a higher reward mean a righter answer, before anything searches with it?

Works on a scored pool of samples of the policy with verifier labels. Reward hacking shows as a best-of-N curve
that turns down while the reward still rises (Gao et al., arXiv 2210.10760); `curves` says when it turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import comb
from typing import Any

import numpy as np

from nabla_trl.audit.curves import OveroptimizationPoint, find_overoptimization
from nabla_trl.baselines.sampling import PoolEntry, ResponsePool, draw_pool
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import Cost
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.labels import TokenLabeler, has_step_labels
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.statistics import mean_interval


@dataclass(frozen=True)
class RankingAudit:
    """What the audit found on P problems with N samples each.

    Attributes:
        best_of_n: n → accuracy of the highest reward among n samples, unbiased over the pool, with its interval
            {"value", "low", "high"}.
        reward_of_n: n → mean reward of that sample.
        auc: probability that a right sample scores above a wrong one of the same problem.
        step_auc: the same with samples free of error against all others, where the task has step labels; None
            elsewhere, and where no problem has both.
        lucky: share of the right samples that are not free of error; None without step labels.
        correlation: mean correlation of reward and correctness within problems that have both.
        length_correlation: the same for reward and length.
        trusted_samples: the largest n that best-of-n may be trusted with (`curves.Turn.trusted`).
        verdict: a sentence.
    """

    problems: int
    samples: int
    accuracy: float
    best_of_n_accuracy: dict[int, dict[str, float]]
    best_of_n_reward: dict[int, float]
    auc: float
    step_auc: float | None
    correct_with_errors: float | None
    correlation: float
    length_correlation: float
    validated_samples: int
    conclusion: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def audit_reward(
    problems: Sequence[Problem],
    samples_per_problem: int,
    *,
    policy: Policy,
    reward: Reward,
    sampling: Sampling,
    batch_size: int,
    checker: AnswerChecker,
) -> dict[str, Any]:
    """Audit a reward on samples of the policy, as the first stage of a run, which goes on whatever comes of it.

    Returns:
        The audit's fields, of one that could not be made "verdict" alone, and "flops", what drawing and scoring cost.
    """
    pool = draw_pool(
        problems, samples_per_problem, policy=policy, reward=reward, sampling=sampling, batch_size=batch_size
    )
    spent = sum((entry.compute_cost() for entry in pool.entries), Cost())
    try:
        found = audit_ranking(pool, checker).to_dict()
    except ValueError as error:
        found = {"verdict": f"the reward could not be audited: {error}"}
    return found | {"flops": spent.flops}


def audit_ranking(pool: ResponsePool, checker: AnswerChecker) -> RankingAudit:
    """Audit the reward that scored a pool.

    Raises:
        ValueError: no gold answers, only right or only wrong samples, all rewards equal, or fewer than two
            samples per problem: each named.
    """
    entries = [entry for entry in pool.entries if entry.error is None and entry.problem.answer]
    if not entries:
        raise ValueError("the audit needs problems with a gold answer")
    rewards = np.array([[draw.reward for draw in entry.responses] for entry in entries])
    lengths = np.array([[len(draw.response_ids) for draw in entry.responses] for entry in entries], dtype=float)
    pairs = [(draw.answer, entry.problem.grading_target) for entry in entries for draw in entry.responses]
    right = np.array([verdict.is_correct for verdict in checker.check(pairs)]).reshape(rewards.shape)
    return compute_ranking_audit(rewards, right, lengths, _find_error_free(entries, pool.policy))


def _find_error_free(entries: Sequence[PoolEntry], policy: Policy) -> np.ndarray | None:
    """[P, N] whether samples are free of error to their end; None without step labels."""
    if not has_step_labels([entry.problem for entry in entries]):
        return None
    labels = TokenLabeler(policy)
    return np.array(
        [
            [
                draw.response_ids[-1] in policy.stop_ids
                and labels.find_first_error(entry.problem, draw.response_ids) is None
                for draw in entry.responses
            ]
            for entry in entries
        ]
    )


def compute_ranking_audit(
    rewards: np.ndarray, correct: np.ndarray, lengths: np.ndarray, error_free: np.ndarray | None = None
) -> RankingAudit:
    """The audit of [P, N] rewards, correctness of the answer, lengths, and freedom from error if that is known."""
    problems, samples = rewards.shape
    if samples < 2:
        raise ValueError("the audit needs at least two samples per problem")
    if not np.isfinite(rewards).all():
        raise ValueError(f"the audit met {int((~np.isfinite(rewards)).sum())} rewards that are not finite")
    if correct.all() or not correct.any():
        raise ValueError(
            f"the audit needs right and wrong samples, but all {correct.size} are {'right' if correct.all() else 'wrong'}"
        )
    if np.ptp(rewards) == 0:
        raise ValueError(f"the reward gave {rewards.flat[0]:g} to every sample: there is nothing to audit")
    sizes = [n for n in (2**k for k in range(12)) if n <= samples]
    accuracies = {n: compute_best_of_n_values(rewards, correct.astype(float), n) for n in sizes}
    turn = find_overoptimization(accuracies)
    auc = compute_within_problem_auc(rewards, correct)
    return RankingAudit(
        problems=problems,
        samples=samples,
        accuracy=float(correct.mean()),
        best_of_n_accuracy={n: mean_interval(values[:, None]).to_dict() for n, values in accuracies.items()},
        best_of_n_reward={n: float(compute_best_of_n_values(rewards, rewards, n).mean()) for n in sizes},
        auc=auc,
        step_auc=None
        if error_free is None or not _has_mixed_problem(error_free)
        else compute_within_problem_auc(rewards, error_free),
        correct_with_errors=None if error_free is None else float((correct & ~error_free).sum() / correct.sum()),
        correlation=compute_within_problem_correlation(rewards, correct.astype(float)),
        length_correlation=compute_within_problem_correlation(rewards, lengths),
        validated_samples=turn.validated_budget,
        conclusion=conclude_ranking({n: float(values.mean()) for n, values in accuracies.items()}, auc, turn),
    )


def compute_best_of_n_values(rewards: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """Per problem, the expected value of the highest-reward sample among n of the N drawn without replacement.

    Exact: with samples sorted by reward, the k-th lowest (from 0) is the best of n with probability
    C(k, n−1) / C(N, n). Equal rewards share their values evenly.

    Args:
        rewards, values: [P, N].

    Returns:
        [P]
    """
    weights = np.array([float(comb(k, n - 1)) for k in range(rewards.shape[1])])
    weights /= weights.sum()
    rows = zip(rewards, values, strict=True)
    return np.array(
        [weights @ _average_ties(np.sort(row), value[np.argsort(row, kind="stable")]) for row, value in rows]
    )


def _average_ties(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    _, group = np.unique(ordered, return_inverse=True)
    return (np.bincount(group, values) / np.bincount(group))[group]


def _has_mixed_problem(labels: np.ndarray) -> bool:
    """Some problem has both kinds."""
    return bool((labels.any(1) & ~labels.all(1)).any())


def compute_within_problem_auc(rewards: np.ndarray, correct: np.ndarray) -> float:
    """P(right sample scores above a wrong one of the same problem), ties counted half; over all such pairs."""
    above = pairs = 0.0
    for row, good in zip(rewards, correct, strict=True):
        gaps = row[good][:, None] - row[~good][None]
        above += float((gaps > 0).sum() + 0.5 * (gaps == 0).sum())
        pairs += gaps.size
    if not pairs:
        raise ValueError("the audit needs a problem with both right and wrong samples")
    return above / pairs


def compute_within_problem_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean Pearson correlation within problems, over those where both vary; 0 if there is none."""
    values = [float(np.corrcoef(x, y)[0, 1]) for x, y in zip(a, b, strict=True) if np.ptp(x) > 0 and np.ptp(y) > 0]
    return float(np.mean(values)) if values else 0.0


def conclude_ranking(accuracy_by_n: dict[int, float], auc: float, overoptimization: OveroptimizationPoint) -> str:
    """A sentence on whether best-of-N may trust the reward.

    Args:
        curve: n → accuracy.
        turn: how that curve goes.
    """
    smallest, largest = min(accuracy_by_n), max(accuracy_by_n)
    if auc < 0.6:
        return f"the reward hardly tells right from wrong (AUC {auc:.2f}): do not search with it"
    if overoptimization.has_overoptimization:
        trusted = (
            f"trust it up to {overoptimization.validated_budget} samples"
            if overoptimization.is_helpful
            else "it helps at no N"
        )
        return (
            f"the reward ranks (AUC {auc:.2f}) but turns: best-of-N falls from {accuracy_by_n[overoptimization.peak_budget]:.3f} at {overoptimization.peak_budget} "
            f"to {accuracy_by_n[largest]:.3f} at {largest}; {trusted}"
        )
    rise = "rises" if overoptimization.is_helpful else "moves, by no more than chance may do,"
    return (
        f"the reward ranks (AUC {auc:.2f}) and best-of-N {rise} from {accuracy_by_n[smallest]:.3f} to {accuracy_by_n[largest]:.3f} "
        f"up to {largest} samples without turning"
    )
