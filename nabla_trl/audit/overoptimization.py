"""The pressure audit: what becomes of accuracy and reward as a search goes on.

A search maximises the reward. Where the reward is no longer about being right, accuracy falls while the reward still
rises (Gao et al., arXiv 2210.10760): up to there the search may be trusted. `curves` has the rule.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from nabla_trl.audit.curves import OveroptimizationPoint, find_overoptimization
from nabla_trl.audit.ranking import RankingAudit
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.limits import ValidatedLimits, past_limits, past_sample_limit
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.options import MirrorSolver
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.statistics import Interval, mean_interval


@dataclass(frozen=True)
class SearchCurve:
    """One search as it goes on.

    Attributes:
        accuracy: rounds → accuracy of the incumbents, with its interval over problems.
        reward: rounds → their mean reward.
        turn: how the accuracy goes.
        verdict: a sentence.
    """

    accuracy: dict[int, Interval]
    reward: dict[int, float]
    overoptimization: OveroptimizationPoint
    conclusion: str


@dataclass(frozen=True)
class OveroptimizationAudit:
    """What the pressure audit found on P problems.

    Attributes:
        curves: "nabla" (the search as configured) and "control" (without the gradient), or "control" alone.
        errors: searches that failed; they count as wrong.
        trust: samples by the best-of-N audit, rounds by the search as configured.
        verdict: that of the search as configured.
    """

    problems: int
    seeds: tuple[int, ...]
    curves: dict[str, SearchCurve]
    failed_searches: int
    validated_limits: ValidatedLimits
    conclusion: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def audit_overoptimization(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    checker: AnswerChecker,
    ranking_audit: RankingAudit,
    seeds: Sequence[int] = (0,),
) -> OveroptimizationAudit:
    """Run a search of `config.rounds` rounds, with and without its gradient, and grade it as it goes on.

    Other limits of the configuration (patience, rollouts, FLOPs) are taken off.

    Args:
        best_of_n: the audit of the same reward by best-of-N, for the samples that it may be trusted with.

    Raises:
        ValueError: no limit of rounds, no seeds, no gold answers, or every search failed.
    """
    if config.max_rounds < 1:
        raise ValueError("the pressure audit needs a limit of rounds, at least 1")
    graded = [problem for problem in problems if problem.answer]
    if not graded or not seeds:
        raise ValueError("the pressure audit needs problems with a gold answer, and at least one seed")
    config = replace(config, patience=0, max_rollouts=0, max_flops=0.0)
    curves, errors = {}, 0
    for name, one in {config.method: config, "control": config.with_no_gradient()}.items():
        runs = [run_search(graded, policy=policy, reward=reward, config=one, seed=seed) for seed in seeds]
        rows = [list(row) for row in zip(*runs, strict=True)]
        curves[name] = compute_search_curve(rows, policy, checker, config.max_rounds)
        errors += sum(trace.error is not None for row in rows for trace in row)
    own = curves[config.method]
    trust = ValidatedLimits(
        max_samples=ranking_audit.validated_samples, max_rounds=own.overoptimization.validated_budget
    )
    return OveroptimizationAudit(len(graded), tuple(seeds), curves, errors, trust, own.conclusion)


def compute_search_curve(
    traces_by_problem: Sequence[Sequence[Trace]], policy: Policy, checker: AnswerChecker, max_rounds: int
) -> SearchCurve:
    """The curve of finished searches.

    Args:
        rows: per problem its traces by seed. A trace with an error is wrong at every budget and has no reward.
        rounds: the largest budget; the others are 0, 1, 2, 4, …

    Raises:
        ValueError: every trace has an error.
    """
    failed = [trace.error for row in traces_by_problem for trace in row if trace.error is not None]
    if len(failed) == sum(map(len, traces_by_problem)):
        raise ValueError(f"every search of the pressure audit failed, the first because {failed[0]}")
    budgets = make_round_grid(max_rounds)
    states = [[select_incumbents(trace, budgets) for trace in row] for row in traces_by_problem]
    right = _grade_incumbents(traces_by_problem, states, policy, checker)
    rewards = np.array(
        [
            [[math.nan if trace.error else value for _, value in state] for trace, state in zip(*pair, strict=True)]
            for pair in zip(traces_by_problem, states, strict=True)
        ]
    )
    accuracy = {budget: mean_interval(right[:, :, index]) for index, budget in enumerate(budgets)}
    reward = {budget: mean_interval(rewards[:, :, index]).value for index, budget in enumerate(budgets)}
    turn = find_overoptimization({budget: right[:, :, index].mean(1) for index, budget in enumerate(budgets)})
    return SearchCurve(accuracy, reward, turn, conclude_overoptimization(accuracy, reward, turn))


def make_round_grid(max_rounds: int) -> list[int]:
    """0, 1, 2, 4, … and `rounds` itself."""
    return sorted({0, max_rounds, *(2**power for power in range(max_rounds.bit_length()))})


def select_incumbents(trace: Trace, round_counts: Sequence[int]) -> list[tuple[list[int], float]]:
    """Response ids and reward of the incumbent after each number of rounds; a search that ended keeps its last."""
    states = trace.list_incumbents()
    accepted = [revision.round for revision in trace.revisions if revision.accepted]
    return [states[bisect_left(accepted, budget)] for budget in round_counts]  # rounds count from 0


def _grade_incumbents(
    traces_by_problem: Sequence[Sequence[Trace]],
    states: Sequence[Sequence[Sequence[tuple[list[int], float]]]],
    policy: Policy,
    checker: AnswerChecker,
) -> np.ndarray:
    """[P, seeds, budgets] 1 where the incumbent's answer is right; each distinct response is read once."""
    answers: dict[tuple[int, ...], str | None] = {}
    pairs = []
    for row, traces in zip(states, traces_by_problem, strict=True):
        for state, trace in zip(row, traces, strict=True):
            for ids, _ in state:
                if tuple(ids) not in answers:
                    answers[tuple(ids)] = extract_answer(policy.decode_response(ids))
                pairs.append((None if trace.error else answers[tuple(ids)], trace.grading_reference))
    right = [verdict.is_correct for verdict in checker.check(pairs)]
    return np.array(right, dtype=np.float64).reshape(len(traces_by_problem), len(traces_by_problem[0]), -1)


def conclude_overoptimization(
    accuracy: dict[int, Interval], reward: dict[int, float], overoptimization: OveroptimizationPoint
) -> str:
    """A sentence on how far a search may go: it turns, it helps, or it does neither."""
    last = max(accuracy)
    start, top, end = (f"{accuracy[rounds].value:.3f}" for rounds in (0, overoptimization.peak_budget, last))
    if overoptimization.has_overoptimization:
        trusted = (
            f"the search may be trusted up to {overoptimization.validated_budget} rounds"
            if overoptimization.is_helpful
            else "it helps at no budget"
        )
        return (
            f"accuracy falls from {top} at {overoptimization.peak_budget} rounds to {end} at {last} while the reward goes from "
            f"{reward[overoptimization.peak_budget]:.3f} to {reward[last]:.3f}: {trusted}"
        )
    if overoptimization.is_helpful:
        dip = (
            ""
            if overoptimization.validated_budget == last
            else f", but it dips after {overoptimization.validated_budget}, up to which it may be trusted"
        )
        return f"accuracy rises from {start} to {top} at {overoptimization.peak_budget} rounds and does not turn up to {last}{dip}"
    return (
        f"accuracy does not rise measurably: {start} at first, {end} after {last} rounds, on {accuracy[0].num_problems} "
        "problems; no search is to be trusted on this evidence"
    )


def warn_past_limits(reward: Reward, config: SearchConfig | None, num_samples: int = 1) -> None:
    """Say on stderr where a reward is followed further than its audit trusts it, or by a gradient that misleads.

    Args:
        config: the search; None: there is none.
        samples: the largest N of best-of-N by this reward.
    """
    num_samples = num_samples if config is None else max(num_samples, config.num_starts)
    rounds = None if config is None else past_limits(reward.validated_limits, config.max_rounds)
    for warning in (past_sample_limit(reward.validated_limits, num_samples), rounds):
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr)
    solver = None if config is None else config.solver
    if reward.gradient_unhelpful and isinstance(solver, MirrorSolver) and solver.gradient_at is None:
        print(
            f"warning: the audit found no gradient of this reward that helps, and the search follows the one at "
            f"{reward.gradient_at}: use solver none, or set solver.gradient_at",
            file=sys.stderr,
        )
