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

The search (`run_search_with_shared_budget`) spends rounds instead of responses, by the same gain: a round goes to a
problem whose highest reward is low among those of all problems. A chain that no longer rises makes way for a new one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np

from nabla_trl.baselines.config import MAX_ALLOCATION_RATIO, PILOT_RESPONSES
from nabla_trl.baselines.sampling import PoolEntry, ResponsePool, begin_entry, draw_responses
from nabla_trl.engine.engine import Engine
from nabla_trl.engine.scheduler import check_distinct_ids
from nabla_trl.grading.equivalence import normalize_answer
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import Search, check_gradient
from nabla_trl.search.options import GreedyAcceptance
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

ROUND_SHARE = 8  # one in so many problems gets a response before gains are estimated again
HORIZON = 16  # votes that are looked ahead
DEFAULT_PATIENCE = 4  # rounds without an accepted proposal, before a search with a shared budget begins a new chain
NUM_QUANTILES = 64  # of the rewards of all problems

# The problems with their responses so far -> the expected gain of one more response to each of them [problems].
EstimateGains = Callable[[Sequence[PoolEntry]], np.ndarray]


def allocate(
    draw: Callable[[np.ndarray], None],
    count: Callable[[], tuple[np.ndarray, np.ndarray]],
    estimate_gains: Callable[[], np.ndarray],
    *,
    max_flops: float,
    pilot: int = PILOT_RESPONSES,
) -> None:
    """Draw responses to problems until a total of FLOPs is spent, or until no problem gains from another one.

    Args:
        draw: draws so many more responses to each of the problems. A problem that cannot be run gets none.
        count: returns the responses so far [problems] and the FLOPs so far [problems].
        estimate_gains: returns the expected gain of one more response to each of them [problems].
        max_flops: total FLOPs of all problems.
        pilot: responses to each problem that come first, or fewer where they would cost more than half of the total.
    """
    prompt_flops = count()[1]
    draw(np.ones(len(prompt_flops), dtype=int))
    counts, flops = count()
    if not (flops > prompt_flops).any():
        return
    num_uniform = max(1, round((max_flops - prompt_flops.sum()) / (flops - prompt_flops).sum()))
    num_pilot = max(1, min(pilot, num_uniform // 2))
    draw(np.full(len(counts), num_pilot - 1))
    round_size = math.ceil((counts > 0).sum() / ROUND_SHARE)
    while True:
        counts, flops = count()
        costs = np.where(counts > 0, np.maximum(1.0, (flops - prompt_flops) / np.maximum(counts, 1)), math.inf)
        gains = np.where((counts > 0) & (counts < MAX_ALLOCATION_RATIO * num_uniform), estimate_gains(), 0.0)
        order = np.lexsort((counts, -gains / costs))[:round_size]  # of equal gains, those with fewer responses first
        order = order[gains[order] > 0]
        chosen = order[np.cumsum(costs[order]) <= max_flops - flops.sum()]
        if not len(chosen):
            return
        more = np.zeros(len(counts), dtype=int)
        more[chosen] = 1
        draw(more)


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


# --- rewards ------------------------------------------------------------------------------------------


def estimate_reward_gains(rewards: Sequence[Sequence[float]], beta: float) -> np.ndarray:
    """Return per problem by how much one more response is expected to raise tanh of the highest reward.

    Args:
        rewards: of the responses so far, for each problem. A problem with a NaN or without rewards gains nothing.
        beta: differences of rewards count in units of 2β.
    """
    finite = [reward for of_problem in rewards for reward in of_problem if math.isfinite(reward)]
    if not finite:
        return np.zeros(len(rewards))
    quantiles = np.quantile(finite, (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES, method="inverted_cdf")
    highest = np.array([_get_highest(of_problem) for of_problem in rewards])
    rises = np.tanh(np.maximum(quantiles - highest[:, None], 0.0) / (2 * beta)).mean(axis=1)
    return rises / (np.array([len(of_problem) for of_problem in rewards]) + 1)


def _get_highest(rewards: Sequence[float]) -> float:
    """Return the highest reward, infinite where a reward is NaN: the problem has failed, and more would not help."""
    return math.inf if any(map(math.isnan, rewards)) else max(rewards, default=math.inf)


def build_gain_estimator(uses_reward: bool, beta: float) -> EstimateGains:
    """Return the gains of best-of-N and weighted best-of-N, or those of a vote.

    Args:
        beta: as in `estimate_reward_gains`.
    """
    if not uses_reward:
        return estimate_vote_gains
    return lambda entries: estimate_reward_gains([[one.reward for one in entry.responses] for entry in entries], beta)


# --- the search ---------------------------------------------------------------------------------------


def run_search_with_shared_budget(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    max_flops: float,
    seed: int = 0,
    pilot: int = PILOT_RESPONSES,
) -> list[Trace]:
    """Return one trace per problem. The searches share one budget, from which rounds go where the reward may rise.

    A chain ends after `config.patience` rounds without an accepted proposal, or `DEFAULT_PATIENCE` of them, and the
    next round begins a new one. With Metropolis acceptance it goes on instead.

    Args:
        max_flops: total FLOPs of all problems. First responses of a problem stay within an even share of them.
        pilot: the first response and the rounds that each problem gets at least, together.

    Raises:
        ValueError: two problems have the same id, the solver needs a gradient and the reward is a function, or a
            configuration that cannot have a budget of FLOPs.
    """
    check_distinct_ids(problems)
    check_gradient(reward, config)
    config = make_shared_budget_config(config, max_flops)
    engine = Engine(policy, reward, num_slots=config.batch_size)
    share = max_flops / max(1, len(problems))  # first responses are drawn before any search is known to need more
    searches = [Search(problem, engine, config, seed, start_flops=share) for problem in problems]
    by_id = {search.problem.id: search for search in searches}
    num_rounds, has_ended = np.zeros(len(searches), dtype=int), np.zeros(len(searches), dtype=bool)

    def draw(counts: np.ndarray) -> None:
        for round_number in range(counts.max(initial=0)):
            chosen = np.flatnonzero((counts > round_number) & ~has_ended)
            goes_on = engine.run_problems(
                [problems[number] for number in chosen],
                lambda problem: by_id[problem.id].advance(),
                max_concurrent=config.batch_size,
            )
            num_rounds[chosen] += np.array(goes_on, dtype=bool)
            has_ended[chosen] = ~np.array(goes_on, dtype=bool)

    def count() -> tuple[np.ndarray, np.ndarray]:
        return num_rounds.copy(), np.array([search.count_flops() for search in searches])

    def estimate_gains() -> np.ndarray:
        gains = estimate_reward_gains([list_rewards(search) for search in searches], 1 / config.reward_weight)
        return np.where(has_ended, 0.0, gains)

    allocate(draw, count, estimate_gains, max_flops=max_flops, pilot=pilot)
    for chain in (chain for search in searches for chain in search.chains if not chain.stop_reason):
        chain.stop_reason = "max_flops"
    return [search.build_trace() for search in searches]


def make_shared_budget_config(config: SearchConfig, max_flops: float) -> SearchConfig:
    """Return the configuration of searches that share a budget of FLOPs, which alone ends them.

    Raises:
        ValueError: a configuration that cannot have a budget of FLOPs.
    """
    if isinstance(config.acceptance, GreedyAcceptance):
        config = replace(config, patience=config.patience or DEFAULT_PATIENCE)
    return replace(config, max_flops=max_flops, max_rounds=0, max_rollouts=0, restarts=True)


def list_rewards(search: Search) -> list[float]:
    """Return the rewards of the first responses of a search's chains, and of all its proposals."""
    return [
        reward
        for chain in search.chains
        for reward in (chain.initial.reward, *(revision.reward_after for revision in chain.revisions))
    ]
