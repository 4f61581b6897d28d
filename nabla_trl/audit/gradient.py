"""The gradient audit: does the reward's gradient say which token to change, and to what?

Two questions. Do predicted changes of single-token swaps agree with the true ones (`swaps`)? And where a task has step
labels, do they point at the first error of a wrong response, and at a right token there? The second is compared with
what needs no gradient: the policy's entropy (where), and its log-probabilities alone (where and what).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from nabla_trl.audit import first_errors
from nabla_trl.audit.first_errors import WrongResponse, find_wrong_responses
from nabla_trl.audit.swaps import SampledResponse, TokenSwap, choose_swaps, draw_responses, measure_swaps
from nabla_trl.models.generation import make_rng
from nabla_trl.models.options import GradientPoint, Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.statistics import Interval, clustered_correlation, clustered_mean

# A swap tells something if it changes the reward by more than this many standard deviations of the responses' rewards.
INFORMATIVE_THRESHOLD = 0.1
# A dearer point has to find this much more than a cheaper one: a backward pass must pay for itself.
MIN_ADVANTAGE = 0.05


@dataclass(frozen=True)
class FirstErrorScores:
    """Shares of wrong responses by some ranking of the allowed swaps; intervals are over problems.

    Attributes:
        first: the first-ranked position is the first error; `top3`: it is among the first three.
        right_first: at the first error the best swap is a right token, of those where one is allowed.
        repair: the best swap of all is a right token at the first error.
    """

    top1: Interval
    top3: Interval
    repair_at_error: Interval | None
    repair: Interval


@dataclass(frozen=True)
class GradientPointAudit:
    """What the gradient at one point is worth.

    Attributes:
        sign: share of swaps whose direction is predicted right (a prediction of 0 counts half); `sign_telling` of the
            telling ones. Chance is 0.5.
        correlation: Pearson's, of predicted and true changes; None where one of them does not vary.
        finding: what it finds in wrong responses; `repair` ranks by log π + λ·(predicted change).
        right_above: share of first errors, with a right token allowed, at which one is predicted to help.
        first_gain: `finding.first` less the baseline's, paired; `repair_gain` likewise.
        effect: "helps", "misleads" or "adds nothing", see `effect_of`.
        verdict: a sentence.
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
    """What the audit found.

    Attributes:
        problems: those with responses; `responses` in all, `spread` the standard deviation of their rewards.
        lam: λ, how often predicted changes counted against log π.
        swaps: how many were made, in `swapped` responses; `telling` of them changed the reward by more than
            TELLING·spread.
        wrong: finished responses with a first error and a wrong answer; `fixable` of them allow a right token there.
        no_labels: why nothing is said of first errors; None where something is.
        baseline: the findings without a gradient: positions by the policy's entropy, tokens by log π.
        points: by name; "direct" is the gradient that a search with a log-ratio reads by default.
        best: the point to search with; None where none helps.
        verdict: a sentence.
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
        return asdict(self)


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
    """Audit the gradient of a reward at several points (`options.Point.parse`).

    Args:
        samples: responses per problem; `swaps`: how many swaps to make in all.
        candidates, min_p: which tokens a search would consider.
        lam: λ, how often the predicted change counts against log π.

    Raises:
        ValueError: a malformed point, fewer than one sample or swap, no swap possible, rewards that are all equal,
            swaps that change nothing, a reward or gradient that is not finite.
    """
    if samples_per_problem < 1 or num_swaps < 1:
        raise ValueError(
            f"the gradient audit needs at least one sample and one swap, not {samples_per_problem} and {num_swaps}"
        )
    parsed = {text: GradientPoint.parse(text, candidate_min_p) for text in gradient_at}
    if not parsed:
        raise ValueError("the gradient audit needs at least one point")
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
    chosen = choose_swaps(responses, num_swaps, make_rng(seed, "", "choice"))
    measured = measure_swaps(responses, chosen, parsed, reward=reward, batch_size=batch_size)
    spread = float(measured.rewards.std())
    if np.ptp(measured.rewards) == 0:
        raise ValueError(f"the reward {reward.name} gave {measured.rewards[0]:g} to all {len(responses)} responses")
    if not measured.reward_changes.any():
        raise ValueError(f"none of {len(chosen)} swaps changes the reward {reward.name}")
    wrong, reason = find_wrong_responses(problems, responses, policy)
    read = GradientAuditor(
        responses, chosen, measured.reward_changes, INFORMATIVE_THRESHOLD * spread, wrong, reward_weight
    )
    found = {name: read.audit_point(name, tables) for name, tables in measured.predicted_changes.items()}
    best = read.choose_point(found)
    return GradientAudit(
        policy=policy.name,
        reward=reward.name,
        problems=read.num_problems,
        responses=len(responses),
        reward_std=spread,
        reward_weight=reward_weight,
        swaps=len(chosen),
        swapped_responses=len({swap.response_index for swap in chosen}),
        informative_swaps=int(read.is_informative.sum()),
        wrong_responses=len(wrong),
        repairable_responses=int(read.is_repairable.sum()),
        no_labels_reason=reason,
        baseline=read.baseline,
        gradient_points=found,
        best_gradient_at=best,
        conclusion=conclude_gradient_audit(found, best),
    )


class GradientAuditor:
    """Reads predicted changes against the same swaps and the same first errors.

    Args:
        changes: [n] true changes of the swaps; those above `threshold` are telling.
        wrong: the wrong responses; may be empty.
        lam: λ.
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
        self.swaps, self.reward_changes, self.wrong_responses, self.reward_weight = (
            swaps,
            reward_changes,
            wrong_responses,
            reward_weight,
        )
        self.num_problems = responses[-1].problem_index + 1
        self.is_informative = np.abs(reward_changes) > threshold
        self.problem_of_swap = np.array([responses[swap.response_index].problem_index for swap in swaps])
        self.problem_of_wrong = np.array([one.response.problem_index for one in wrong_responses], dtype=int)
        self.is_repairable = np.array([one.is_repairable for one in wrong_responses], dtype=bool)
        self.candidate_logps = [one.response.draw_info.logp for one in wrong_responses]
        self.entropy_ranks = first_errors.rank_errors_by_entropy(wrong_responses)
        self.baseline_repairs = first_errors.find_repairs(wrong_responses, self.candidate_logps)
        self.baseline = self._score_first_errors(self.entropy_ranks, self.candidate_logps, self.baseline_repairs)
        self._comparison_scores: dict[str, np.ndarray] = {}  # by point: what points are compared by, see `best`

    def audit_point(self, name: str, predicted_changes: Sequence[Tensor]) -> GradientPointAudit:
        """The audit of one point from the predicted changes, per response [T, K]."""
        guesses = np.array(
            [float(predicted_changes[swap.response_index][swap.position, swap.candidate_index]) for swap in self.swaps]
        )
        agree = np.where(guesses == 0, 0.5, np.sign(guesses) == np.sign(self.reward_changes))
        tables = [predicted_changes[one.response_index] for one in self.wrong_responses]
        tilted = [logp + self.reward_weight * table for logp, table in zip(self.candidate_logps, tables, strict=True)]
        ranks, repairs = (
            first_errors.rank_errors_by_swap(self.wrong_responses, tables),
            first_errors.find_repairs(self.wrong_responses, tilted),
        )
        sign_telling = self._average_over_swaps(agree, self.is_informative)
        finding = self._score_first_errors(ranks, tables, repairs)
        first_gain = self._average_over_wrong((ranks == 0) * 1.0 - (self.entropy_ranks == 0))
        repair_gain = self._average_over_wrong(repairs * 1.0 - self.baseline_repairs)
        effect = classify_effect(sign_telling, first_gain, repair_gain)
        self._comparison_scores[name] = agree if finding is None else repairs * 0.5 + (ranks == 0) * 0.5
        return GradientPointAudit(
            sign_accuracy=_require_interval(self._average_over_swaps(agree, np.ones(len(agree), dtype=bool))),
            sign_accuracy_informative=sign_telling,
            correlation=clustered_correlation(guesses, self.reward_changes, self.problem_of_swap, self.num_problems),
            correlation_informative=clustered_correlation(
                guesses[self.is_informative],
                self.reward_changes[self.is_informative],
                self.problem_of_swap[self.is_informative],
                self.num_problems,
            ),
            first_error_scores=finding,
            correct_token_predicted=self._average_over_wrong(
                first_errors.find_predicted_corrections(self.wrong_responses, tables), self.is_repairable
            ),
            top1_gain=first_gain,
            repair_gain=repair_gain,
            effect=effect,
            conclusion=f"the gradient at {name} {effect}: {_format_evidence(sign_telling, finding, self.baseline)}",
        )

    def choose_point(self, point_audits: Mapping[str, GradientPointAudit]) -> str | None:
        """The point to search with: the first that helps, unless a later one is better by WORTH; None: none helps.

        Compared are repairs and first errors found, both alike, or the directions of telling swaps. The interval of
        the paired difference decides. Points should come with the cheapest first.
        """
        best: str | None = None
        for name in (name for name, one in point_audits.items() if one.effect == "helps"):
            if best is None or self._is_better(self._comparison_scores[name] - self._comparison_scores[best]):
                best = name
        return best

    def _is_better(self, gains: np.ndarray) -> bool:
        gain = (
            self._average_over_wrong(gains)
            if self.wrong_responses
            else self._average_over_swaps(gains, self.is_informative)
        )
        return gain is not None and gain.low > MIN_ADVANTAGE

    def _average_over_swaps(self, values: np.ndarray, mask: np.ndarray) -> Interval | None:
        return clustered_mean(values[mask], self.problem_of_swap[mask], self.num_problems)

    def _average_over_wrong(self, values: np.ndarray, mask: np.ndarray | None = None) -> Interval | None:
        mask = np.ones(len(values), dtype=bool) if mask is None else mask
        return clustered_mean(values[mask], self.problem_of_wrong[mask], self.num_problems)

    def _score_first_errors(
        self, ranks: np.ndarray, tables: Sequence[Tensor], repairs: np.ndarray
    ) -> FirstErrorScores | None:
        if not self.wrong_responses:
            return None
        return FirstErrorScores(
            top1=_require_interval(self._average_over_wrong(ranks == 0)),
            top3=_require_interval(self._average_over_wrong(ranks < 3)),
            repair_at_error=self._average_over_wrong(
                first_errors.find_repairs_at_error(self.wrong_responses, tables), self.is_repairable
            ),
            repair=_require_interval(self._average_over_wrong(repairs)),
        )


def _require_interval(interval: Interval | None) -> Interval:
    """The interval of something that is known to have items."""
    assert interval is not None
    return interval


# --- in words -----------------------------------------------------------------------------------------


def classify_effect(sign_accuracy: Interval | None, top1_gain: Interval | None, repair_gain: Interval | None) -> str:
    """ "helps", "misleads" or "adds nothing".

    With first errors to look at: it misleads if it makes fewer repairs than log π alone; it helps if it makes more, or
    finds more first errors than entropy does. Without: it helps or misleads if it predicts the direction of telling
    swaps (`sign`) better or worse than chance. Better and worse: the whole 95% interval lies on that side.
    """
    if top1_gain is None or repair_gain is None:
        better, worse = (
            sign_accuracy is not None and sign_accuracy.low > 0.5,
            sign_accuracy is not None and sign_accuracy.high < 0.5,
        )
    else:
        worse = repair_gain.high < 0
        better = not worse and (repair_gain.low > 0 or top1_gain.low > 0)
    return "helps" if better else "misleads" if worse else "adds nothing"


def conclude_gradient_audit(point_audits: Mapping[str, GradientPointAudit], best_gradient_at: str | None) -> str:
    """What to do: take the gradient at a point, or do without."""
    if best_gradient_at is not None:
        evidence = point_audits[best_gradient_at].conclusion.partition(": ")[2]
        return f"take the {'direct gradient' if best_gradient_at == 'direct' else f'gradient at {best_gradient_at}'}: {evidence}"
    misled = [name for name, one in point_audits.items() if one.effect == "misleads"]
    found = f"misleads at {', '.join(misled)}" if misled else "adds nothing here"
    if 0 < len(misled) < len(point_audits):
        found += " and adds nothing elsewhere"
    return (
        f"this reward's gradient {found}: use branches without gradient (solver none), or train the reward on relaxed "
        "inputs (recipes/reward.py)"
    )


def _format_evidence(
    sign: Interval | None, finding: FirstErrorScores | None, baseline: FirstErrorScores | None
) -> str:
    """The figures behind a verdict."""
    told = "no swap changes the reward tellingly"
    if sign is not None:
        told = (
            f"it predicts the direction of {_format_percent(sign)} [{sign.low:.0%}, {sign.high:.0%}] of telling swaps"
        )
    if finding is None or baseline is None:
        return told
    return (
        f"it ranks the first error first in {_format_percent(finding.top1)} (entropy {_format_percent(baseline.top1)}), with it "
        f"{_format_percent(finding.repair)} of best swaps repair it (log π alone {_format_percent(baseline.repair)}); {told}"
    )


def _format_percent(interval: Interval) -> str:
    return f"{interval.value:.0%}"
