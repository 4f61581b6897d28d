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

from nabla_trl.audit.curves import Turn, turning
from nabla_trl.baselines.sampling import Entry, Pool, draw_pool
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import Cost
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.labels import TokenLabels, has_step_labels
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.statistics import mean_interval


@dataclass(frozen=True)
class Audit:
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
    best_of_n: dict[int, dict[str, float]]
    reward_of_n: dict[int, float]
    auc: float
    step_auc: float | None
    lucky: float | None
    correlation: float
    length_correlation: float
    trusted_samples: int
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def audit_reward(
    problems: Sequence[Problem],
    samples: int,
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
    pool = draw_pool(problems, samples, policy=policy, reward=reward, sampling=sampling, batch_size=batch_size)
    spent = sum((entry.cost() for entry in pool.entries), Cost())
    try:
        found = audit(pool, checker).to_dict()
    except ValueError as error:
        found = {"verdict": f"the reward could not be audited: {error}"}
    return found | {"flops": spent.flops}


def audit(pool: Pool, checker: AnswerChecker) -> Audit:
    """Audit the reward that scored a pool.

    Raises:
        ValueError: no gold answers, only right or only wrong samples, all rewards equal, or fewer than two
            samples per problem: each named.
    """
    entries = [entry for entry in pool.entries if entry.error is None and entry.problem.answer]
    if not entries:
        raise ValueError("the audit needs problems with a gold answer")
    rewards = np.array([[draw.reward for draw in entry.draws] for entry in entries])
    lengths = np.array([[len(draw.ids) for draw in entry.draws] for entry in entries], dtype=float)
    pairs = [(draw.answer, entry.problem.judge) for entry in entries for draw in entry.draws]
    right = np.array([verdict.right for verdict in checker.check(pairs)]).reshape(rewards.shape)
    return audit_arrays(rewards, right, lengths, _sound(entries, pool.policy))


def _sound(entries: Sequence[Entry], policy: Policy) -> np.ndarray | None:
    """[P, N] whether samples are free of error to their end; None without step labels."""
    if not has_step_labels([entry.problem for entry in entries]):
        return None
    labels = TokenLabels(policy)
    return np.array(
        [
            [
                draw.ids[-1] in policy.stop_ids and labels.first_error(entry.problem, draw.ids) is None
                for draw in entry.draws
            ]
            for entry in entries
        ]
    )


def audit_arrays(
    rewards: np.ndarray, right: np.ndarray, lengths: np.ndarray, sound: np.ndarray | None = None
) -> Audit:
    """The audit of [P, N] rewards, correctness of the answer, lengths, and freedom from error if that is known."""
    problems, samples = rewards.shape
    if samples < 2:
        raise ValueError("the audit needs at least two samples per problem")
    if not np.isfinite(rewards).all():
        raise ValueError(f"the audit met {int((~np.isfinite(rewards)).sum())} rewards that are not finite")
    if right.all() or not right.any():
        raise ValueError(
            f"the audit needs right and wrong samples, but all {right.size} are {'right' if right.all() else 'wrong'}"
        )
    if np.ptp(rewards) == 0:
        raise ValueError(f"the reward gave {rewards.flat[0]:g} to every sample: there is nothing to audit")
    sizes = [n for n in (2**k for k in range(12)) if n <= samples]
    accuracies = {n: best_of_n_values(rewards, right.astype(float), n) for n in sizes}
    turn = turning(accuracies)
    auc = within_auc(rewards, right)
    return Audit(
        problems=problems,
        samples=samples,
        accuracy=float(right.mean()),
        best_of_n={n: mean_interval(values[:, None]).entry() for n, values in accuracies.items()},
        reward_of_n={n: float(best_of_n_values(rewards, rewards, n).mean()) for n in sizes},
        auc=auc,
        step_auc=None if sound is None or not _mixed(sound) else within_auc(rewards, sound),
        lucky=None if sound is None else float((right & ~sound).sum() / right.sum()),
        correlation=within_correlation(rewards, right.astype(float)),
        length_correlation=within_correlation(rewards, lengths),
        trusted_samples=turn.trusted,
        verdict=verdict({n: float(values.mean()) for n, values in accuracies.items()}, auc, turn),
    )


def best_of_n_values(rewards: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
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
        [weights @ _mean_over_ties(np.sort(row), value[np.argsort(row, kind="stable")]) for row, value in rows]
    )


def _mean_over_ties(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    _, group = np.unique(ordered, return_inverse=True)
    return (np.bincount(group, values) / np.bincount(group))[group]


def _mixed(labels: np.ndarray) -> bool:
    """Some problem has both kinds."""
    return bool((labels.any(1) & ~labels.all(1)).any())


def within_auc(rewards: np.ndarray, right: np.ndarray) -> float:
    """P(right sample scores above a wrong one of the same problem), ties counted half; over all such pairs."""
    above = pairs = 0.0
    for row, good in zip(rewards, right, strict=True):
        gaps = row[good][:, None] - row[~good][None]
        above += float((gaps > 0).sum() + 0.5 * (gaps == 0).sum())
        pairs += gaps.size
    if not pairs:
        raise ValueError("the audit needs a problem with both right and wrong samples")
    return above / pairs


def within_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Mean Pearson correlation within problems, over those where both vary; 0 if there is none."""
    values = [float(np.corrcoef(x, y)[0, 1]) for x, y in zip(a, b, strict=True) if np.ptp(x) > 0 and np.ptp(y) > 0]
    return float(np.mean(values)) if values else 0.0


def verdict(curve: dict[int, float], auc: float, turn: Turn) -> str:
    """A sentence on whether best-of-N may trust the reward.

    Args:
        curve: n → accuracy.
        turn: how that curve goes.
    """
    smallest, largest = min(curve), max(curve)
    if auc < 0.6:
        return f"the reward hardly tells right from wrong (AUC {auc:.2f}): do not search with it"
    if turn.turns:
        trusted = f"trust it up to {turn.trusted} samples" if turn.helps else "it helps at no N"
        return (
            f"the reward ranks (AUC {auc:.2f}) but turns: best-of-N falls from {curve[turn.peak]:.3f} at {turn.peak} "
            f"to {curve[largest]:.3f} at {largest}; {trusted}"
        )
    rise = "rises" if turn.helps else "moves, by no more than chance may do,"
    return (
        f"the reward ranks (AUC {auc:.2f}) and best-of-N {rise} from {curve[smallest]:.3f} to {curve[largest]:.3f} "
        f"up to {largest} samples without turning"
    )
