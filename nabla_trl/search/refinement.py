"""Refined distributions: what a search knows about the next token at a prefix, as targets for training.

One step of mirror descent turns the policy's π_t into q_t(v) ∝ π_t(v)·exp(λ·A_t(v)) over the response's own token and
the tokens that a search may propose. All other tokens keep their probabilities, because no gradient is computed for
them, or it is not trusted (`candidate_min_p`). The logarithm of q_t says by how much to change each token's weight.

The direct gradient of a score is known for the token that was scored alone, and 0 for all others. A search scores many
responses that share their beginnings, so it can learn what several tokens add to the score at one prefix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.options import GradientPoint
from nabla_trl.rewards.reward import Reward
from nabla_trl.search import proposals
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.state import ScoredResponse, SearchState
from nabla_trl.traces.schema import SoftTargets


def compute_refined_logp(logp: Tensor, gains: Tensor, refined_mask: Tensor) -> Tensor:
    """Return log q [T, K]: one mirror step over some candidates, which keep their total probability.

    Args:
        logp: [T, K] log π of the candidates, in nats.
        gains: [T, K] λ·A, in nats. A constant per position makes no difference.
        refined_mask: [T, K] bool, the candidates among which probability moves. The others keep log π.
    """
    scores = (logp + gains).masked_fill(~refined_mask, -torch.inf)
    total_logp = logp.masked_fill(~refined_mask, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.where(refined_mask, scores.log_softmax(-1) + total_logp, logp)


def is_own_token_gradient(reward: Reward, point: GradientPoint) -> bool:
    """Return True if the gradient is known for the response's own tokens alone: the direct gradient of a score."""
    return point.direct and not point.alphas and not reward.has_dense_gradient


@dataclass(frozen=True)
class _Incumbent:
    """An incumbent of T tokens. `gain_weight` is λ of its mirror step, `scores` [T, K] are those of the solver."""

    response_ids: list[int]
    candidates: Tensor
    logp: Tensor
    refined_mask: Tensor
    gain_weight: float
    scores: Tensor


class SoftTargetRecorder:
    """Recorder of the refined distributions along all incumbents of a search for one problem.

    Args:
        config: of the search, with solver mirror and its `gradient_at`.
    """

    def __init__(self, reward: Reward, config: SearchConfig):
        self.reward, self.config = reward, config
        self.has_own_token_gradient = is_own_token_gradient(reward, config.get_gradient_point())
        self._incumbents: dict[int, list[_Incumbent]] = {}
        # A tree of all scored responses: (node, token) -> node, and what the token adds to the score there.
        self._children: dict[tuple[int, int], int] = {}
        self._increments: dict[tuple[int, int], float] = {}

    def learn(self, responses: Sequence[ScoredResponse]) -> None:
        """Remember what each token of scored responses adds to the score, if the gradient is known for these alone."""
        if not self.has_own_token_gradient:
            return
        for response in responses:
            if not math.isfinite(response.reward) or not response.response_ids:
                continue
            [increments] = self.reward.compute_direct_gradient(
                [response.make_sample()],
                [response.score_caches],
                [torch.tensor(response.response_ids)[:, None]],
                flop_counter=FlopCounter(),  # it reads what scoring has computed
            )
            node = 0
            for token, increment in zip(response.response_ids, increments[:, 0].tolist(), strict=True):
                self._increments[node, token] = increment
                node = self._children.setdefault((node, token), len(self._children) + 1)

    def add_incumbent(self, chain: SearchState) -> None:
        """Record a chain's incumbent, whose scores the solver has computed."""
        response = chain.incumbent
        mask = proposals.compute_proposable_mask(response, self.reward.in_vocabulary, self.config)
        is_own = response.candidates == torch.tensor(response.response_ids)[:, None]
        weight = proposals.compute_gain_weight(response, chain.beta, self.reward, self.config)
        self._incumbents.setdefault(chain.index, []).append(
            _Incumbent(
                response.response_ids,
                response.candidates,
                response.logp,
                mask | is_own,
                weight,
                response.get_proposal_scores(),
            )
        )

    def build(self, chain: SearchState) -> list[SoftTargets]:
        """Return the `soft_target_top_k` likeliest tokens of q_t along each recorded incumbent of a chain."""
        targets = []
        for incumbent in self._incumbents.get(chain.index, []):
            gains = incumbent.scores - incumbent.logp
            if self.has_own_token_gradient:
                gains = incumbent.gain_weight * self._look_up_increments(incumbent)
            refined_logp = compute_refined_logp(incumbent.logp, gains, incumbent.refined_mask)
            top_logp, columns = refined_logp.topk(min(self.config.soft_target_top_k, refined_logp.shape[1]), dim=-1)
            targets.append(SoftTargets.from_arrays(incumbent.candidates.gather(1, columns), top_logp.float()))
        return targets

    def _look_up_increments(self, incumbent: _Incumbent) -> Tensor:
        """Return [T, K] what each candidate adds to the score, 0 where it was never scored."""
        rows, node = [], 0
        for candidates, token in zip(incumbent.candidates.tolist(), incumbent.response_ids, strict=True):
            rows.append([self._increments.get((node, candidate), 0.0) for candidate in candidates])
            node = self._children[node, token]
        return torch.tensor(rows)
