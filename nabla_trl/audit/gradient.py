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
from nabla_trl.audit.first_errors import Wrong, find_wrong
from nabla_trl.audit.swaps import Response, Swap, choose_swaps, draw_responses, measure
from nabla_trl.models.generation import random_stream
from nabla_trl.models.options import Point, Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.statistics import Interval, clustered_correlation, clustered_mean

# A swap tells something if it changes the reward by more than this many standard deviations of the responses' rewards.
TELLING = 0.1
# A dearer point has to find this much more than a cheaper one: a backward pass must pay for itself.
WORTH = 0.05


@dataclass(frozen=True)
class Finding:
    """Shares of wrong responses by some ranking of the allowed swaps; intervals are over problems.

    Attributes:
        first: the first-ranked position is the first error; `top3`: it is among the first three.
        right_first: at the first error the best swap is a right token, of those where one is allowed.
        repair: the best swap of all is a right token at the first error.
    """

    first: Interval
    top3: Interval
    right_first: Interval | None
    repair: Interval


@dataclass(frozen=True)
class PointAudit:
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

    sign: Interval
    sign_telling: Interval | None
    correlation: Interval | None
    correlation_telling: Interval | None
    finding: Finding | None
    right_above: Interval | None
    first_gain: Interval | None
    repair_gain: Interval | None
    effect: str
    verdict: str


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
    spread: float
    lam: float
    swaps: int
    swapped: int
    telling: int
    wrong: int
    fixable: int
    no_labels: str | None
    baseline: Finding | None
    points: dict[str, PointAudit]
    best: str | None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def gradient_audit(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward,
    points: Sequence[str],
    sampling: Sampling,
    samples: int,
    swaps: int,
    candidates: int = 16,
    min_p: float = 0.02,
    lam: float = 1.0,
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
    if samples < 1 or swaps < 1:
        raise ValueError(f"the gradient audit needs at least one sample and one swap, not {samples} and {swaps}")
    parsed = {text: Point.parse(text, min_p) for text in points}
    if not parsed:
        raise ValueError("the gradient audit needs at least one point")
    responses = draw_responses(
        problems,
        samples,
        policy=policy,
        reward=reward,
        sampling=sampling,
        candidates=candidates,
        min_p=min_p,
        seed=seed,
        batch_size=batch_size,
    )
    chosen = choose_swaps(responses, swaps, random_stream(seed, "", "choice"))
    measured = measure(responses, chosen, parsed, reward=reward, batch_size=batch_size)
    spread = float(measured.rewards.std())
    if np.ptp(measured.rewards) == 0:
        raise ValueError(f"the reward {reward.name} gave {measured.rewards[0]:g} to all {len(responses)} responses")
    if not measured.changes.any():
        raise ValueError(f"none of {len(chosen)} swaps changes the reward {reward.name}")
    wrong, reason = find_wrong(problems, responses, policy)
    read = Reading(responses, chosen, measured.changes, TELLING * spread, wrong, lam)
    found = {name: read.point(name, tables) for name, tables in measured.predicted.items()}
    best = read.best(found)
    return GradientAudit(
        policy=policy.name,
        reward=reward.name,
        problems=read.problems,
        responses=len(responses),
        spread=spread,
        lam=lam,
        swaps=len(chosen),
        swapped=len({swap.row for swap in chosen}),
        telling=int(read.telling.sum()),
        wrong=len(wrong),
        fixable=int(read.fixable.sum()),
        no_labels=reason,
        baseline=read.baseline,
        points=found,
        best=best,
        verdict=overall(found, best),
    )


class Reading:
    """Reads predicted changes against the same swaps and the same first errors.

    Args:
        changes: [n] true changes of the swaps; those above `threshold` are telling.
        wrong: the wrong responses; may be empty.
        lam: λ.
    """

    def __init__(
        self,
        responses: Sequence[Response],
        swaps: Sequence[Swap],
        changes: np.ndarray,
        threshold: float,
        wrong: Sequence[Wrong],
        lam: float,
    ):
        self.swaps, self.changes, self.wrong, self.lam = swaps, changes, wrong, lam
        self.problems = responses[-1].problem + 1
        self.telling = np.abs(changes) > threshold
        self.of_swap = np.array([responses[swap.row].problem for swap in swaps])
        self.of_wrong = np.array([one.response.problem for one in wrong], dtype=int)
        self.fixable = np.array([one.fixable for one in wrong], dtype=bool)
        self.logps = [one.response.known.logp for one in wrong]
        self.entropy_ranks = first_errors.entropy_ranks(wrong)
        self.likely_repairs = first_errors.repairs(wrong, self.logps)
        self.baseline = self._finding(self.entropy_ranks, self.logps, self.likely_repairs)
        self._scores: dict[str, np.ndarray] = {}  # by point: what points are compared by, see `best`

    def point(self, name: str, predicted: Sequence[Tensor]) -> PointAudit:
        """The audit of one point from the predicted changes, per response [T, K]."""
        guesses = np.array([float(predicted[swap.row][swap.position, swap.column]) for swap in self.swaps])
        agree = np.where(guesses == 0, 0.5, np.sign(guesses) == np.sign(self.changes))
        tables = [predicted[one.row] for one in self.wrong]
        tilted = [logp + self.lam * table for logp, table in zip(self.logps, tables, strict=True)]
        ranks, repairs = first_errors.best_ranks(self.wrong, tables), first_errors.repairs(self.wrong, tilted)
        sign_telling = self._swap_mean(agree, self.telling)
        finding = self._finding(ranks, tables, repairs)
        first_gain = self._wrong_mean((ranks == 0) * 1.0 - (self.entropy_ranks == 0))
        repair_gain = self._wrong_mean(repairs * 1.0 - self.likely_repairs)
        effect = effect_of(sign_telling, first_gain, repair_gain)
        self._scores[name] = agree if finding is None else repairs * 0.5 + (ranks == 0) * 0.5
        return PointAudit(
            sign=_there(self._swap_mean(agree, np.ones(len(agree), dtype=bool))),
            sign_telling=sign_telling,
            correlation=clustered_correlation(guesses, self.changes, self.of_swap, self.problems),
            correlation_telling=clustered_correlation(
                guesses[self.telling], self.changes[self.telling], self.of_swap[self.telling], self.problems
            ),
            finding=finding,
            right_above=self._wrong_mean(first_errors.right_above(self.wrong, tables), self.fixable),
            first_gain=first_gain,
            repair_gain=repair_gain,
            effect=effect,
            verdict=f"the gradient at {name} {effect}: {_evidence(sign_telling, finding, self.baseline)}",
        )

    def best(self, points: Mapping[str, PointAudit]) -> str | None:
        """The point to search with: the first that helps, unless a later one is better by WORTH; None: none helps.

        Compared are repairs and first errors found, both alike, or the directions of telling swaps. The interval of
        the paired difference decides. Points should come with the cheapest first.
        """
        best: str | None = None
        for name in (name for name, one in points.items() if one.effect == "helps"):
            if best is None or self._better(self._scores[name] - self._scores[best]):
                best = name
        return best

    def _better(self, gains: np.ndarray) -> bool:
        gain = self._wrong_mean(gains) if self.wrong else self._swap_mean(gains, self.telling)
        return gain is not None and gain.low > WORTH

    def _swap_mean(self, values: np.ndarray, of: np.ndarray) -> Interval | None:
        return clustered_mean(values[of], self.of_swap[of], self.problems)

    def _wrong_mean(self, values: np.ndarray, of: np.ndarray | None = None) -> Interval | None:
        of = np.ones(len(values), dtype=bool) if of is None else of
        return clustered_mean(values[of], self.of_wrong[of], self.problems)

    def _finding(self, ranks: np.ndarray, tables: Sequence[Tensor], repairs: np.ndarray) -> Finding | None:
        if not self.wrong:
            return None
        return Finding(
            first=_there(self._wrong_mean(ranks == 0)),
            top3=_there(self._wrong_mean(ranks < 3)),
            right_first=self._wrong_mean(first_errors.right_first(self.wrong, tables), self.fixable),
            repair=_there(self._wrong_mean(repairs)),
        )


def _there(interval: Interval | None) -> Interval:
    """The interval of something that is known to have items."""
    assert interval is not None
    return interval


# --- in words -----------------------------------------------------------------------------------------


def effect_of(sign: Interval | None, first_gain: Interval | None, repair_gain: Interval | None) -> str:
    """ "helps", "misleads" or "adds nothing".

    With first errors to look at: it misleads if it makes fewer repairs than log π alone; it helps if it makes more, or
    finds more first errors than entropy does. Without: it helps or misleads if it predicts the direction of telling
    swaps (`sign`) better or worse than chance. Better and worse: the whole 95% interval lies on that side.
    """
    if first_gain is None or repair_gain is None:
        better, worse = sign is not None and sign.low > 0.5, sign is not None and sign.high < 0.5
    else:
        worse = repair_gain.high < 0
        better = not worse and (repair_gain.low > 0 or first_gain.low > 0)
    return "helps" if better else "misleads" if worse else "adds nothing"


def overall(points: Mapping[str, PointAudit], best: str | None) -> str:
    """What to do: take the gradient at a point, or do without."""
    if best is not None:
        evidence = points[best].verdict.partition(": ")[2]
        return f"take the {'direct gradient' if best == 'direct' else f'gradient at {best}'}: {evidence}"
    misled = [name for name, one in points.items() if one.effect == "misleads"]
    found = f"misleads at {', '.join(misled)}" if misled else "adds nothing here"
    if 0 < len(misled) < len(points):
        found += " and adds nothing elsewhere"
    return (
        f"this reward's gradient {found}: use branches without gradient (solver none), or train the reward on relaxed "
        "inputs (recipes/reward.py)"
    )


def _evidence(sign: Interval | None, finding: Finding | None, baseline: Finding | None) -> str:
    """The figures behind a verdict."""
    told = "no swap changes the reward tellingly"
    if sign is not None:
        told = f"it predicts the direction of {_percent(sign)} [{sign.low:.0%}, {sign.high:.0%}] of telling swaps"
    if finding is None or baseline is None:
        return told
    return (
        f"it ranks the first error first in {_percent(finding.first)} (entropy {_percent(baseline.first)}), with it "
        f"{_percent(finding.repair)} of best swaps repair it (log π alone {_percent(baseline.repair)}); {told}"
    )


def _percent(interval: Interval) -> str:
    return f"{interval.value:.0%}"
