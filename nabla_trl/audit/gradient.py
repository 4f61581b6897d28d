"""Audit whether the reward's gradient says which token to change, and to what.

Two questions. Do predicted changes of single-token swaps agree with the measured ones (`nabla_trl.audit.swaps`)? And
where a task has step labels, do predicted changes point at the first error of a wrong response, and at a correct token
there? The second is compared with what needs no gradient: the policy's entropy (which position), and its
log-probabilities alone (which position and token).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from nabla_trl.audit.first_errors import WrongResponse, find_wrong_responses
from nabla_trl.audit.swaps import SampledResponse, TokenSwap, choose_swaps, draw_responses, measure_swaps
from nabla_trl.models.options import GradientPoint, Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.sampling import make_rng
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.statistics import (
    Interval,
    clustered_correlation,
    clustered_difference,
    clustered_proportion,
    to_json_values,
)

# A swap is informative if it changes the reward by more than this many standard deviations of the responses' rewards.
INFORMATIVE_THRESHOLD = 0.1
# A more expensive point must find this much more than a cheaper one: a backward pass must pay for itself.
MIN_ADVANTAGE = 0.05
TOO_FEW = "too few to tell"
_EFFECT_PHRASES = {TOO_FEW: "may help or not, which too few wrong responses or swaps can tell"}


@dataclass(frozen=True)
class FirstErrorScores:
    """Shares of wrong responses for one ranking of the allowed swaps. Intervals are over problems.

    Attributes:
        top1: the first error is ranked first among positions.
        top3: the first error is among the first three positions.
        repair_at_error: at the first error the best swap is a correct token, of the responses where one is allowed.
        repair: the best swap of all is a correct token at the first error.
    """

    top1: Interval
    top3: Interval
    repair_at_error: Interval | None
    repair: Interval


@dataclass(frozen=True)
class GradientPointAudit:
    """Result of the audit of the gradient at one point.

    Attributes:
        sign_accuracy: share of swaps whose direction is predicted. A prediction of 0 counts half. Chance is 0.5.
        sign_accuracy_informative: the same for informative swaps.
        correlation: Pearson's, of predicted and measured changes. None where one of them does not vary.
        correlation_informative: the same for informative swaps.
        first_error_scores: what the gradient finds in wrong responses. `repair` ranks by log π + λ·(predicted change).
        correct_token_predicted: share of first errors, with a correct token allowed, at which the predicted change of
            some correct token is positive.
        top1_gain: `first_error_scores.top1` minus the baseline's, paired.
        repair_gain: `first_error_scores.repair` minus the baseline's, paired.
        effect: "helps", "misleads", "adds nothing" or "too few to tell", see `classify_effect`.
        conclusion: a sentence.
    """

    sign_accuracy: Interval
    sign_accuracy_informative: Interval | None
    correlation: Interval | None
    correlation_informative: Interval | None
    first_error_scores: FirstErrorScores | None
    correct_token_predicted: Interval | None
    top1_gain: Interval | None
    repair_gain: Interval | None
    effect: str
    conclusion: str


@dataclass(frozen=True)
class GradientAudit:
    """Result of the gradient audit.

    Attributes:
        problems: number of problems with responses.
        reward_std: standard deviation of the responses' rewards.
        reward_weight: λ, the weight of predicted changes against log π.
        swapped_responses: number of responses with a swap.
        informative_swaps: number of swaps that change the reward by more than `INFORMATIVE_THRESHOLD`·reward_std.
        wrong_responses: number of finished responses with a first error and an incorrect answer.
        repairable_responses: number of wrong responses whose first error allows a correct token.
        no_labels_reason: why first errors are not measured, None where they are.
        baseline: the scores without a gradient: positions by the policy's entropy, tokens by log π.
        gradient_points: by name. "direct" is the gradient that a search with a log-ratio follows by default.
        best_gradient_at: the point to search with, None where none helps.
        conclusion: a sentence.
    """

    policy: str
    reward: str
    problems: int
    responses: int
    reward_std: float
    reward_weight: float
    swaps: int
    swapped_responses: int
    informative_swaps: int
    wrong_responses: int
    repairable_responses: int
    no_labels_reason: str | None
    baseline: FirstErrorScores | None
    gradient_points: dict[str, GradientPointAudit]
    best_gradient_at: str | None
    conclusion: str

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as JSON values."""
        return to_json_values(self)


def audit_gradient(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward,
    gradient_at: Sequence[str],
    sampling: Sampling,
    samples_per_problem: int,
    num_swaps: int,
    top_k_candidates: int = 16,
    candidate_min_p: float = 0.02,
    reward_weight: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
) -> GradientAudit:
    """Audit the gradient of a reward at several points.

    Args:
        gradient_at: points as `GradientPoint.parse` reads them, the cheapest first.
        num_swaps: swaps in all.
        top_k_candidates: candidates per position that a search would consider.
        candidate_min_p: how likely a candidate must be, relative to the likeliest, for a search to propose it.
        reward_weight: λ, the weight of the predicted change against log π.

    Raises:
        ValueError: a reward without a gradient, a malformed point, fewer than one sample or swap, no swap possible,
            rewards that are all equal, swaps that change nothing, a reward or gradient that is not finite.
    """
    if not reward.has_gradient:
        raise ValueError(f"the reward {reward.name} is a function, which has no gradient to audit")
    if samples_per_problem < 1 or num_swaps < 1:
        raise ValueError(
            f"the gradient audit needs at least one sample and one swap, not {samples_per_problem} and {num_swaps}"
        )
    parsed_points = {text: GradientPoint.parse(text, candidate_min_p) for text in gradient_at}
    if not parsed_points:
        raise ValueError("the gradient audit needs at least one point in gradient_at")
    responses = draw_responses(
        problems,
        samples_per_problem,
        policy=policy,
        reward=reward,
        sampling=sampling,
        top_k_candidates=top_k_candidates,
        candidate_min_p=candidate_min_p,
        seed=seed,
        batch_size=batch_size,
    )
    swaps = choose_swaps(responses, num_swaps, make_rng(seed, "", "choice"))
    measured = measure_swaps(responses, swaps, parsed_points, reward=reward, batch_size=batch_size)
    reward_std = float(measured.rewards.std())
    if np.ptp(measured.rewards) == 0:
        raise ValueError(f"the reward {reward.name} gave {measured.rewards[0]:g} to all {len(responses)} responses")
    if not measured.reward_changes.any():
        raise ValueError(f"none of {len(swaps)} swaps changes the reward {reward.name}")
    wrong_responses, no_labels_reason = find_wrong_responses(problems, responses, policy)
    threshold = INFORMATIVE_THRESHOLD * reward_std
    auditor = GradientAuditor(responses, swaps, measured.reward_changes, threshold, wrong_responses, reward_weight)
    points = {name: auditor.audit_point(name, tables) for name, tables in measured.predicted_changes.items()}
    best = auditor.choose_point(points)
    return GradientAudit(
        policy=policy.name,
        reward=reward.name,
        problems=auditor.num_problems,
        responses=len(responses),
        reward_std=reward_std,
        reward_weight=reward_weight,
        swaps=len(swaps),
        swapped_responses=len({swap.response_index for swap in swaps}),
        informative_swaps=int(auditor.is_informative.sum()),
        wrong_responses=len(wrong_responses),
        repairable_responses=int(auditor.is_repairable.sum()),
        no_labels_reason=no_labels_reason,
        baseline=auditor.baseline,
        gradient_points=points,
        best_gradient_at=best,
        conclusion=conclude_gradient_audit(points, best),
    )


class GradientAuditor:
    """Comparison of predicted changes with the same swaps and the same first errors.

    Args:
        reward_changes: [n] measured changes of the swaps.
        threshold: a swap with a larger absolute change is informative.
        wrong_responses: may be empty.
        reward_weight: λ.
    """

    def __init__(
        self,
        responses: Sequence[SampledResponse],
        swaps: Sequence[TokenSwap],
        reward_changes: np.ndarray,
        threshold: float,
        wrong_responses: Sequence[WrongResponse],
        reward_weight: float,
    ):
        self.swaps, self.reward_changes = swaps, reward_changes
        self.wrong_responses, self.reward_weight = wrong_responses, reward_weight
        self.num_problems = responses[-1].problem_index + 1
        self.is_informative = np.abs(reward_changes) > threshold
        self.problem_of_swap = np.array([responses[swap.response_index].problem_index for swap in swaps])
        self.problem_of_wrong = np.array([wrong.response.problem_index for wrong in wrong_responses], dtype=int)
        self.is_repairable = np.array([wrong.is_repairable for wrong in wrong_responses], dtype=bool)
        self.candidate_logps = [wrong.response.draw_info.logp for wrong in wrong_responses]
        self.entropy_ranks = np.array([wrong.rank_error_by_entropy() for wrong in wrong_responses], dtype=int)
        self.baseline_repairs = self._test_wrong_responses(WrongResponse.is_repaired, self.candidate_logps)
        self.baseline = self._score_first_errors(self.entropy_ranks, self.candidate_logps, self.baseline_repairs)
        self._comparison_scores: dict[str, np.ndarray] = {}  # by point, for `choose_point`

    def audit_point(self, name: str, predicted_changes: Sequence[Tensor]) -> GradientPointAudit:
        """Audit one point by its predicted changes, per response [T, K]."""
        predicted = np.array(
            [float(predicted_changes[swap.response_index][swap.position, swap.candidate_index]) for swap in self.swaps]
        )
        sign_scores = np.where(predicted == 0, 0.5, np.sign(predicted) == np.sign(self.reward_changes))
        tables = [predicted_changes[wrong.response_index] for wrong in self.wrong_responses]
        tilted = [logp + self.reward_weight * table for logp, table in zip(self.candidate_logps, tables, strict=True)]
        ranks = self._test_wrong_responses(WrongResponse.rank_error_by_swap, tables)
        repairs = self._test_wrong_responses(WrongResponse.is_repaired, tilted)
        sign_accuracy_informative = self._average_over_swaps(sign_scores, self.is_informative)
        first_error_scores = self._score_first_errors(ranks, tables, repairs)
        top1_gain = self._compare_over_wrong((ranks == 0) * 1.0 - (self.entropy_ranks == 0))
        repair_gain = self._compare_over_wrong(repairs * 1.0 - self.baseline_repairs)
        effect = classify_effect(sign_accuracy_informative, top1_gain, repair_gain)
        self._comparison_scores[name] = sign_scores if not self.wrong_responses else repairs * 0.5 + (ranks == 0) * 0.5
        evidence = _format_evidence(sign_accuracy_informative, first_error_scores, self.baseline)
        return GradientPointAudit(
            sign_accuracy=_require_interval(
                self._average_over_swaps(sign_scores, np.ones(len(sign_scores), dtype=bool))
            ),
            sign_accuracy_informative=sign_accuracy_informative,
            correlation=clustered_correlation(predicted, self.reward_changes, self.problem_of_swap, self.num_problems),
            correlation_informative=clustered_correlation(
                predicted[self.is_informative],
                self.reward_changes[self.is_informative],
                self.problem_of_swap[self.is_informative],
                self.num_problems,
            ),
            first_error_scores=first_error_scores,
            correct_token_predicted=self._average_over_wrong(
                self._test_wrong_responses(WrongResponse.is_correction_predicted, tables), self.is_repairable
            ),
            top1_gain=top1_gain,
            repair_gain=repair_gain,
            effect=effect,
            conclusion=f"the gradient at {name} {_EFFECT_PHRASES.get(effect, effect)}: {evidence}",
        )

    def choose_point(self, point_audits: Mapping[str, GradientPointAudit]) -> str | None:
        """Return the point to search with, or None where none helps.

        It is the first that helps, unless a later one is better by `MIN_ADVANTAGE`. Repairs and first errors found are
        compared with equal weight, or the directions of informative swaps where there are no wrong responses. The
        interval of the paired difference decides. Points should come with the cheapest first.
        """
        best: str | None = None
        for name in (name for name, audit in point_audits.items() if audit.effect == "helps"):
            if best is None or self._is_better(self._comparison_scores[name] - self._comparison_scores[best]):
                best = name
        return best

    def _is_better(self, gains: np.ndarray) -> bool:
        gain = (
            self._compare_over_wrong(gains)
            if self.wrong_responses
            else clustered_difference(
                gains[self.is_informative], self.problem_of_swap[self.is_informative], self.num_problems
            )
        )
        return gain is not None and gain.low > MIN_ADVANTAGE

    def _test_wrong_responses(
        self, test: Callable[[WrongResponse, Tensor], int], tables: Sequence[Tensor]
    ) -> np.ndarray:
        """Return [W] the result of a test on each wrong response and its table."""
        return np.array([test(wrong, table) for wrong, table in zip(self.wrong_responses, tables, strict=True)], int)

    def _average_over_swaps(self, values: np.ndarray, mask: np.ndarray) -> Interval | None:
        return clustered_proportion(values[mask], self.problem_of_swap[mask], self.num_problems)

    def _compare_over_wrong(self, gains: np.ndarray) -> Interval | None:
        return clustered_difference(gains, self.problem_of_wrong, self.num_problems)

    def _average_over_wrong(self, values: np.ndarray, mask: np.ndarray | None = None) -> Interval | None:
        mask = np.ones(len(values), dtype=bool) if mask is None else mask
        return clustered_proportion(values[mask], self.problem_of_wrong[mask], self.num_problems)

    def _score_first_errors(
        self, ranks: np.ndarray, tables: Sequence[Tensor], repairs: np.ndarray
    ) -> FirstErrorScores | None:
        if not self.wrong_responses:
            return None
        repairs_at_error = self._test_wrong_responses(WrongResponse.is_repaired_at_error, tables)
        return FirstErrorScores(
            top1=_require_interval(self._average_over_wrong(ranks == 0)),
            top3=_require_interval(self._average_over_wrong(ranks < 3)),
            repair_at_error=self._average_over_wrong(repairs_at_error, self.is_repairable),
            repair=_require_interval(self._average_over_wrong(repairs)),
        )


def _require_interval(interval: Interval | None) -> Interval:
    """Return the interval of something that is known to have items."""
    assert interval is not None
    return interval


# --- in words -----------------------------------------------------------------------------------------


def classify_effect(sign_accuracy: Interval | None, top1_gain: Interval | None, repair_gain: Interval | None) -> str:
    """Return "helps", "misleads", "adds nothing" or "too few to tell".

    With first errors, a gradient misleads if it makes fewer repairs than log π alone. It helps if it makes more, or
    finds more first errors than entropy does. Without them, it helps or misleads if it predicts the direction of
    informative swaps better or worse than chance. Better and worse mean that the whole 95% interval is on that side. A
    gradient adds nothing if the intervals exclude an advantage of `MIN_ADVANTAGE`.
    """
    if top1_gain is None or repair_gain is None:
        is_better = sign_accuracy is not None and sign_accuracy.low > 0.5
        is_worse = sign_accuracy is not None and sign_accuracy.high < 0.5
        excludes_gain = sign_accuracy is not None and sign_accuracy.high < 0.5 + MIN_ADVANTAGE
    else:
        is_worse = repair_gain.high < 0
        is_better = not is_worse and (repair_gain.low > 0 or top1_gain.low > 0)
        excludes_gain = max(repair_gain.high, top1_gain.high) < MIN_ADVANTAGE
    if is_better or is_worse:
        return "helps" if is_better else "misleads"
    return "adds nothing" if excludes_gain else TOO_FEW


def conclude_gradient_audit(point_audits: Mapping[str, GradientPointAudit], best_gradient_at: str | None) -> str:
    """Return what to do: follow the gradient at a point, or search without one."""
    if best_gradient_at is not None:
        evidence = point_audits[best_gradient_at].conclusion.partition(": ")[2]
        gradient = "direct gradient" if best_gradient_at == "direct" else f"gradient at {best_gradient_at}"
        return f"take the {gradient}: {evidence}"
    misleading = [name for name, audit in point_audits.items() if audit.effect == "misleads"]
    unclear = [name for name, audit in point_audits.items() if audit.effect == TOO_FEW]
    effect = f"misleads at {', '.join(misleading)}" if misleading else "adds nothing here"
    if unclear and not misleading:
        evidence = point_audits[unclear[0]].conclusion.partition(": ")[2]
        return (
            f"too few wrong responses or swaps to tell if this reward's gradient helps at {', '.join(unclear)} "
            f"({evidence}): audit more problems, and search without a gradient (solver none) until then"
        )
    if 0 < len(misleading) < len(point_audits):
        effect += " and helps nowhere beyond chance" if unclear else " and adds nothing elsewhere"
    return (
        f"this reward's gradient {effect}: use proposals without a gradient (solver none), or train the reward on "
        "relaxed inputs (recipes/reward.py)"
    )


def _format_evidence(
    sign_accuracy: Interval | None, scores: FirstErrorScores | None, baseline: FirstErrorScores | None
) -> str:
    """Return the figures behind a conclusion."""
    directions = "no swap changes the reward enough to be informative"
    if sign_accuracy is not None:
        directions = (
            f"it predicts the direction of {sign_accuracy.value:.0%} [{sign_accuracy.low:.0%}, "
            f"{sign_accuracy.high:.0%}] of informative swaps"
        )
    if scores is None or baseline is None:
        return directions
    return (
        f"it ranks the first error first in {scores.top1.value:.0%} (entropy {baseline.top1.value:.0%}), with it "
        f"{scores.repair.value:.0%} of best swaps repair it (log π alone {baseline.repair.value:.0%}); {directions}"
    )
