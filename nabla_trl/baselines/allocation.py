"""One budget over many problems: which of them get more responses.

A uniform split draws the same number of responses to each problem. Here a pilot of a few responses per problem comes
first. Each further response then goes to a problem whose answer it is expected to change most per FLOP, until the
total is spent. Damani et al. (arXiv 2410.04707) allocate by marginal gains too. They train a predictor of the gains.
Here the gains follow from the responses that were drawn, so nothing is trained.

The gain of one more response, by how the answer is chosen:

- A vote (`estimate_vote_gains`): the expected rise of the winner's probability. The probabilities of the leader, of
  the runner-up and of all other answers have a Dirichlet posterior under a uniform prior. A single vote may be unable
  to change the winner, so the gain of m votes is divided by m, for the best m up to `HORIZON` (the knowledge gradient
  of several measurements, Frazier and Powell 2010).
- Best-of-N (`estimate_reward_gains`): the expected rise of tanh(r/2β) from the highest reward of the problem. The next
  reward of a problem with n responses is a new draw from the rewards of all problems with probability 1/(n + 1), and
  one of its own n rewards otherwise (a Dirichlet process). Own rewards raise no maximum. The bounded scale keeps a
  problem of very low rewards from taking all.
- Weighted best-of-N: as best-of-N. The answer with the largest weight is chosen in the end.

The search (`run_search_with_shared_budget`) spends rounds instead of responses. All problems are searched side by side
within one budget. A search ends once no proposal was accepted for some rounds, and what it leaves goes to those whose
reward still rises.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from nabla_trl.baselines.config import MAX_ALLOCATION_RATIO, PILOT_RESPONSES
from nabla_trl.baselines.sampling import PoolEntry, ResponsePool, begin_entry, draw_responses
from nabla_trl.engine.engine import Engine
from nabla_trl.engine.scheduler import Task
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import Search
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

ROUND_SHARE = 8  # one in so many problems gets a response before gains are estimated again
HORIZON = 16  # votes that are looked ahead
DEFAULT_PATIENCE = 4  # rounds without an accepted proposal, of searches that share a budget
NUM_QUANTILES = 64  # of the rewards of all problems

# The problems with their responses so far -> the expected gain of one more response to each of them [problems].
EstimateGains = Callable[[Sequence[PoolEntry]], np.ndarray]
# Draws so many more responses to each of the problems.
DrawResponses = Callable[[Sequence[int]], None]


def allocate_responses(
    entries: Sequence[PoolEntry],
    draw: DrawResponses,
    estimate_gains: EstimateGains,
    *,
    max_flops: float,
    with_reward: bool,
    pilot: int = PILOT_RESPONSES,
) -> None:
    """Draw responses to problems until a total of FLOPs is spent, or until no problem gains from another one.

    Args:
        entries: the problems, without responses. `draw` adds responses to them.
        max_flops: total FLOPs of all problems.
        with_reward: the reward's FLOPs count too.
        pilot: responses to each problem that come first, or fewer where they would cost more than half of the total.
    """
    is_open = np.array([entry.error is None for entry in entries])
    if not is_open.any():
        return

    def count_spent() -> float:
        return sum(count_flops(entry, with_reward) for entry in entries)

    prompt_flops = count_spent()
    draw(is_open.astype(int).tolist())
    num_uniform = max(1, round((max_flops - prompt_flops) / (count_spent() - prompt_flops)))
    num_pilot = max(1, min(pilot, num_uniform // 2))
    draw(((num_pilot - 1) * is_open).tolist())
    round_size = math.ceil(is_open.sum() / ROUND_SHARE)
    while True:
        counts = np.array([len(entry.responses) for entry in entries])
        costs = np.array([estimate_response_flops(entry, with_reward) for entry in entries])
        gains = np.where(is_open & (counts < MAX_ALLOCATION_RATIO * num_uniform), estimate_gains(entries), 0.0)
        order = np.lexsort((counts, -gains / costs))[:round_size]  # of equal gains, those with fewer responses first
        order = order[gains[order] > 0]
        chosen = order[np.cumsum(costs[order]) <= max_flops - count_spent()]
        if not len(chosen):
            return
        more = np.zeros(len(entries), dtype=int)
        more[chosen] = 1
        draw(more.tolist())


def count_flops(entry: PoolEntry, with_reward: bool) -> float:
    """Return the FLOPs that a problem has cost so far."""
    prompt = entry.policy_prefill_cost.flops + (entry.reward_prefill_cost.flops if with_reward else 0.0)
    return prompt + sum(
        response.generation_cost.flops + (response.scoring_cost.flops if with_reward else 0.0)
        for response in entry.responses
    )


def estimate_response_flops(entry: PoolEntry, with_reward: bool) -> float:
    """Return the mean FLOPs of the responses of a problem, which the next one is expected to cost."""
    if not entry.responses:
        return math.inf
    costs = [
        response.generation_cost.flops + (response.scoring_cost.flops if with_reward else 0.0)
        for response in entry.responses
    ]
    return max(1.0, sum(costs) / len(costs))


def draw_allocated_pool(
    problems: Sequence[Problem],
    estimate_gains: EstimateGains,
    *,
    max_flops: float,
    policy: Policy,
    reward: Reward | None,
    sampling: Sampling,
    seed: int = 0,
    batch_size: int = 256,
    pilot: int = PILOT_RESPONSES,
) -> ResponsePool:
    """Draw a pool whose problems have as many responses as they gain from (`allocate_responses`).

    Response i of a problem is that of any other pool with this seed. How many there are depends on all problems. The
    caches of all prompts are kept until the end.

    Args:
        max_flops: total FLOPs of all problems.
        reward: scores the responses. None: rewards are NaN.
        batch_size: responses drawn together.

    Raises:
        ValueError: two problems have the same id.
    """
    engine = Engine(policy, reward, num_slots=batch_size)

    def run(tasks: Iterable[Task]) -> dict[str, Any]:
        return {task.key: task.result for task in engine.run(tasks, max_concurrent=2 * batch_size)}

    begun = run(Task(problem.id, begin_entry(problem, engine, sampling)) for problem in problems)
    entries = [begun[problem.id] for problem in problems]

    def draw(counts: Sequence[int]) -> None:
        run(
            Task(entry.problem.id, draw_responses(entry, count, engine, sampling, seed))
            for entry, count in zip(entries, counts, strict=True)
            if count
        )

    allocate_responses(entries, draw, estimate_gains, max_flops=max_flops, with_reward=reward is not None, pilot=pilot)
    entries = [replace(entry, policy_cache=None, score_caches=[]) for entry in entries]
    return ResponsePool(policy, "none" if reward is None else reward.name, seed, f"{sampling}", entries)


# --- votes --------------------------------------------------------------------------------------------


def estimate_vote_gains(entries: Sequence[PoolEntry]) -> np.ndarray:
    """Return per problem by how much one more vote is expected to raise the probability of the winning answer."""
    gains = []
    for entry in entries:
        votes = Counter(normalize_answer(one.answer) for one in entry.responses if one.answer is not None)
        first, second = [*(count for _, count in votes.most_common(2)), 0, 0][:2]
        gains.append(compute_vote_gain(first, second, len(entry.responses) - first - second))
    return np.array(gains)


@cache
def compute_vote_gain(first: int, second: int, others: int) -> float:
    """Return the largest gain per vote of 1 … `HORIZON` more votes.

    The gain of m votes is E[(v2 − v1)₊] / (n + m + 3), where v1 and v2 are the votes of leader and runner-up after
    them: the posterior probabilities of the answers are (votes + 1) / (n + m + 3).
    """
    total = first + second + others + 3
    best = 0.0
    for num_votes in range(1, HORIZON + 1):
        gain = 0.0
        for num_top in range(first - second + 1, num_votes + 1):  # fewer cannot change the leader
            chance = compute_beta_binomial(num_top, num_votes, first + second + 2, others + 1)
            for for_second in range((num_top + first - second) // 2 + 1, num_top + 1):
                lead = second - first + 2 * for_second - num_top
                gain += chance * lead * compute_beta_binomial(for_second, num_top, second + 1, first + 1)
        best = max(best, gain / (total + num_votes) / num_votes)
    return best


@cache
def compute_beta_binomial(successes: int, trials: int, a: int, b: int) -> float:
    """Return P(successes) of so many trials whose chance is Beta(a, b), for whole numbers a and b."""
    log_beta = [
        math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)
        for x, y in ((successes + a, trials - successes + b), (a, b))
    ]
    return math.comb(trials, successes) * math.exp(log_beta[0] - log_beta[1])


# --- rewards ------------------------------------------------------------------------------------------


def estimate_reward_gains(entries: Sequence[PoolEntry], beta: float) -> np.ndarray:
    """Return per problem by how much one more response is expected to raise tanh of the highest reward.

    Args:
        beta: differences of rewards count in units of 2β.
    """
    rewards = np.array([response.reward for entry in entries for response in entry.responses])
    rewards = rewards[np.isfinite(rewards)]
    if not len(rewards):
        return np.zeros(len(entries))
    quantiles = np.quantile(rewards, (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES, method="inverted_cdf")
    highest = np.array([_get_highest_reward(entry) for entry in entries])
    rises = np.tanh(np.maximum(quantiles - highest[:, None], 0.0) / (2 * beta)).mean(axis=1)
    return rises / (np.array([len(entry.responses) for entry in entries]) + 1)


def _get_highest_reward(entry: PoolEntry) -> float:
    """Return the highest reward, infinite where a reward is NaN: the problem has failed, and more would not help."""
    rewards = [response.reward for response in entry.responses]
    return math.inf if any(map(math.isnan, rewards)) else max(rewards, default=math.inf)


def build_gain_estimator(uses_reward: bool, beta: float) -> EstimateGains:
    """Return the gains of best-of-N and weighted best-of-N, or those of a vote.

    Args:
        beta: as in `estimate_reward_gains`.
    """
    return (lambda entries: estimate_reward_gains(entries, beta)) if uses_reward else estimate_vote_gains


# --- the search ---------------------------------------------------------------------------------------


def run_search_with_shared_budget(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    max_flops: float,
    seed: int = 0,
) -> list[Trace]:
    """Return one trace per problem. All searches run side by side, and share one budget.

    A search ends after `config.patience` rounds without an accepted proposal, or `DEFAULT_PATIENCE` of them. It begins
    no second chain.

    Args:
        max_flops: total FLOPs of all problems. A round begins if it is expected to fit, as every round of the searches
            that are under way is.
    """
    config = replace(
        config,
        max_flops=max_flops / max(1, len(problems)),
        max_rounds=0,
        max_rollouts=0,
        patience=config.patience or DEFAULT_PATIENCE,
        restarts=False,
    )
    engine = Engine(policy, reward, num_slots=config.batch_size)
    budget = _SharedBudget(engine.flop_counter, max_flops)
    tasks = (Task(one.id, Search(one, engine, config, seed, budget.grant_round).run()) for one in problems)
    traces = {task.key: task.result for task in engine.run(tasks, max_concurrent=max(1, len(problems)))}
    return [traces[problem.id] for problem in problems]


class _SharedBudget:
    """A budget of FLOPs from which searches take their rounds."""

    def __init__(self, flop_counter: FlopCounter, max_flops: float):
        self.flop_counter, self.max_flops = flop_counter, max_flops
        self._spent_before: dict[str, float] = {}  # by problem, FLOPs before its round
        self._reserved: dict[str, float] = {}  # by problem, FLOPs that its round is expected to cost
        self._total_reserved = 0.0

    def grant_round(self, search: Search) -> None:
        """Let a search spend all that the others have not reserved. Called before each of its rounds, and at its end.

        A round is expected to cost what the last one did.
        """
        key = search.problem.id
        spent = search.count_flops()
        self._total_reserved -= self._reserved.pop(key, 0.0)
        unreserved = self.max_flops - self.flop_counter.total_flops - self._total_reserved
        search.config = replace(search.config, max_flops=max(1.0, spent + unreserved))
        if any(not chain.stop_reason for chain in search.chains):
            self._reserved[key] = spent - self._spent_before.get(key, 0.0)
            self._total_reserved += self._reserved[key]
        self._spent_before[key] = spent
