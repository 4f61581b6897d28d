"""Where a token gradient is taken: at the hard tokens (the paper), or at a mixture of the policy's own candidates.

A relaxed response is a matrix Y of token weights per position. The mixture is (1−α)·onehot(y_t) + α·π(·|y_<t), over
the candidates that the policy showed when the response was drawn: a function of the tokens and the policy alone, so
a gradient taken there can be reused as one at the hard tokens can. Between two candidates a first-order difference
is right to third order (midpoint rule); at one of them it says little about the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Most embedding entries (floats) gathered at once.
MAX_GATHERED_VALUES = 2**22


@dataclass(frozen=True)
class RelaxedResponse:
    """Y, sparse: at position t the tokens `ids` [T, K] with `weights` [T, K] that sum to 1 per position."""

    ids: Tensor
    weights: Tensor

    def average_embeddings(self, embed: Callable[[Tensor], Tensor], num_positions: int) -> Tensor:
        """Σ_v Y[t, v]·e(v) of the first `count` positions: [count, d]."""
        rows = max(1, MAX_GATHERED_VALUES // (self.ids.shape[1] * embed(self.ids[:1, 0]).shape[-1]))
        chunks = zip(self.ids[:num_positions].split(rows), self.weights[:num_positions].split(rows), strict=True)
        return torch.cat(
            [torch.einsum("tk,tkd->td", weights.to(e), e) for ids, weights in chunks for e in [embed(ids)]]
        )


def build_one_hot(response_ids: Sequence[int]) -> RelaxedResponse:
    """The one-hot matrix of a response."""
    ids = torch.tensor(response_ids, dtype=torch.long)[:, None]
    return RelaxedResponse(ids, torch.ones(ids.shape))


def build_mixture(
    response_ids: Sequence[int], candidates: Tensor, logp: Tensor, alpha: float | Tensor, *, min_p: float = 0.0
) -> RelaxedResponse:
    """(1−α)·onehot(y_t) + α·π(·|y_<t) over candidates, π renormalised over them.

    Args:
        candidates, logp: [T, K] ids and log π (−inf: never).
        alpha: in [0, 1]; a number or [T].
        min_p: drop candidates below this fraction of the position's likeliest.

    Returns:
        K + 1 tokens per position, the response's own first; a token can occur twice, its weights add.
    """
    own = build_one_hot(response_ids)
    share = torch.as_tensor(alpha, dtype=torch.float32).expand(len(own.ids))[:, None]
    if min_p:
        logp = logp.masked_fill(logp < logp.amax(-1, keepdim=True) + torch.tensor(min_p).log(), -torch.inf)
    policy = logp.softmax(-1, dtype=torch.float32)
    return RelaxedResponse(torch.cat((own.ids, candidates), -1), torch.cat((1 - share, share * policy), -1))
