"""One budget of responses over many problems (`nabla_trl.engine.allocation` has the rule).

The gain of one more response, by how the answer is chosen:

- A vote (`estimate_vote_gains`): the expected rise of the winner's probability. The probabilities of the leader, of
  the runner-up and of all other answers have a Dirichlet posterior under a uniform prior. A single vote may be unable
  to change the winner, so the gain of m votes is divided by m, for the best m up to `HORIZON` (the knowledge gradient
  of several measurements, Frazier and Powell 2010).
- Best-of-N: the expected rise of the highest reward (`estimate_reward_gains`).
- Weighted best-of-N: as best-of-N. The answer with the largest weight is chosen in the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np

from nabla_trl.baselines.sampling import PoolEntry, ResponsePool, begin_entry, draw_responses
from nabla_trl.engine.allocation import PILOT_RESPONSES, allocate, estimate_reward_gains
from nabla_trl.engine.engine import Engine
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem

HORIZON = 16  # votes that are looked ahead

# The problems with their responses so far -> the expected gain of one more response to each of them [problems].
EstimateGains = Callable[[Sequence[PoolEntry]], np.ndarray]


# --- responses from the beginning ---------------------------------------------------------------------


def count_flops(entry: PoolEntry, with_reward: bool) -> float:
    """Return the FLOPs that a problem has cost so far."""
    prompt = entry.policy_prefill_cost.flops + (entry.reward_prefill_cost.flops if with_reward else 0.0)
    return prompt + sum(
        response.generation_cost.flops + (response.scoring_cost.flops if with_reward else 0.0)
        for response in entry.responses
    )


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
    """Draw a pool whose problems have as many responses as they gain from (`allocate`).

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
    run = partial(engine.run_problems, max_concurrent=2 * batch_size)
    entries = run(problems, lambda problem: begin_entry(problem, engine, sampling))

    def draw(counts: np.ndarray) -> None:
        pairs = zip(entries, counts, strict=True)
        missing = {entry.problem.id: (entry, int(count)) for entry, count in pairs if count and entry.error is None}
        chosen = [entry.problem for entry, _ in missing.values()]
        run(chosen, lambda problem: draw_responses(*missing[problem.id], engine, sampling, seed))

    def count() -> tuple[np.ndarray, np.ndarray]:
        flops = [count_flops(entry, with_reward=reward is not None) for entry in entries]
        return np.array([len(entry.responses) for entry in entries]), np.array(flops)

    allocate(draw, count, lambda: estimate_gains(entries), max_flops=max_flops, pilot=pilot)
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


def build_gain_estimator(uses_reward: bool, beta: float) -> EstimateGains:
    """Return the gains of best-of-N and weighted best-of-N, or those of a vote.

    Args:
        beta: as in `estimate_reward_gains`.
    """
    if not uses_reward:
        return estimate_vote_gains
    return lambda entries: estimate_reward_gains([[one.reward for one in entry.responses] for entry in entries], beta)
