"""Generate continuations of token prefixes, with whatever back end the policy has.

A prefix is prefilled once and shared by all requests that continue it. Every token is charged to the problem that it
belongs to. The sampling functions below are those of the transformers back end. Its filters are transformers' own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

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

from nabla_trl.models import kv_cache
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import GenerationOutput, GenerationRequest

_PrefixKey = tuple[str, tuple[int, ...]]  # cost key and prefix: no problem's cost may depend on the others


def generate_continuations(
    policy: Policy,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    *,
    flop_counter: FlopCounter,
    top_k_candidates: int = 1,
    return_cache: bool = False,
    return_log_importance_weight: bool = False,
    batch_size: int = 256,
) -> list[GenerationOutput]:
    """Generate the continuation of every request, `batch_size` requests at a time.

    Args:
        top_k_candidates: K, how many candidates to record per position (capped at the vocabulary).
        return_cache: return each output's kv row. Outputs of a server have empty rows.
        return_log_importance_weight: record log π − log q of the candidates, unless the sampler q is π.

    Raises:
        ValueError: NaN or infinite logits, or an option that the back end does not support.
        ConnectionError: a server fails or does not answer.
    """
    outputs: list[GenerationOutput] = []
    prefix_caches: dict[_PrefixKey, Tensor] = {}
    for begin in range(0, len(requests), batch_size):
        batch, later = requests[begin : begin + batch_size], requests[begin + batch_size :]
        with flop_counter.measure_seconds([request.cost_key for request in batch]):
            batch_outputs = policy.backend.generate(
                policy,
                _add_prefix_caches(policy, batch, prefix_caches, flop_counter),
                sampling,
                top_k_candidates=top_k_candidates,
                return_cache=return_cache,
                return_log_importance_weight=return_log_importance_weight,
            )
        for request, output in zip(batch, batch_outputs, strict=True):
            # A server is charged as if its prefix cache never missed, as vLLM's rarely does.
            flop_counter.add_flops(
                request.cost_key, policy.size, "decode", len(request.prefix_ids) - 1, len(output.ids)
            )
        outputs += batch_outputs
        needed = {_make_prefix_key(request) for request in later if request.cache is None}
        prefix_caches = {key: row for key, row in prefix_caches.items() if key in needed}
    return outputs


def _add_prefix_caches(
    policy: Policy,
    requests: Sequence[GenerationRequest],
    prefix_caches: dict[_PrefixKey, Tensor],
    flop_counter: FlopCounter,
) -> list[GenerationRequest]:
    """Return the requests with a cache each. Prefixes that are not in `prefix_caches` yet are prefilled into it."""
    missing = {_make_prefix_key(request): request.prefix_ids for request in requests if request.cache is None}
    missing = {key: ids for key, ids in missing.items() if key not in prefix_caches}
    if missing:
        rows = prepare_prompt_caches(policy, [(key[0], ids) for key, ids in missing.items()], flop_counter)
        prefix_caches.update(zip(missing, rows, strict=True))
    return [
        replace(request, cache=prefix_caches[_make_prefix_key(request)]) if request.cache is None else request
        for request in requests
    ]


def _make_prefix_key(request: GenerationRequest) -> _PrefixKey:
    return request.cost_key, tuple(request.prefix_ids)


def prepare_prompt_caches(
    policy: Policy, prompts: Sequence[tuple[str, list[int]]], flop_counter: FlopCounter
) -> list[Tensor]:
    """Return the kv row of every prompt but its last token, for pairs of cost key and prompt ids.

    The rows are empty where the back end keeps its caches to itself.
    """
    rows = policy.backend.prefill(policy, [ids[:-1] for _, ids in prompts])
    _charge_prefill(policy, prompts, flop_counter)
    return rows


def prefill_prompts(
    policy: Policy, prompts: Sequence[tuple[str, list[int]]], flop_counter: FlopCounter
) -> list[Tensor]:
    """Return the same rows computed by the model in this process, whatever the back end is."""
    rows = kv_cache.prefill_sequences(policy.model, [ids[:-1] for _, ids in prompts])
    _charge_prefill(policy, prompts, flop_counter)
    return rows


def _charge_prefill(policy: Policy, prompts: Sequence[tuple[str, list[int]]], flop_counter: FlopCounter) -> None:
    for key, ids in prompts:
        flop_counter.add_flops(key, policy.size, "prefill", 0, len(ids) - 1, num_head_positions=0)


# --- sampling -----------------------------------------------------------------------------------------


def make_rng(seed: int, problem_id: str, *labels: int | str) -> np.random.Generator:
    """Return the random numbers of one sample of one problem.

    They depend on the arguments alone, so a result does not depend on batch, order, shard or resumption.
    """
    key = hashlib.blake2b(repr((seed, problem_id, *labels)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


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
    absent = (ids != sampled_ids[:, None]).all(-1)
    ids[absent, -1] = sampled_ids[absent]
    values[absent, -1] = logp[absent].gather(1, sampled_ids[absent, None]).squeeze(1)
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
