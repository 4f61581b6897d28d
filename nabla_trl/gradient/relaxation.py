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
GATHER_BUDGET = 2**22


@dataclass(frozen=True)
class Relaxed:
    """Y, sparse: at position t the tokens `ids` [T, K] with `weights` [T, K] that sum to 1 per position."""

    ids: Tensor
    weights: Tensor

    def average(self, embed: Callable[[Tensor], Tensor], count: int) -> Tensor:
        """Σ_v Y[t, v]·e(v) of the first `count` positions: [count, d]."""
        rows = max(1, GATHER_BUDGET // (self.ids.shape[1] * embed(self.ids[:1, 0]).shape[-1]))
        chunks = zip(self.ids[:count].split(rows), self.weights[:count].split(rows), strict=True)
        return torch.cat(
            [torch.einsum("tk,tkd->td", weights.to(e), e) for ids, weights in chunks for e in [embed(ids)]]
        )


def hard(response: Sequence[int]) -> Relaxed:
    """The one-hot matrix of a response."""
    ids = torch.tensor(response, dtype=torch.long)[:, None]
    return Relaxed(ids, torch.ones(ids.shape))


def mixture(
    response: Sequence[int], candidates: Tensor, logp: Tensor, alpha: float | Tensor, *, min_p: float = 0.0
) -> Relaxed:
    """(1−α)·onehot(y_t) + α·π(·|y_<t) over candidates, π renormalised over them.

    Args:
        candidates, logp: [T, K] ids and log π (−inf: never).
        alpha: in [0, 1]; a number or [T].
        min_p: drop candidates below this fraction of the position's likeliest.

    Returns:
        K + 1 tokens per position, the response's own first; a token can occur twice, its weights add.
    """
    own = hard(response)
    share = torch.as_tensor(alpha, dtype=torch.float32).expand(len(own.ids))[:, None]
    if min_p:
        logp = logp.masked_fill(logp < logp.amax(-1, keepdim=True) + torch.tensor(min_p).log(), -torch.inf)
    policy = logp.softmax(-1, dtype=torch.float32)
    return Relaxed(torch.cat((own.ids, candidates), -1), torch.cat((1 - share, share * policy), -1))
