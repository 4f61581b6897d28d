"""Audit how accuracy and reward develop as a search spends more, and find where the reward is over-optimized.

A search maximizes the reward. Where the reward no longer measures correctness, accuracy falls while the reward still
rises (Gao et al., arXiv 2210.10760). Up to there the search is validated. The same rule reads the curve of best-of-N:
a budget is better or worse than another if the paired difference of the problems' scores has a 95% interval above or
below zero, and a sign-flip test agrees. Audits of few problems therefore see neither gains nor harm. They say that
they cannot tell, and validate nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.limits import ValidatedLimits, past_limits, past_sample_limit
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.options import MirrorSolver, RewardSelection
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.formatting import format_interval
from nabla_trl.utils.statistics import (
    RELEVANT_DIFFERENCE,
    Interval,
    PairedDifference,
    difference_interval,
    mean_interval,
    proportion_interval,
    to_json_values,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OveroptimizationPoint:
    """Where a curve of accuracy against a budget peaks, and how far the budget is validated.

    Attributes:
        peak_budget: the budget of the highest score, the smallest among equals.
        rise_to_peak: paired difference of the peak and the smallest budget, at least 0.
        drop_from_peak: paired difference of the largest budget and the peak, at most 0.
        is_helpful: some budget is better than the smallest.
        validated_budget: the largest budget up to which the curve is nowhere worse than its peak. The smallest budget
            where none is helpful.
    """

    peak_budget: int
    rise_to_peak: PairedDifference
    drop_from_peak: PairedDifference
    is_helpful: bool
    validated_budget: int

    @property
    def has_overoptimization(self) -> bool:
        """Whether the largest budget is worse than the peak."""
        return self.drop_from_peak.side == "behind"

    @property
    def excludes_rise(self) -> bool:
        """Whether no budget is better than the smallest by as much as would matter."""
        return not self.is_helpful and self.rise_to_peak.high < RELEVANT_DIFFERENCE


def find_overoptimization(curve: Mapping[int, np.ndarray]) -> OveroptimizationPoint:
    """Find the peak of a curve, and the budget from which on it is worse.

    Args:
        curve: budget → scores of the problems [P], in the same order for every budget.

    Raises:
        ValueError: no budgets.
    """
    if not curve:
        raise ValueError("a curve needs at least one budget")

    def compare(budget: int, other: int) -> PairedDifference:
        return difference_interval(curve[budget] - curve[other])

    budgets = sorted(curve)
    peak = max(budgets, key=lambda budget: (curve[budget].mean(), -budget))
    is_helpful = any(compare(budget, budgets[0]).side == "ahead" for budget in budgets)
    worse = [budget for budget in budgets if budget > peak and compare(budget, peak).side == "behind"]
    not_worse = [budget for budget in budgets if not worse or budget < worse[0]]
    return OveroptimizationPoint(
        peak_budget=peak,
        rise_to_peak=compare(peak, budgets[0]),
        drop_from_peak=compare(budgets[-1], peak),
        is_helpful=is_helpful,
        validated_budget=not_worse[-1] if is_helpful else budgets[0],
    )


@dataclass(frozen=True)
class SearchCurve:
    """Accuracy and reward of one search by its number of rounds.

    Attributes:
        accuracy: rounds → accuracy of the incumbents, with its interval over problems.
        reward: rounds → mean reward of the incumbents.
        overoptimization: where the accuracy peaks.
        conclusion: a sentence.
    """

    accuracy: dict[int, Interval]
    reward: dict[int, float]
    overoptimization: OveroptimizationPoint
    conclusion: str


@dataclass(frozen=True)
class OveroptimizationAudit:
    """Result of the over-optimization audit on P problems.

    Attributes:
        curves: "nabla" (the search as configured) and "control" (without the gradient), or "control" alone.
        failed_searches: number of searches that failed. They count as incorrect.
        validated_limits: samples by the ranking audit, rounds by the search as configured.
        conclusion: that of the search as configured.
    """

    problems: int
    seeds: tuple[int, ...]
    curves: dict[str, SearchCurve]
    failed_searches: int
    validated_limits: ValidatedLimits
    conclusion: str

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as JSON values."""
        return to_json_values(self)


def audit_overoptimization(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    checker: AnswerChecker,
    validated_samples: int,
    seeds: Sequence[int] = (0,),
) -> OveroptimizationAudit:
    """Run a search of `config.max_rounds` rounds, with and without its gradient, and grade its incumbents.

    Other limits of the configuration (patience, rollouts, FLOPs) are removed.

    Args:
        validated_samples: of the ranking audit of the same reward, for the limits of this one.

    Raises:
        ValueError: no limit of rounds, no seeds, no gold answers, or every search failed.
    """
    if config.max_rounds < 1:
        raise ValueError("the over-optimization audit needs a limit of rounds: set max_rounds to at least 1")
    graded = [problem for problem in problems if problem.answer]
    if not graded or not seeds:
        raise ValueError("the over-optimization audit needs problems with a gold answer, and at least one seed")
    config = replace(config, patience=0, max_rollouts=0, max_flops=0.0)
    curves, failed_searches = {}, 0
    for name, search_config in {config.method: config, "control": config.with_no_gradient()}.items():
        runs = [run_search(graded, policy=policy, reward=reward, config=search_config, seed=seed) for seed in seeds]
        traces_by_problem = list(zip(*runs, strict=True))
        curves[name] = compute_search_curve(traces_by_problem, policy, checker, config.max_rounds)
        failed_searches += sum(trace.error is not None for traces in traces_by_problem for trace in traces)
    curve = curves[config.method]
    limits = ValidatedLimits(max_samples=validated_samples, max_rounds=curve.overoptimization.validated_budget)
    return OveroptimizationAudit(len(graded), tuple(seeds), curves, failed_searches, limits, curve.conclusion)


def compute_search_curve(
    traces_by_problem: Sequence[Sequence[Trace]], policy: Policy, checker: AnswerChecker, max_rounds: int
) -> SearchCurve:
    """Return the curve of finished searches at 0, 1, 2, 4, … and `max_rounds` rounds.

    Args:
        traces_by_problem: per problem its traces by seed. A trace with an error is incorrect at every budget and has
            no reward.

    Raises:
        ValueError: every trace has an error.
    """
    errors = [trace.error for traces in traces_by_problem for trace in traces if trace.error is not None]
    if len(errors) == sum(map(len, traces_by_problem)):
        raise ValueError(f"every search of the over-optimization audit failed, the first because {errors[0]}")
    budgets = make_round_grid(max_rounds)
    incumbents = [[trace.list_incumbents_at(budgets) for trace in traces] for traces in traces_by_problem]
    correct = _grade_incumbents(traces_by_problem, incumbents, policy, checker)
    rewards = np.array(
        [
            [
                [math.nan if trace.error else reward for _, reward in by_budget]
                for trace, by_budget in zip(traces, by_seed, strict=True)
            ]
            for traces, by_seed in zip(traces_by_problem, incumbents, strict=True)
        ]
    )
    accuracy = {budget: proportion_interval(correct[:, :, index]) for index, budget in enumerate(budgets)}
    reward = {budget: mean_interval(rewards[:, :, index]).value for index, budget in enumerate(budgets)}
    point = find_overoptimization({budget: correct[:, :, index].mean(1) for index, budget in enumerate(budgets)})
    return SearchCurve(accuracy, reward, point, conclude_overoptimization(accuracy, reward, point))


def make_round_grid(max_rounds: int) -> list[int]:
    """Return 0, 1, 2, 4, … and `max_rounds` itself."""
    return sorted({0, max_rounds, *(2**power for power in range(max_rounds.bit_length()))})


def _grade_incumbents(
    traces_by_problem: Sequence[Sequence[Trace]],
    incumbents: Sequence[Sequence[Sequence[tuple[list[int], float]]]],
    policy: Policy,
    checker: AnswerChecker,
) -> np.ndarray:
    """Return [P, seeds, budgets] 1 where the incumbent's answer is correct. Each distinct response is read once."""
    answers: dict[tuple[int, ...], str | None] = {}
    pairs = []
    for traces, by_seed in zip(traces_by_problem, incumbents, strict=True):
        for trace, by_budget in zip(traces, by_seed, strict=True):
            for ids, _ in by_budget:
                if tuple(ids) not in answers:
                    answers[tuple(ids)] = extract_answer(policy.decode_response(ids))
                pairs.append((None if trace.error else answers[tuple(ids)], trace.grading_reference))
    correct = [result.is_correct for result in checker.check(pairs)]
    return np.array(correct, dtype=np.float64).reshape(len(traces_by_problem), len(traces_by_problem[0]), -1)


def conclude_overoptimization(
    accuracy: dict[int, Interval], reward: dict[int, float], point: OveroptimizationPoint
) -> str:
    """Return a sentence on how far a search may go.

    Args:
        accuracy: rounds → accuracy.
        reward: rounds → mean reward.
        point: where the accuracy peaks.
    """
    peak, validated, last = point.peak_budget, point.validated_budget, max(accuracy)
    first_accuracy, peak_accuracy, last_accuracy = (f"{accuracy[rounds].value:.3f}" for rounds in (0, peak, last))
    if point.has_overoptimization:
        advice = f"the search is validated up to {validated} rounds" if point.is_helpful else "no budget helps"
        return (
            f"accuracy falls from {peak_accuracy} at {peak} rounds to {last_accuracy} at {last} while the reward goes "
            f"from {reward[peak]:.3f} to {reward[last]:.3f}: {advice}"
        )
    if point.is_helpful:
        dip = "" if validated == last else f", but it dips after {validated}, up to which the search is validated"
        return (
            f"accuracy rises from {first_accuracy} to {peak_accuracy} at {peak} rounds and does not fall beyond "
            f"chance up to {last}{dip}"
        )
    judgment = "accuracy does not rise" if point.excludes_rise else "too few problems to tell if accuracy rises"
    rise = format_interval(point.rise_to_peak.to_dict(), "+.3f")
    return (
        f"{judgment}: {first_accuracy} at first, {last_accuracy} after {last} rounds, on {accuracy[0].num_problems} "
        f"problems (peak − first: {rise}); no search is validated by this evidence"
    )


def warn_past_limits(
    reward: Reward, config: SearchConfig | None, num_samples: int = 1, *, limits_rounds: bool = True
) -> None:
    """Warn by `logging` of a search beyond the limits that the reward's audit validated, or by an unhelpful gradient.

    Args:
        config: the search, None where there is none.
        num_samples: the largest N of best-of-N by this reward.
        limits_rounds: `max_rounds` limits the search. False: a budget that searches share ends it, and how many rounds
            it has is known later (see `search_in_batches`).
    """
    limits = reward.validated_limits
    num_samples = num_samples if config is None else max(num_samples, config.num_starts)
    warnings = [past_sample_limit(limits, num_samples)]
    if config is not None:
        warnings.append(past_limits(limits, config.max_rounds) if limits_rounds else None)
        if limits is not None and config.candidate_min_p == 0 and isinstance(config.select, RewardSelection):
            warnings.append(
                "candidate_min_p 0 lets the search find unlikely text that misleads the reward: set 0.02, the "
                "default, or select weighted_vote"
            )
        solver = config.solver
        if reward.gradient_unhelpful and isinstance(solver, MirrorSolver) and solver.gradient_at is None:
            warnings.append(
                f"the audit found no gradient of this reward that helps, and the search follows the one at "
                f"{reward.gradient_at}: use solver none, or set solver.gradient_at"
            )
    for warning in warnings:
        if warning is not None:
            logger.warning("%s", warning)
