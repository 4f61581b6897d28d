"""Sample tokens from logits, with random numbers that belong to the sequence and not to the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nabla_trl.models.options import Sampling


class TokenStatistic(IntEnum):
    """What is recorded of the distribution π that a token is drawn from, at temperature 1 and without a filter.

    Attributes:
        TOP_LOGP: mean log π of the k likeliest tokens, in nats.
        SELF_CERTAINTY: KL from the uniform distribution to π, −log V − mean log π over all V tokens, in nats.
        ENTROPY: entropy of π, in nats.
    """

    TOP_LOGP = 0
    SELF_CERTAINTY = 1
    ENTROPY = 2


def make_rng(seed: int, problem_id: str, *labels: int | str) -> np.random.Generator:
    """Return the random numbers of one sample of one problem.

    They depend on the arguments alone, so a result does not depend on batch, order, shard or resumption.
    """
    key = hashlib.blake2b(repr((seed, problem_id, *labels)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def make_response_rng(seed: int, problem_id: str, number: int) -> np.random.Generator:
    """Return the random numbers of response `number` from the prompt: the same one in a pool and in a search."""
    return make_rng(seed, problem_id, "suffix", f"pool-{number}" if number else 0)


def build_warpers(sampling: Sampling) -> LogitsProcessorList:
    """Return transformers' logits processors for these options. An empty list means that the sampler is π itself."""
    warpers = LogitsProcessorList()
    if sampling.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


def sample_tokens(logits: Tensor, uniforms: Tensor, warpers: LogitsProcessorList, sampling: Sampling) -> Tensor:
    """Sample one token per row by inverting the CDF (arg max when greedy).

    The sum runs in float64, so that rounding hardly ever changes a sample. A token of zero mass is never sampled.

    Args:
        logits: [B, V].
        uniforms: [B] in [0, 1), where to invert the CDF.

    Returns:
        [B] long.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    cdf = _warp(logits, warpers).softmax(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def compute_top_candidates(
    logits: Tensor, sampled_ids: Tensor, forbidden_mask: Tensor, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens of each row. The sampled token is always one of them.

    It takes the last column if it is not among the likeliest, so that the other columns do not depend on it.

    Args:
        logits: [B, V].
        sampled_ids: [B].
        forbidden_mask: [V] bool.

    Returns:
        ids [B, K] long and log π [B, K] (−inf where forbidden), K = min(num_candidates, V).
    """
    logp = logits.log_softmax(-1).masked_fill(forbidden_mask, -torch.inf)
    values, ids = logp.topk(min(num_candidates, logp.shape[-1]), dim=-1)
    # Selected by `where`: an index by a mask would make the host wait for the device.
    present = (ids == sampled_ids[:, None]).any(-1)
    ids[:, -1] = torch.where(present, ids[:, -1], sampled_ids)
    values[:, -1] = torch.where(present, values[:, -1], logp.gather(1, sampled_ids[:, None]).squeeze(1))
    return ids, values


def compute_distribution_statistics(logits: Tensor, forbidden_mask: Tensor, top_k: int) -> Tensor:
    """Return what confidence measures need of a whole distribution π [B, 3], in the columns of `TokenStatistic`.

    Tokens that are forbidden or impossible are left out of every sum and mean.

    Args:
        logits: [B, V].
        forbidden_mask: [V] bool.
        top_k: k of the mean over the likeliest tokens.
    """
    all_logp = logits.log_softmax(-1)
    logp = all_logp.masked_fill(forbidden_mask, -torch.inf)
    possible = logp > -torch.inf
    finite_logp = torch.where(possible, logp, 0.0)
    num_possible = possible.sum(-1).clamp(min=1)
    # The likeliest of all tokens, as a server returns them, and of these the ones that can be drawn.
    top = logp.gather(-1, all_logp.topk(min(top_k, logp.shape[-1]), dim=-1).indices)
    is_top = top > -torch.inf
    top_mean = torch.where(is_top, top, 0.0).sum(-1) / is_top.sum(-1).clamp(min=1)
    self_certainty = -finite_logp.sum(-1) / num_possible - num_possible.log()
    entropy = -(logp.exp() * finite_logp).sum(-1)
    return torch.stack((top_mean, self_certainty, entropy), dim=-1)


def find_token_columns(candidates: Tensor, token_ids: Sequence[int]) -> Tensor:
    """Return the column [T] of each position's own token among its candidates [T, K], where it always is."""
    return (candidates == torch.tensor(token_ids)[:, None]).int().argmax(-1)


def compute_log_importance_weight(logits: Tensor, candidates: Tensor, warpers: LogitsProcessorList) -> Tensor:
    """Return log π − log q of candidates [B, K], where q is the sampler: [B, K], inf where q is 0.

    Args:
        logits: [B, V], −inf at forbidden tokens.
    """
    sampler, policy = (
        scores.log_softmax(-1).gather(1, candidates) for scores in (_warp(logits.clone(), warpers), logits)
    )
    return torch.where(sampler == -torch.inf, torch.inf, policy - sampler)


def _warp(logits: Tensor, warpers: LogitsProcessorList) -> Tensor:
    no_input_ids = torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device)
    return warpers(no_input_ids, logits)
