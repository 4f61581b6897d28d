"""Token ids in, token ids out: batched decoding that can start from, and gives back, prefix caches.

The loop is our own rather than `model.generate` because branching needs what that does not return per row:
the cache of each sequence, the policy's candidates at each position, and randomness that belongs to the
sequence and not to the batch. Logit warping is transformers' own. Equal to `model.generate` where the two
overlap (tests). A policy that has a server draws from that (`nabla_trl.models.vllm_backend`), and keeps no caches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Cache,
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


def build_warpers(sampling: Sampling) -> LogitsProcessorList:
    """transformers' own processors for a sampling configuration."""
    chain = LogitsProcessorList()
    if sampling.temperature not in (0.0, 1.0):
        chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return chain


def make_rng(seed: int, problem_id: str, *draw: int | str) -> np.random.Generator:
    """The random numbers of one draw of one problem: independent of batch, order, shard and resume."""
    key = hashlib.blake2b(repr((seed, problem_id, *draw)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


_PrefixKey = tuple[str, tuple[int, ...]]  # problem id and prefix


def prepare_prompt_caches(
    policy: Policy, prompts: Sequence[tuple[str, list[int]]], flop_counter: FlopCounter
) -> list[Tensor]:
    """kv rows of every prompt but its last token, for (problem id, prompt ids) pairs; empty rows from a server."""
    if policy.backend is None:
        return prefill_prompts(policy, prompts, flop_counter)
    _charge_prefill(policy, prompts, flop_counter)  # it is the server that computes and keeps them
    return [kv_cache.make_empty_cache(policy.model)] * len(prompts)


def prefill_prompts(
    policy: Policy, prompts: Sequence[tuple[str, list[int]]], flop_counter: FlopCounter
) -> list[Tensor]:
    """kv rows of every prompt but its last token in the model that is loaded here."""
    rows = kv_cache.prefill_sequences(policy.model, [ids[:-1] for _, ids in prompts])
    _charge_prefill(policy, prompts, flop_counter)
    return rows


def _charge_prefill(policy: Policy, prompts: Sequence[tuple[str, list[int]]], flop_counter: FlopCounter) -> None:
    for key, ids in prompts:
        flop_counter.add_flops(key, policy.size, "prefill", 0, len(ids) - 1, num_head_positions=0)


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
    """Draw every job's continuation, `batch_size` rows at a time.

    Args:
        candidates: K, how many tokens to record per position (capped at the vocabulary).
        keep_cache: return each row's cache; a server's drafts have empty rows.
        keep_tilt: record how the sampler differs from π, if it does.

    Raises:
        ValueError: NaN or infinite logits, what a server refuses, or a tilt or an end that a server cannot tell.
        ConnectionError: a server that fails or does not answer.
    """
    drafts: list[GenerationOutput] = []
    prompts: dict[_PrefixKey, Tensor] = {}
    for begin in range(0, len(requests), batch_size):
        batch, later = requests[begin : begin + batch_size], requests[begin + batch_size :]
        with flop_counter.measure_seconds([job.cost_key for job in batch]):
            caches = _prepare_request_caches(policy, batch, prompts, flop_counter)
            if policy.backend is None:
                made = _generate_batch(
                    policy, batch, caches, sampling, top_k_candidates, return_cache, return_log_importance_weight
                )
            elif return_log_importance_weight and build_warpers(sampling):
                raise ValueError(
                    "a server does not tell how its sampler differs from the policy: metropolis needs "
                    "temperature 1, and no top_k, top_p or min_p, with vllm_url"
                )
            elif any(job.should_stop for job in batch):
                raise ValueError("a vLLM server draws whole responses, not their steps: leave out vllm_url")
            else:
                made = policy.backend.generate(policy, batch, sampling, top_k_candidates)
        for job, draft in zip(batch, made, strict=True):
            # A server is charged as if it had every prefix in its cache, as vLLM's prefix caching mostly does.
            flop_counter.add_flops(job.cost_key, policy.size, "decode", len(job.prefix_ids) - 1, len(draft.ids))
        drafts += made
        wanted = {_make_prefix_key(job) for job in later if job.cache is None}
        prompts = {prompt: row for prompt, row in prompts.items() if prompt in wanted}
    return drafts


@dataclass
class _DecodingBatch:
    """The rows still being drawn; `index` says which job each row is."""

    request_indices: Tensor  # [B] long
    tokens: Tensor  # [B] the token to feed next
    positions: Tensor  # [B] its position
    mask: Tensor  # [B, cached]
    uniforms: Tensor  # [B, longest limit] float64

    def select(self, keep: Tensor) -> _DecodingBatch:
        return _DecodingBatch(
            self.request_indices[keep], self.tokens[keep], self.positions[keep], self.mask[keep], self.uniforms[keep]
        )


@torch.no_grad()
def _generate_batch(
    policy: Policy,
    requests: Sequence[GenerationRequest],
    prefix_caches: list[Tensor],
    sampling: Sampling,
    num_candidates: int,
    return_cache: bool,
    return_log_importance_weight: bool,
) -> list[GenerationOutput]:
    cache, mask = kv_cache.stack_caches(prefix_caches, growable=True)
    rows = _init_decoding_batch(policy, requests, mask, sampling)
    limits = torch.tensor([job.max_new_tokens for job in requests], device=policy.device)
    stops = torch.tensor(sorted(policy.stop_ids), device=policy.device)
    warpers = build_warpers(sampling)
    ends = _StopTracker(policy, requests)
    steps: list[tuple[Tensor, ...]] = []
    caches: dict[int, Tensor] = {}
    while len(rows.request_indices):
        rows.mask = torch.cat((rows.mask, rows.mask.new_ones(len(rows.mask), 1)), dim=1)
        logits = _compute_next_logits(policy, rows, cache)
        allowed = logits.masked_fill(policy.forbidden_mask, -torch.inf)
        drawn = sample_tokens(allowed, rows.uniforms[:, len(steps)], warpers, sampling)
        top, logp = compute_top_candidates(logits, drawn, policy.forbidden_mask, num_candidates)
        steps.append(
            (
                rows.request_indices,
                drawn,
                top,
                logp,
                *(
                    [compute_log_importance_weight(allowed, top, warpers)]
                    if return_log_importance_weight and warpers
                    else []
                ),
            )
        )
        rows.tokens, rows.positions = drawn, rows.positions + 1
        done = (
            torch.isin(drawn, stops)
            | (limits[rows.request_indices] <= len(steps))
            | ends.find_ended(rows.request_indices, drawn)
        )
        if done.any():
            if return_cache:
                caches |= _extract_finished_caches(cache, rows, done)
            going = torch.nonzero(~done).squeeze(1)
            cache.batch_select_indices(going)
            rows = rows.select(going)
    return _collect_outputs(steps, requests, caches, policy)


class _StopTracker:
    """Which rows a stop string, or their job's own word, has ended. Jobs without either are not read."""

    def __init__(self, policy: Policy, requests: Sequence[GenerationRequest]):
        self.policy, self.requests = policy, requests
        self.ids: dict[int, list[int]] = {
            index: [] for index, job in enumerate(requests) if job.stop_strings or job.should_stop
        }

    def find_ended(self, index: Tensor, drawn: Tensor) -> Tensor:
        """[B] bool, the rows that end with the tokens just drawn."""
        ended = torch.zeros_like(index, dtype=torch.bool)
        if not self.ids:
            return ended
        for row, (number, token) in enumerate(zip(index.tolist(), drawn.tolist(), strict=True)):
            if number in self.ids:
                job, ids = self.requests[number], self.ids[number]
                ids.append(token)
                told = job.should_stop is not None and job.should_stop(token)  # it is told every token, whatever else ends the row
                ended[row] = told or job.is_finished(self.policy, ids)
        return ended


def _make_prefix_key(job: GenerationRequest) -> _PrefixKey:
    return job.cost_key, tuple(job.prefix_ids)


def _prepare_request_caches(
    policy: Policy, requests: Sequence[GenerationRequest], prompts: dict[_PrefixKey, Tensor], flop_counter: FlopCounter
) -> list[Tensor]:
    """Each job's cache; prompts without one are prefilled once, however many jobs and batches share them."""
    new = {
        _make_prefix_key(job): job for job in requests if job.cache is None and _make_prefix_key(job) not in prompts
    }
    if new:
        rows = prepare_prompt_caches(policy, [(job.cost_key, job.prefix_ids) for job in new.values()], flop_counter)
        prompts.update(zip(new, rows, strict=True))
    return [prompts[_make_prefix_key(job)] if job.cache is None else job.cache for job in requests]


def _init_decoding_batch(
    policy: Policy, requests: Sequence[GenerationRequest], mask: Tensor, sampling: Sampling
) -> _DecodingBatch:
    longest = max(job.max_new_tokens for job in requests)
    uniforms = torch.zeros(len(requests), longest, dtype=torch.float64)
    if sampling.temperature > 0:
        for row, job in enumerate(requests):
            if job.rng is None:
                raise ValueError("sampling needs a random stream for every job")
            uniforms[row, : job.max_new_tokens] = torch.from_numpy(job.rng.random(job.max_new_tokens))
    device = policy.device
    return _DecodingBatch(
        request_indices=torch.arange(len(requests), device=device),
        tokens=torch.tensor([job.prefix_ids[-1] for job in requests], device=device),
        positions=torch.tensor([len(job.prefix_ids) - 1 for job in requests], device=device),
        mask=mask,
        uniforms=uniforms.to(device),
    )


def _compute_next_logits(policy: Policy, rows: _DecodingBatch, cache: Cache) -> Tensor:
    """Logits [B, V] float32 after feeding each row's next token."""
    output = policy.model(
        input_ids=rows.tokens[:, None],
        attention_mask=kv_cache.build_attention_mask(rows.mask[:, :-1], 1, policy.model.dtype),
        position_ids=rows.positions[:, None],
        past_key_values=cache,
        use_cache=True,
    )
    logits = output.logits[:, -1].float()
    if not (logits < torch.inf).all():  # −inf only means that a token is impossible
        raise ValueError(f"{policy.name} gave NaN or infinite logits")
    return logits


def sample_tokens(logits: Tensor, uniforms: Tensor, warpers: LogitsProcessorList, sampling: Sampling) -> Tensor:
    """One token per row of logits [B, V] by inverting the CDF at `uniforms` [B] (arg max when greedy).

    The sum runs in float64, so that the draw hardly depends on rounding; a token of zero mass is never drawn.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    warped = warpers(torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device), logits)
    mass = warped.softmax(-1, dtype=torch.float64).cumsum(-1)
    target = uniforms[:, None] * mass[:, -1:]
    return torch.searchsorted(mass, target, right=True).squeeze(1).clamp(max=logits.shape[-1] - 1)


def compute_top_candidates(
    logits: Tensor, drawn: Tensor, forbidden: Tensor, num_candidates: int
) -> tuple[Tensor, Tensor]:
    """The `width` likeliest tokens of each row and their log π; the drawn token is always among them.

    Returns:
        ids [B, K] long and log-probabilities [B, K] float32 (−inf where forbidden).
    """
    logp = logits.log_softmax(-1).masked_fill(forbidden, -torch.inf)
    values, ids = logp.topk(min(num_candidates, logp.shape[-1]), dim=-1)
    absent = (ids != drawn[:, None]).all(-1)
    ids[absent, -1] = drawn[absent]
    values[absent, -1] = logp[absent].gather(1, drawn[absent, None]).squeeze(1)
    return ids, values


def compute_log_importance_weight(logits: Tensor, candidates: Tensor, warpers: LogitsProcessorList) -> Tensor:
    """log π less the log-probability that the sampler gives candidates [B, K]: [B, K], inf where it never draws one.

    Args:
        logits: [B, V], −inf at forbidden tokens.
    """
    warped = warpers(torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device), logits.clone())
    sampler, policy = (scores.log_softmax(-1).gather(1, candidates) for scores in (warped, logits))
    return torch.where(sampler == -torch.inf, torch.inf, policy - sampler)


def _extract_finished_caches(cache: Cache, rows: _DecodingBatch, done: Tensor) -> dict[int, Tensor]:
    indices = torch.nonzero(done).squeeze(1)
    end = rows.mask.shape[1]
    spans = [(begin, end) for begin in (rows.mask[indices] == 0).sum(1).tolist()]
    taken = kv_cache.unstack_caches(cache, indices, spans)
    return dict(zip(rows.request_indices[indices].tolist(), taken, strict=True))


def _collect_outputs(
    steps: list[tuple[Tensor, ...]], requests: Sequence[GenerationRequest], caches: dict[int, Tensor], policy: Policy
) -> list[GenerationOutput]:
    """Turn per-step columns (row index, drawn token, tables) into per-job drafts."""
    count = len(requests)
    lengths = torch.zeros(count, dtype=torch.long)
    ids = torch.zeros(count, len(steps), dtype=torch.long)
    tables = [torch.zeros(count, len(steps), *column.shape[1:], dtype=column.dtype) for column in steps[0][2:]]
    for step, (index, drawn, *columns) in enumerate(steps):
        index = index.cpu()
        lengths[index] = step + 1
        ids[index, step] = drawn.cpu()
        for table, column in zip(tables, columns, strict=True):
            table[index, step] = column.cpu()
    drafts = []
    for job, length in enumerate(lengths.tolist()):
        tokens = ids[job, :length].tolist()
        candidates, logp, *rest = [table[job, :length].clone() for table in tables]
        finished = requests[job].is_finished(policy, tokens)
        drafts.append(GenerationOutput(tokens, finished, candidates, logp, rest[0] if rest else None, caches.get(job)))
    return drafts
