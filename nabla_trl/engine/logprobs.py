"""Log-probabilities of given tokens under a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nabla_trl.models.policy import Policy
from nabla_trl.states.probe import get_layout
from nabla_trl.states.writers import BatchWriter

MAX_LOGITS = 2**24  # of one forward pass, so that a long sequence over a large vocabulary fits into memory


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities (in nats) of the T tokens of a sequence, at temperature 1 and without any filter.

    Attributes:
        ids: the T tokens.
        logprobs: of each token after those before it. None for the first one, which nothing predicts.
        top: the K likeliest tokens at each position with their log-probabilities, the likeliest first. Empty for the
            first position.
    """

    ids: list[int]
    logprobs: list[float | None]
    top: list[list[tuple[int, float]]]


@torch.no_grad()
def compute_token_logprobs(policy: Policy, ids: Sequence[int], num_top: int) -> TokenLogprobs:
    """Return the log-probability of every token of a sequence, and the likeliest tokens at each position.

    Args:
        num_top: K, at most the vocabulary.
    """
    inputs = torch.tensor([list(ids)], device=policy.device)
    logprobs: list[float | None] = [None]
    top: list[list[tuple[int, float]]] = [[]]
    step = max(1, MAX_LOGITS // policy.forbidden_mask.shape[0])
    layout = get_layout(policy.model)
    cache = layout.make_cache(BatchWriter(continues=False), {})
    for begin in range(0, len(ids) - 1, step):
        piece = inputs[:, begin : min(begin + step, len(ids) - 1)]
        positions = torch.arange(begin, begin + piece.shape[1], device=policy.device)[None]
        output = layout.run(policy.model, cache, None, positions, input_ids=piece)
        logp = output.logits[0].float().log_softmax(-1)
        targets = inputs[0, begin + 1 : begin + 1 + piece.shape[1]]
        logprobs += logp.gather(1, targets[:, None]).squeeze(1).tolist()
        values, tokens = logp.topk(min(num_top, logp.shape[-1]), dim=-1)
        top += [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), values.tolist(), strict=True)]
    return TokenLogprobs(list(ids), logprobs, top)
