"""Differentiable textual optimisation: from a policy's log-probabilities and a token gradient to proposal scores.

All solvers work on numbers, per position t and candidate v, and return scores s[t, v]: `softmax(s[t])` is the
proposal distribution at t, and s is comparable across positions.

- `mirror`: the closed form of min_q ⟨−λ·A_t, q⟩ + KL(q ‖ π_t), s = log π + λ·A. One step, exact; λ is given, or such
  that it moves the branches by a KL budget.
- `ste`: Adam on the logits through softmax(z/τ) with a hard forward (arXiv 2603.04948, Algorithm 1).
- `none`: the control, s = log π.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_trl.search.options import SteSolver

# (rows, hard choices per row [T]) -> ∂L/∂Y per row [T, K]
LossGradientFn = Callable[[list[int], list[Tensor]], list[Tensor]]


def solve_mirror(logp: Tensor, gradient: Tensor, response_columns: Tensor, reward_weight: float) -> Tensor:
    """One exact step of token-level KL-regularised policy improvement with β = 1/λ.

    Args:
        logp: [T, K] log π of the candidates.
        gradient: [T, K] ∂r/∂Y at the candidates, or advantages, whose advantages they are themselves.
        choice: [T] column of the incumbent token.
        lam: λ.

    Returns:
        [T, K] scores log π(v) + λ·A_t(v).
    """
    return logp + reward_weight * compute_advantages(gradient, response_columns)


def compute_advantages(gradient: Tensor, response_columns: Tensor) -> Tensor:
    """A [T, K] = ∂r/∂Y[t, v] − ∂r/∂Y[t, y_t], of gradients [T, K] and the columns [T] of the incumbent tokens."""
    return gradient - gradient.gather(1, response_columns[:, None])


def shuffle_advantages(advantages: Tensor, response_columns: Tensor, permutation: Tensor) -> Tensor:
    """A control: each position gets the advantages of another's alternatives, in the order of their candidates.

    Args:
        advantage: [T, K], 0 at the incumbent tokens, which stay there.
        order: [T] a permutation of the positions.
    """
    own = torch.nn.functional.one_hot(response_columns, advantages.shape[1]).bool()
    alternatives = advantages[~own].view(len(advantages), -1)[permutation]
    return torch.zeros_like(advantages).masked_scatter(~own, alternatives)


def find_reward_weight_for_kl(logp: Tensor, advantages: Tensor, proposable_mask: Tensor, target_kl: float) -> float:
    """The λ at which branches drawn by exp(log π + λ·A) stand KL nats from those drawn by π alone.

    The branches are the usable (t, v) of all positions together. KL grows with λ, up to where only those of the
    largest A are left: a budget beyond that gives the λ that gets within 1% of it.

    Args:
        logp, advantage: [T, K]; usable: [T, K] bool.
        budget: in nats, positive.

    Returns:
        λ; 0 where no branch is better than another.
    """
    base, gain = logp[proposable_mask].double().log_softmax(-1), advantages[proposable_mask].double()
    spread = float(gain.max() - gain.min()) if len(gain) else 0.0
    if not 0 < spread < math.inf:
        return 0.0
    gain = (gain - gain.max()) / spread
    target = min(target_kl, 0.99 * -float(base[gain == 0].logsumexp(-1)))
    low, high = 0.0, 1.0
    while _compute_kl(base, gain, high) < target:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _compute_kl(base, gain, middle) < target else (low, middle)
    return high / spread


def _compute_kl(base: Tensor, gain: Tensor, lam: float) -> float:
    """KL(softmax(base + λ·gain) ‖ softmax(base)) of normalised `base`."""
    tilted = (base + lam * gain).log_softmax(-1)
    return float((tilted.exp() * (tilted - base)).sum())


@dataclass(frozen=True)
class SteResult:
    """What `ste` ends with.

    Attributes:
        logits: per row [T_i, K].
        flipped: per row [T_i] bool, positions whose hard token changed on the way.
    """

    logits: list[Tensor]
    changed_positions: list[Tensor]


def solve_ste(
    logp: Sequence[Tensor],
    response_columns: Sequence[Tensor],
    loss_gradient: LossGradientFn,
    config: SteSolver,
    optimized_mask: Sequence[Tensor] | None = None,
) -> SteResult:
    """Adam on the logits z (started at log π) of whole responses, straight-through.

    The forward sees hard tokens: position t holds its incumbent token until arg max z_t leaves where it began,
    and the arg max from then on. The backward goes through softmax(z/τ) over the candidates. ∂L/∂Y depends on
    the hard tokens alone, so it is asked for again only for responses in which one has changed.

    Args:
        logp: per row [T_i, K] log π of the candidates (−inf: never chosen).
        choices: per row [T_i] column of the incumbent token.
        loss_gradient: ∂L/∂Y of rows at given hard choices.
        movable: per row [T_i] bool, positions whose logits are optimised; None = all.
    """
    logits = [row.clone() for row in logp]
    moving = (
        [torch.ones(len(row), dtype=torch.bool) for row in logits] if optimized_mask is None else list(optimized_mask)
    )
    optimiser = torch.optim.Adam(logits, lr=config.learning_rate)
    begun = [row.argmax(-1) for row in logits]
    left = [torch.zeros_like(top, dtype=torch.bool) for top in begun]
    hard = [choice.clone() for choice in response_columns]
    slopes = loss_gradient(list(range(len(logits))), hard)
    for step in range(config.steps):
        if step:
            left = [gone | (z.argmax(-1) != top) for z, top, gone in zip(logits, begun, left, strict=True)]
            now = [
                torch.where(gone, z.argmax(-1), own)
                for z, own, gone in zip(logits, response_columns, left, strict=True)
            ]
            flipped = [row for row, (a, b) in enumerate(zip(now, hard, strict=True)) if not torch.equal(a, b)]
            if flipped:
                for row, slope in zip(flipped, loss_gradient(flipped, [now[row] for row in flipped]), strict=True):
                    slopes[row], hard[row] = slope, now[row]
        for z, slope, mask in zip(logits, slopes, moving, strict=True):
            z.grad = (
                compute_softmax_gradient(z, slope, config.tau) * mask[:, None]
            )  # Adam leaves alone what has no gradient
        optimiser.param_groups[0]["lr"] = config.compute_learning_rate(step)
        optimiser.step()
    return SteResult(logits, left)


def compute_softmax_gradient(logits: Tensor, gradient: Tensor, tau: float) -> Tensor:
    """[T, K] ∂/∂z of ⟨slope, softmax(z/τ)⟩."""
    weights = (logits / tau).softmax(-1)
    return weights * (gradient - (weights * gradient).sum(-1, keepdim=True)) / tau
