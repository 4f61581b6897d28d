"""Where a gradient is taken: at the hard tokens (as in the paper), or at a mixture with the policy's candidates.

A relaxed response is a matrix Y [T, V] of token weights per position. The mixture is

    Y[t] = (1 − α)·onehot(y_t) + α·π(·|y_<t),

with π normalized over the candidates recorded when the response was generated. Like the hard tokens, it is a function
of the tokens and the policy alone, so that a gradient at either can be reused. Between two candidates, a first-order
difference at their midpoint is right to third order (midpoint rule). At one of them it says little about the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Embedding values (floats) gathered at once: bounds the memory of a [T, K, d] table.
MAX_GATHERED_VALUES = 2**22


@dataclass(frozen=True)
class RelaxedResponse:
    """Y in sparse form: at position t the tokens `ids` [T, K] have the `weights` [T, K], which sum to 1."""

    ids: Tensor
    weights: Tensor

    def average_embeddings(self, embed: Callable[[Tensor], Tensor], num_positions: int) -> Tensor:
        """Return Σ_v Y[t, v]·E_v [num_positions, d] of the first positions, where `embed` gives E_v of ids."""
        width = embed(self.ids[:1, 0]).shape[-1]
        size = max(1, MAX_GATHERED_VALUES // (self.ids.shape[1] * width))
        averages = []
        slices = zip(self.ids[:num_positions].split(size), self.weights[:num_positions].split(size), strict=True)
        for ids, weights in slices:
            embeddings_TKd = embed(ids)
            averages.append(torch.einsum("tk,tkd->td", weights.to(embeddings_TKd), embeddings_TKd))
        return torch.cat(averages)


def build_one_hot(response_ids: Sequence[int]) -> RelaxedResponse:
    """Return the one-hot matrix of a response."""
    ids = torch.tensor(response_ids, dtype=torch.long)[:, None]
    return RelaxedResponse(ids, torch.ones(ids.shape))


def build_mixture(
    response_ids: Sequence[int], candidates: Tensor, logp: Tensor, alpha: float | Tensor, *, min_p: float = 0.0
) -> RelaxedResponse:
    """Return (1 − α)·onehot(y_t) + α·π(·|y_<t) over the candidates.

    Args:
        candidates: [T, K] ids.
        logp: [T, K] log π of the candidates. −inf: never.
        alpha: in [0, 1], a number or [T].
        min_p: candidates below this fraction of the likeliest one at their position are left out.

    Returns:
        K + 1 tokens per position, the response's own token first. Where it is a candidate too, its weights add up.
    """
    one_hot = build_one_hot(response_ids)
    alphas = torch.as_tensor(alpha, dtype=torch.float32).expand(len(one_hot.ids))[:, None]
    if min_p:
        logp = logp.masked_fill(logp < logp.amax(-1, keepdim=True) + torch.tensor(min_p).log(), -torch.inf)
    policy = logp.softmax(-1, dtype=torch.float32)
    weights = torch.cat((1 - alphas, alphas * policy), -1)
    return RelaxedResponse(torch.cat((one_hot.ids, candidates), -1), weights)


def compute_replaceable_mask(
    response_ids: Sequence[int], candidates: Tensor, logp: Tensor, in_vocabulary: Tensor, candidate_min_p: float = 0.0
) -> Tensor:
    """Return a mask [T, K] of the candidates that may replace the response's own tokens.

    Args:
        candidates: [T, K] ids.
        logp: [T, K] log π of the candidates. −inf: never.
        in_vocabulary: [V] bool, tokens of the policy that the reward can read.
        candidate_min_p: candidates below this fraction of the likeliest one at their position are left out.
    """
    mask = in_vocabulary[candidates] & (candidates != torch.tensor(response_ids)[:, None]) & logp.isfinite()
    if candidate_min_p:
        mask &= logp >= logp.amax(-1, keepdim=True) + math.log(candidate_min_p)
    return mask
