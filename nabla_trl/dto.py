"""Differentiable textual optimisation: from a policy's log-probabilities and a token gradient to proposal scores.

All solvers work on numbers, per position t and candidate v, and return scores s[t, v]: `softmax(s[t])` is the
proposal distribution at t, and s is comparable across positions.

- `mirror`: the closed form of min_q ⟨−A_t, q⟩ + KL(q ‖ π_t), s = log π + A. One step, exact.
- `ste`: Adam on the logits through softmax(z/τ) with a hard forward (arXiv 2603.04948, Algorithm 1).
- `none`: the control, s = log π.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nabla_trl.config import SteConfig

# (rows, hard choices per row [T]) -> ∂L/∂Y per row [T, K]
GradientFn = Callable[[list[int], list[Tensor]], list[Tensor]]


def mirror(logp: Tensor, gradient: Tensor, choice: Tensor, lam: float) -> Tensor:
    """One exact step of token-level KL-regularised policy improvement with β = 1/λ.

    Args:
        logp: [T, K] log π of the candidates.
        gradient: [T, K] ∂r/∂Y at the candidates.
        choice: [T] column of the incumbent token.
        lam: λ.

    Returns:
        [T, K] scores log π(v) + A_t(v), with A_t(v) = λ·(∂r/∂Y[t,v] − ∂r/∂Y[t,y_t]).
    """
    own = gradient.gather(1, choice[:, None])
    return logp + lam * (gradient - own)


def ste(
    logp: Sequence[Tensor], choices: Sequence[Tensor], loss_gradient: GradientFn, config: SteConfig
) -> list[Tensor]:
    """Adam on the logits z (started at log π) of whole responses, straight-through.

    The forward sees hard tokens: position t holds its incumbent token until arg max z_t leaves where it began,
    and the arg max from then on. The backward goes through softmax(z/τ) over the candidates. ∂L/∂Y depends on
    the hard tokens alone, so it is asked for again only for responses in which one has changed.

    Args:
        logp: per row [T_i, K] log π of the candidates (−inf: never chosen).
        choices: per row [T_i] column of the incumbent token.
        loss_gradient: ∂L/∂Y of rows at given hard choices.

    Returns:
        per row [T_i, K] optimised logits.
    """
    logits = [row.clone() for row in logp]
    optimiser = torch.optim.Adam(logits, lr=config.lr)
    begun = [row.argmax(-1) for row in logits]
    left = [torch.zeros_like(top, dtype=torch.bool) for top in begun]
    hard = [choice.clone() for choice in choices]
    slopes = loss_gradient(list(range(len(logits))), hard)
    for step in range(config.steps):
        if step:
            left = [gone | (z.argmax(-1) != top) for z, top, gone in zip(logits, begun, left, strict=True)]
            now = [torch.where(gone, z.argmax(-1), own) for z, own, gone in zip(logits, choices, left, strict=True)]
            flipped = [row for row, (a, b) in enumerate(zip(now, hard, strict=True)) if not torch.equal(a, b)]
            if flipped:
                for row, slope in zip(flipped, loss_gradient(flipped, [now[row] for row in flipped]), strict=True):
                    slopes[row], hard[row] = slope, now[row]
        for z, slope in zip(logits, slopes, strict=True):
            z.grad = _through_softmax(z, slope, config.tau)
        optimiser.param_groups[0]["lr"] = config.rate(step)
        optimiser.step()
    return logits


def _through_softmax(logits: Tensor, slope: Tensor, tau: float) -> Tensor:
    """∂/∂z of ⟨slope, softmax(z/τ)⟩."""
    weights = (logits / tau).softmax(-1)
    return weights * (slope - (weights * slope).sum(-1, keepdim=True)) / tau
