"""Which proposals are kept: the best if it is strictly better (the paper), or Metropolis–Hastings.

A Metropolis chain samples π*(y) ∝ π(y|x)·exp(r(x, y)/β) itself, the optimum of KL-regularised policy alignment; π is
the policy over the tokens that it may draw. A move puts token v in place of y_t and draws a suffix anew, so t is the
first place where y and y' differ, and there is one way from y to y' and one way back (Hastings 1970):

    min(1, exp((r' − r)/β) · π(v|y_<t)/π(y_t|y_<t) · [π/q](suffix')/[π/q](suffix) · s(t, y_t|y')/s(t, v|y))

with s the probability that the branch is chosen, and q the sampler of suffixes. Where there is no way back, it stays.
With fewer candidates than the vocabulary, branches never leave a first token from outside the candidates. So now and
then (`redraw`) the whole response is drawn anew (an independence proposal, Tierney 1994), which is accepted with

    min(1, exp((r' − r)/β) · [π/q](y')/[π/q](y) · c(y')/c(y))

with c the chance that it is tried: `redraw`, or 1 where no branch may be proposed. So a chain samples π* among all the
responses that the sampler can draw; with `redraw` 0, among those that its branches reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from nabla_trl.search.state import ScoredResponse


def choose_best_proposal(incumbent: ScoredResponse, proposals: Sequence[ScoredResponse]) -> int | None:
    """Index of the proposal with the highest reward, the first of equals, if that is above the incumbent's."""
    index = max(range(len(proposals)), key=lambda at: proposals[at].reward)
    return index if proposals[index].reward > incumbent.reward else None


def compute_branch_log_ratio(
    before: ScoredResponse, after: ScoredResponse, position: int, *, beta: float, branch_logp: tuple[Tensor, Tensor]
) -> float:
    """The logarithm of the Metropolis–Hastings ratio of a move; −inf: never.

    Args:
        before, after: two responses that first differ at `position`.
        chosen: [K] of each, the log-probability that it is left by putting a candidate at that position (for global
            branches: of choosing position and candidate).
    """
    if not math.isfinite(after.reward):
        return -math.inf
    old, new = before.response_ids[position], after.response_ids[position]
    there, back = _find_candidate_column(before, position, new), _find_candidate_column(after, position, old)
    if there is None or back is None:
        return -math.inf
    forward, backward = float(branch_logp[0][there]), float(branch_logp[1][back])
    if backward == -math.inf:
        return -math.inf
    likelier = float(before.logp[position][there]) - float(
        before.logp[position, before.find_response_columns()[position]]
    )
    return (
        (after.reward - before.reward) / beta
        + likelier
        + _sum_log_importance_weights(after, position)
        - _sum_log_importance_weights(before, position)
        + (backward - forward)
    )


def compute_independence_log_ratio(
    before: ScoredResponse, after: ScoredResponse, *, beta: float, attempt_logp: tuple[float, float]
) -> float:
    """The logarithm of the ratio for a response drawn anew; −inf where the sampler could not draw the one before.

    Args:
        chances: log-probability, before and after, that a redraw is tried (`propose.redraw_logp`).
    """
    if not math.isfinite(after.reward):
        return -math.inf
    tilted = _sum_log_importance_weights(after, -1) - _sum_log_importance_weights(before, -1)
    return (after.reward - before.reward) / beta + tilted + attempt_logp[1] - attempt_logp[0]


def compute_swap_log_ratio(cold: tuple[float, float], hot: tuple[float, float]) -> float:
    """The logarithm of the ratio for exchanging the states of two tempered chains, given (β, reward) of each.

    π counts alike in both targets, so that only the rewards decide (Geyer 1991).
    """
    return (1 / cold[0] - 1 / hot[0]) * (hot[1] - cold[1])


def _find_candidate_column(response: ScoredResponse, position: int, token: int) -> int | None:
    """The column of a token among the candidates at a position."""
    columns = (response.candidates[position] == token).nonzero()
    return int(columns[0]) if len(columns) else None


def _sum_log_importance_weights(response: ScoredResponse, position: int) -> float:
    """log [π/q] of the suffix after a position; after −1: of the whole response."""
    if response.log_importance_weight is None:
        return 0.0
    return float(
        response.log_importance_weight[position + 1 :]
        .double()
        .gather(1, response.find_response_columns()[position + 1 :, None])
        .sum()
    )
