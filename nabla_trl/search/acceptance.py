"""Acceptance of proposals: the best one if its reward is strictly higher (the paper), or Metropolis–Hastings.

A Metropolis chain samples from the optimum of KL-regularized policy alignment,

    π*(y) ∝ π(y|x)·exp(r(x, y)/β),

where π is the policy over the tokens that it may sample. It accepts a proposal y' from y with probability
min(1, π*(y')·Q(y|y') / (π*(y)·Q(y'|y))) (Hastings 1970). Let q be the sampler of suffixes and w = π/q their importance
weight, which is 1 if the sampler is the policy itself. There are two kinds of proposals.

A branch puts token v at position t with probability b(t, v|y), and samples the suffix after t. Position t is the first
where y and y' differ, so that exactly one branch leads from y to y' and one leads back, which puts y_t at t:

    log ratio = (r' − r)/β + log π(v|y_<t) − log π(y_t|y_<t) + log w(y'_>t) − log w(y_>t)
                + log b(t, y_t|y') − log b(t, v|y)

A branch never removes a first token that is not among the candidates of its position. So with probability c(y) the
proposal is a whole new response (independence proposal, Tierney 1994). c(y) is `independence_prob`, or 1 if y has no
branch:

    log ratio = (r' − r)/β + log w(y') − log w(y) + log c(y') − log c(y)

Together they sample from π* among all responses that the sampler can draw. With `independence_prob` 0, they sample
among those that branches reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from nabla_trl.search.state import ScoredResponse


def choose_best_proposal(incumbent: ScoredResponse, proposals: Sequence[ScoredResponse]) -> int | None:
    """Return the index of the first proposal with the highest reward, or None if it is not above the incumbent's."""
    index = max(range(len(proposals)), key=lambda row: proposals[row].reward)
    return index if proposals[index].reward > incumbent.reward else None


def compute_branch_log_ratio(
    before: ScoredResponse, after: ScoredResponse, position: int, *, beta: float, branch_logp: tuple[Tensor, Tensor]
) -> float:
    """Return the log ratio of Metropolis–Hastings for a branch, −inf if no branch leads back.

    Args:
        before, after: y and y', two responses that first differ at `position`.
        branch_logp: log b(position, ·|y) and log b(position, ·|y'), each [K].
    """
    if not math.isfinite(after.reward):
        return -math.inf
    new_column = _find_candidate_column(before, position, after.response_ids[position])
    old_column = _find_candidate_column(after, position, before.response_ids[position])
    if new_column is None or old_column is None:
        return -math.inf
    forward, backward = float(branch_logp[0][new_column]), float(branch_logp[1][old_column])
    if backward == -math.inf:
        return -math.inf
    logp, own_column = before.logp[position], before.find_response_columns()[position]
    return (
        (after.reward - before.reward) / beta
        + (float(logp[new_column]) - float(logp[own_column]))
        + _sum_log_importance_weights(after, position + 1)
        - _sum_log_importance_weights(before, position + 1)
        + (backward - forward)
    )


def compute_independence_log_ratio(
    before: ScoredResponse, after: ScoredResponse, *, beta: float, attempt_logp: tuple[float, float]
) -> float:
    """Return the log ratio of Metropolis–Hastings for a whole new response, −inf if the sampler cannot draw the old.

    Args:
        attempt_logp: log c(y) and log c(y') (see `proposals.compute_independence_logp`).
    """
    if not math.isfinite(after.reward):
        return -math.inf
    log_weights = _sum_log_importance_weights(after, 0) - _sum_log_importance_weights(before, 0)
    return (after.reward - before.reward) / beta + log_weights + attempt_logp[1] - attempt_logp[0]


def compute_swap_log_ratio(cold: tuple[float, float], hot: tuple[float, float]) -> float:
    """Return (1/β_cold − 1/β_hot)·(r_hot − r_cold), the log ratio for a swap of two tempered chains (Geyer 1991).

    π is the same in both targets, so that only the rewards count.

    Args:
        cold, hot: (β, reward) of each chain.
    """
    return (1 / cold[0] - 1 / hot[0]) * (hot[1] - cold[1])


def _find_candidate_column(response: ScoredResponse, position: int, token: int) -> int | None:
    """Return the column of a token among the candidates at a position."""
    columns = (response.candidates[position] == token).nonzero()
    return int(columns[0]) if len(columns) else None


def _sum_log_importance_weights(response: ScoredResponse, begin: int) -> float:
    """Return log w = Σ_t log π(y_t)/q(y_t) of the tokens from position `begin` on."""
    if response.log_importance_weight is None:
        return 0.0
    columns = response.find_response_columns()[begin:, None]
    return float(response.log_importance_weight[begin:].double().gather(1, columns).sum())
