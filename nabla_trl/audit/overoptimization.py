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

from nabla_trl.audit.curves import Turn, turning
from nabla_trl.audit.ranking import Audit
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.limits import Trust, past_samples, past_trust
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import ReasonerConfig
from nabla_trl.search.loop import solve
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
    turn: Turn
    verdict: str


@dataclass(frozen=True)
class Pressure:
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
    errors: int
    trust: Trust
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pressure(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward,
    config: ReasonerConfig,
    checker: AnswerChecker,
    best_of_n: Audit,
    seeds: Sequence[int] = (0,),
) -> Pressure:
    """Run a search of `config.rounds` rounds, with and without its gradient, and grade it as it goes on.

    Other limits of the configuration (patience, rollouts, FLOPs) are taken off.

    Args:
        best_of_n: the audit of the same reward by best-of-N, for the samples that it may be trusted with.

    Raises:
        ValueError: no limit of rounds, no seeds, no gold answers, or every search failed.
    """
    if config.rounds < 1:
        raise ValueError("the pressure audit needs a limit of rounds, at least 1")
    graded = [problem for problem in problems if problem.answer]
    if not graded or not seeds:
        raise ValueError("the pressure audit needs problems with a gold answer, and at least one seed")
    config = replace(config, patience=0, rollouts=0, flops=0.0)
    curves, errors = {}, 0
    for name, one in {config.method: config, "control": config.control()}.items():
        runs = [solve(graded, policy=policy, reward=reward, config=one, seed=seed) for seed in seeds]
        rows = [list(row) for row in zip(*runs, strict=True)]
        curves[name] = search_curve(rows, policy, checker, config.rounds)
        errors += sum(trace.error is not None for row in rows for trace in row)
    own = curves[config.method]
    trust = Trust(samples=best_of_n.trusted_samples, rounds=own.turn.trusted)
    return Pressure(len(graded), tuple(seeds), curves, errors, trust, own.verdict)


def search_curve(rows: Sequence[Sequence[Trace]], policy: Policy, checker: AnswerChecker, rounds: int) -> SearchCurve:
    """The curve of finished searches.

    Args:
        rows: per problem its traces by seed. A trace with an error is wrong at every budget and has no reward.
        rounds: the largest budget; the others are 0, 1, 2, 4, …

    Raises:
        ValueError: every trace has an error.
    """
    failed = [trace.error for row in rows for trace in row if trace.error is not None]
    if len(failed) == sum(map(len, rows)):
        raise ValueError(f"every search of the pressure audit failed, the first because {failed[0]}")
    budgets = round_grid(rounds)
    states = [[incumbents_at(trace, budgets) for trace in row] for row in rows]
    right = _graded(rows, states, policy, checker)
    rewards = np.array(
        [
            [[math.nan if trace.error else value for _, value in state] for trace, state in zip(*pair, strict=True)]
            for pair in zip(rows, states, strict=True)
        ]
    )
    accuracy = {budget: mean_interval(right[:, :, index]) for index, budget in enumerate(budgets)}
    reward = {budget: mean_interval(rewards[:, :, index]).value for index, budget in enumerate(budgets)}
    turn = turning({budget: right[:, :, index].mean(1) for index, budget in enumerate(budgets)})
    return SearchCurve(accuracy, reward, turn, verdict(accuracy, reward, turn))


def round_grid(rounds: int) -> list[int]:
    """0, 1, 2, 4, … and `rounds` itself."""
    return sorted({0, rounds, *(2**power for power in range(rounds.bit_length()))})


def incumbents_at(trace: Trace, budgets: Sequence[int]) -> list[tuple[list[int], float]]:
    """Response ids and reward of the incumbent after each number of rounds; a search that ended keeps its last."""
    states = trace.incumbents()
    accepted = [revision.round for revision in trace.revisions if revision.accepted]
    return [states[bisect_left(accepted, budget)] for budget in budgets]  # rounds count from 0


def _graded(
    rows: Sequence[Sequence[Trace]],
    states: Sequence[Sequence[Sequence[tuple[list[int], float]]]],
    policy: Policy,
    checker: AnswerChecker,
) -> np.ndarray:
    """[P, seeds, budgets] 1 where the incumbent's answer is right; each distinct response is read once."""
    answers: dict[tuple[int, ...], str | None] = {}
    pairs = []
    for row, traces in zip(states, rows, strict=True):
        for state, trace in zip(row, traces, strict=True):
            for ids, _ in state:
                if tuple(ids) not in answers:
                    answers[tuple(ids)] = extract_answer(policy.said(ids))
                pairs.append((None if trace.error else answers[tuple(ids)], trace.judge))
    right = [verdict.right for verdict in checker.check(pairs)]
    return np.array(right, dtype=np.float64).reshape(len(rows), len(rows[0]), -1)


def verdict(accuracy: dict[int, Interval], reward: dict[int, float], turn: Turn) -> str:
    """A sentence on how far a search may go: it turns, it helps, or it does neither."""
    last = max(accuracy)
    start, top, end = (f"{accuracy[rounds].value:.3f}" for rounds in (0, turn.peak, last))
    if turn.turns:
        trusted = f"the search may be trusted up to {turn.trusted} rounds" if turn.helps else "it helps at no budget"
        return (
            f"accuracy falls from {top} at {turn.peak} rounds to {end} at {last} while the reward goes from "
            f"{reward[turn.peak]:.3f} to {reward[last]:.3f}: {trusted}"
        )
    if turn.helps:
        dip = "" if turn.trusted == last else f", but it dips after {turn.trusted}, up to which it may be trusted"
        return f"accuracy rises from {start} to {top} at {turn.peak} rounds and does not turn up to {last}{dip}"
    return (
        f"accuracy does not rise measurably: {start} at first, {end} after {last} rounds, on {accuracy[0].problems} "
        "problems; no search is to be trusted on this evidence"
    )


def warn_past_trust(reward: Reward, config: ReasonerConfig | None, samples: int = 1) -> None:
    """Say on stderr where a reward is followed further than its audit trusts it, or by a gradient that misleads.

    Args:
        config: the search; None: there is none.
        samples: the largest N of best-of-N by this reward.
    """
    samples = samples if config is None else max(samples, config.starts)
    rounds = None if config is None else past_trust(reward.trust, config.rounds)
    for warning in (past_samples(reward.trust, samples), rounds):
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr)
    if config is not None and reward.misled and config.solver == "mirror" and config.point is None:
        print(
            f"warning: the audit found no gradient of this reward that helps, and the search follows the one at "
            f"{reward.point}: use solver none, or name a point",
            file=sys.stderr,
        )
