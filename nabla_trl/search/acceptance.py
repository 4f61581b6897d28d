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

from nabla_trl.search.state import State


def best(incumbent: State, proposals: Sequence[State]) -> int | None:
    """Index of the proposal with the highest reward, the first of equals, if that is above the incumbent's."""
    index = max(range(len(proposals)), key=lambda at: proposals[at].reward)
    return index if proposals[index].reward > incumbent.reward else None


def log_ratio(before: State, after: State, position: int, *, beta: float, chosen: tuple[Tensor, Tensor]) -> float:
    """The logarithm of the Metropolis–Hastings ratio of a move; −inf: never.

    Args:
        before, after: two responses that first differ at `position`.
        chosen: [K] of each, the log-probability that it is left by putting a candidate at that position (for global
            branches: of choosing position and candidate).
    """
    if not math.isfinite(after.reward):
        return -math.inf
    old, new = before.response[position], after.response[position]
    there, back = _at(before, position, new), _at(after, position, old)
    if there is None or back is None:
        return -math.inf
    forward, backward = float(chosen[0][there]), float(chosen[1][back])
    if backward == -math.inf:
        return -math.inf
    likelier = float(before.logp[position][there]) - float(before.logp[position, before.choice()[position]])
    return (
        (after.reward - before.reward) / beta
        + likelier
        + _tilted(after, position)
        - _tilted(before, position)
        + (backward - forward)
    )


def redraw_log_ratio(before: State, after: State, *, beta: float, chances: tuple[float, float]) -> float:
    """The logarithm of the ratio for a response drawn anew; −inf where the sampler could not draw the one before.

    Args:
        chances: log-probability, before and after, that a redraw is tried (`propose.redraw_logp`).
    """
    if not math.isfinite(after.reward):
        return -math.inf
    tilted = _tilted(after, -1) - _tilted(before, -1)
    return (after.reward - before.reward) / beta + tilted + chances[1] - chances[0]


def swap_log_ratio(cold: tuple[float, float], hot: tuple[float, float]) -> float:
    """The logarithm of the ratio for exchanging the states of two tempered chains, given (β, reward) of each.

    π counts alike in both targets, so that only the rewards decide (Geyer 1991).
    """
    return (1 / cold[0] - 1 / hot[0]) * (hot[1] - cold[1])


def _at(state: State, position: int, token: int) -> int | None:
    """The column of a token among the candidates at a position."""
    columns = (state.candidates[position] == token).nonzero()
    return int(columns[0]) if len(columns) else None


def _tilted(state: State, position: int) -> float:
    """log [π/q] of the suffix after a position; after −1: of the whole response."""
    if state.tilt is None:
        return 0.0
    return float(state.tilt[position + 1 :].double().gather(1, state.choice()[position + 1 :, None]).sum())
