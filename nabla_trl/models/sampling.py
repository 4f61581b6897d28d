"""Sample tokens from logits, with random numbers that belong to the sequence and not to the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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
