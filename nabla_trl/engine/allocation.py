"""One budget over many problems: which of them get more responses, or more rounds of a search.

A uniform split draws the same number of responses to each problem. Here a pilot of a few responses per problem comes
first. Each further response then goes to a problem whose answer it is expected to change most per FLOP, until the
total is spent. Damani et al. (arXiv 2410.04707) allocate by marginal gains too. They train a predictor of the gains.
Here the gains follow from the responses that were drawn, so nothing is trained.

With a reward, the gain of one more response is the expected rise of tanh(r/2β) from the highest reward of the problem
(`estimate_reward_gains`). The next reward of a problem with n responses is a new draw from the rewards of all problems
with probability 1/(n + 1), and one of its own n rewards otherwise (a Dirichlet process). Own rewards raise no maximum.
The bounded scale keeps a problem of very low rewards from taking all. The gains of votes are in
`nabla_trl.baselines.allocation`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

PILOT_RESPONSES = 2
MAX_ALLOCATION_RATIO = 4  # a problem gets at most this many times the responses of a uniform split
ROUND_SHARE = 8  # one in so many problems gets a response before gains are estimated again
NUM_QUANTILES = 64  # of the rewards of all problems


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
