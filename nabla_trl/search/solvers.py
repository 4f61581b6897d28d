"""Solvers: from log-probabilities of a policy and a token gradient to proposal scores.

Position t of a response y has K candidates v with log-probabilities log π_t(v). A solver returns scores s [T, K].
softmax(s_t) is the proposal distribution at t, and scores of different positions can be compared.

The search minimizes L(y) = −λ·r(y|x) − log π(y|x), λ = 1/β (arXiv 2603.04948). With the gradient G = ∂r/∂Y of the
reward at y, the advantage of a candidate over the response's own token is A_t(v) = G_t(v) − G_t(y_t).

    mirror    s_t = log π_t + λ·A_t, so that softmax(s_t) = arg min_q ⟨−λ·A_t, q⟩ + KL(q ‖ π_t): one exact
              step of mirror descent
    ste       s = z after n steps of z ← Adam(z, ∂/∂z ⟨∂L/∂Y, softmax(z/τ)⟩) from z = log π, where ∂L/∂Y is taken at
              the hard tokens that z decides on: the paper's straight-through estimator (Algorithm 1)
    none      s = log π, the control without a gradient
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_trl.search.options import SteSolver

# (rows, columns of the hard tokens per row [T]) -> ∂L/∂Y per row [T, K]
LossGradientFn = Callable[[list[int], list[Tensor]], list[Tensor]]


def solve_mirror(logp: Tensor, gradient: Tensor, response_columns: Tensor, reward_weight: float) -> Tensor:
    """Return the scores [T, K] of one exact mirror-descent step, s = log π + λ·A.

    Args:
        logp: [T, K] log π of the candidates.
        gradient: [T, K] ∂r/∂Y at the candidates. Advantages may be given as well: they are their own advantages.
        response_columns: [T] column of each response token among the candidates.
        reward_weight: λ.
    """
    return logp + reward_weight * compute_advantages(gradient, response_columns)


def compute_advantages(gradient: Tensor, response_columns: Tensor) -> Tensor:
    """Return A_t(v) = G_t(v) − G_t(y_t) [T, K] of a gradient G [T, K]."""
    return gradient - gradient.gather(1, response_columns[:, None])


def shuffle_advantages(advantages: Tensor, response_columns: Tensor, permutation: Tensor) -> Tensor:
    """Return advantages [T, K] in which each position has the alternatives' advantages of another position.

    This is a control. The alternatives keep the order of their candidates, and the response's own tokens stay at 0.

    Args:
        permutation: [T] the position from which each position takes its advantages.
    """
    is_alternative = ~torch.nn.functional.one_hot(response_columns, advantages.shape[1]).bool()
    alternatives = advantages[is_alternative].view(len(advantages), -1)[permutation]
    return torch.zeros_like(advantages).masked_scatter(is_alternative, alternatives)


def find_reward_weight_for_kl(logp: Tensor, advantages: Tensor, proposable_mask: Tensor, target_kl: float) -> float:
    """Return the λ at which the distribution of proposals is `target_kl` nats away from the policy's.

    Over all proposable branches (t, v) together, q_λ ∝ exp(log π_t(v) + λ·A_t(v)). KL(q_λ ‖ q_0) grows with λ up to
    −log q_0(M), where M holds the branches of the largest A. The target is cut to 99% of this limit.

    Args:
        logp, advantages: [T, K].
        proposable_mask: [T, K] bool, the branches that may be proposed.
        target_kl: in nats, positive.

    Returns:
        λ, and 0 if all branches have the same advantage.
    """
    base_logp, gain = logp[proposable_mask].double().log_softmax(-1), advantages[proposable_mask].double()
    spread = float(gain.max() - gain.min()) if len(gain) else 0.0
    if not 0 < spread < math.inf:
        return 0.0
    gain = (gain - gain.max()) / spread  # in [−1, 0], so that λ is found in units of 1/spread
    target = min(target_kl, 0.99 * -float(base_logp[gain == 0].logsumexp(-1)))
    low, high = 0.0, 1.0
    while _compute_kl(base_logp, gain, high) < target:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _compute_kl(base_logp, gain, middle) < target else (low, middle)
    return high / spread


def _compute_kl(base_logp: Tensor, gain: Tensor, lam: float) -> float:
    """Return KL(q_λ ‖ q_0) in nats for q_λ ∝ q_0·exp(λ·gain), where log q_0 is normalized."""
    tilted_logp = (base_logp + lam * gain).log_softmax(-1)
    return float((tilted_logp.exp() * (tilted_logp - base_logp)).sum())


@dataclass(frozen=True)
class SteResult:
    """The result of solver ste.

    Attributes:
        logits: per row [T, K], the optimized z.
        changed_positions: per row [T] bool, the positions whose hard token changed during the optimization.
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
    """Optimize the logits z of whole responses with Adam and a straight-through estimator.

    The forward reads hard tokens. Position t holds the response's token until arg max z_t differs from arg max log π_t
    for the first time, and holds arg max z_t from then on. The backward goes through softmax(z/τ) over the candidates.
    ∂L/∂Y depends on the hard tokens alone, so that it is computed again only for rows in which one has changed.

    Args:
        logp: per row [T, K] log π of the candidates, −inf for those that may not be chosen. z starts here.
        response_columns: per row [T] column of each response token among the candidates.
        loss_gradient: ∂L/∂Y of rows at columns of hard tokens.
        optimized_mask: per row [T] bool, positions whose logits are optimized. None: all.
    """
    logits = [row.clone() for row in logp]
    masks = optimized_mask or [torch.ones(len(z), dtype=torch.bool) for z in logits]
    optimizer = torch.optim.Adam(logits, lr=config.learning_rate)
    first_columns = [z.argmax(-1) for z in logits]
    changed = [torch.zeros(len(z), dtype=torch.bool) for z in logits]
    hard_columns = list(response_columns)
    gradients = loss_gradient(list(range(len(logits))), hard_columns)
    for step in range(config.steps):
        # Forward: the hard tokens of every row, and ∂L/∂Y where they are new.
        for row, z in enumerate(logits):
            changed[row] = changed[row] | (z.argmax(-1) != first_columns[row])
        columns = [
            torch.where(mask, z.argmax(-1), column)
            for mask, z, column in zip(changed, logits, response_columns, strict=True)
        ]
        new_rows = [row for row in range(len(logits)) if not torch.equal(columns[row], hard_columns[row])]
        if new_rows:
            new_gradients = loss_gradient(new_rows, [columns[row] for row in new_rows])
            for row, gradient in zip(new_rows, new_gradients, strict=True):
                gradients[row], hard_columns[row] = gradient, columns[row]
        # Backward and update. Adam never moves a logit whose gradient was always 0.
        for z, gradient, mask in zip(logits, gradients, masks, strict=True):
            z.grad = compute_softmax_gradient(z, gradient, config.tau) * mask[:, None]
        optimizer.param_groups[0]["lr"] = config.compute_learning_rate(step)
        optimizer.step()
    return SteResult(logits, changed)


def compute_softmax_gradient(logits: Tensor, gradient: Tensor, tau: float) -> Tensor:
    """Return ∂/∂z ⟨G, softmax(z/τ)⟩ = p ⊙ (G − ⟨p, G⟩)/τ [T, K], with p = softmax(z/τ)."""
    probs = (logits / tau).softmax(-1)
    return probs * (gradient - (probs * gradient).sum(-1, keepdim=True)) / tau
