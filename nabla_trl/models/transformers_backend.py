"""Generation in this process: batched decoding that can start from prefix caches, and returns them.

The loop is our own instead of `model.generate`, because branching needs what `generate` does not return per row: the
cache of each sequence, the policy's candidates at each position, and randomness that belongs to the sequence and not
to the batch. Both give the same tokens where they overlap (tests/models/test_generation.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import Cache

from nabla_trl.models import kv_cache
from nabla_trl.models.generation import (
    build_warpers,
    compute_log_importance_weight,
    compute_top_candidates,
    sample_tokens,
)
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy, get_context_length
from nabla_trl.models.requests import GenerationOutput, GenerationRequest


class TransformersBackend:
    """Generates with `policy.model` itself (see `GenerationBackend`)."""

    returns_caches: ClassVar[bool] = True
    supports_should_stop: ClassVar[bool] = True

    def get_context_length(self, policy: Policy) -> int:
        return get_context_length(policy.model)

    def get_metadata(self) -> dict[str, str]:
        return {}

    def prefill(self, policy: Policy, sequences: Sequence[list[int]]) -> list[Tensor]:
        return kv_cache.prefill_sequences(policy.model, sequences)

    @torch.no_grad()
    def generate(
        self,
        policy: Policy,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        *,
        top_k_candidates: int = 1,
        return_cache: bool = False,
        return_log_importance_weight: bool = False,
    ) -> list[GenerationOutput]:
        """Decode all requests as one batch, from which rows leave as soon as they end.

        Raises:
            ValueError: NaN or infinite logits, or a request without rng where one is needed.
        """
        cache, mask = kv_cache.stack_caches([request.get_cache() for request in requests], growable=True)
        rows = _init_decoding_batch(policy, requests, mask, sampling)
        max_new_tokens = torch.tensor([request.max_new_tokens for request in requests], device=policy.device)
        stop_ids = torch.tensor(sorted(policy.stop_ids), device=policy.device)
        stop_tracker = _StopTracker(policy, requests)
        warpers = build_warpers(sampling)
        steps: list[list[Tensor]] = []  # of every decoding step: request indices, tokens and tables of the rows
        caches: dict[int, Tensor] = {}
        while len(rows.request_indices):
            rows.mask = torch.cat((rows.mask, rows.mask.new_ones(len(rows.mask), 1)), dim=1)
            logits = _compute_next_logits(policy, rows, cache)
            allowed = logits.masked_fill(policy.forbidden_mask, -torch.inf)
            tokens = sample_tokens(allowed, rows.uniforms[:, len(steps)], warpers, sampling)
            candidates, logp = compute_top_candidates(logits, tokens, policy.forbidden_mask, top_k_candidates)
            steps.append([rows.request_indices, tokens, candidates, logp])
            if return_log_importance_weight and warpers:
                steps[-1].append(compute_log_importance_weight(allowed, candidates, warpers))
            rows.tokens, rows.positions = tokens, rows.positions + 1
            done = (
                torch.isin(tokens, stop_ids)
                | (max_new_tokens[rows.request_indices] <= len(steps))
                | stop_tracker.find_ended(rows.request_indices, tokens)
            )
            if done.any():
                if return_cache:
                    caches |= _extract_finished_caches(cache, rows, done)
                remaining = torch.nonzero(~done).squeeze(1)
                cache.batch_select_indices(remaining)
                rows = rows.select(remaining)
        return _collect_outputs(steps, requests, caches, policy)


@dataclass
class _DecodingBatch:
    """The rows that have not ended yet."""

    request_indices: Tensor  # [B] long, the request of each row
    tokens: Tensor  # [B] the token to feed next
    positions: Tensor  # [B] its position
    mask: Tensor  # [B, cached]
    uniforms: Tensor  # [B, largest max_new_tokens] float64

    def select(self, indices: Tensor) -> _DecodingBatch:
        return _DecodingBatch(
            self.request_indices[indices],
            self.tokens[indices],
            self.positions[indices],
            self.mask[indices],
            self.uniforms[indices],
        )


def _init_decoding_batch(
    policy: Policy, requests: Sequence[GenerationRequest], mask: Tensor, sampling: Sampling
) -> _DecodingBatch:
    uniforms = torch.zeros(len(requests), max(r.max_new_tokens for r in requests), dtype=torch.float64)
    if sampling.temperature > 0:
        for row, request in enumerate(requests):
            numbers = request.get_rng().random(request.max_new_tokens)
            uniforms[row, : request.max_new_tokens] = torch.from_numpy(numbers)
    return _DecodingBatch(
        request_indices=torch.arange(len(requests), device=policy.device),
        tokens=torch.tensor([request.prefix_ids[-1] for request in requests], device=policy.device),
        positions=torch.tensor([len(request.prefix_ids) - 1 for request in requests], device=policy.device),
        mask=mask,
        uniforms=uniforms.to(policy.device),
    )


def _compute_next_logits(policy: Policy, rows: _DecodingBatch, cache: Cache) -> Tensor:
    """Return the logits [B, V] float32 after each row's next token."""
    output = policy.model(
        input_ids=rows.tokens[:, None],
        attention_mask=kv_cache.build_attention_mask(rows.mask[:, :-1], 1, policy.model.dtype),
        position_ids=rows.positions[:, None],
        past_key_values=cache,
        use_cache=True,
    )
    logits = output.logits[:, -1].float()
    if not (logits < torch.inf).all():  # −inf is fine: it only means that a token is impossible
        raise ValueError(f"{policy.name} gave NaN or infinite logits")
    return logits


class _StopTracker:
    """Finds the rows that a stop string or `should_stop` ends. Requests without either are skipped."""

    def __init__(self, policy: Policy, requests: Sequence[GenerationRequest]):
        self.policy, self.requests = policy, requests
        self.ids: dict[int, list[int]] = {
            index: [] for index, request in enumerate(requests) if request.stop_strings or request.should_stop
        }

    def find_ended(self, request_indices: Tensor, tokens: Tensor) -> Tensor:
        """Return [B] bool, the rows that end with the tokens just sampled."""
        ended = torch.zeros_like(request_indices, dtype=torch.bool)
        if not self.ids:
            return ended
        for row, (index, token) in enumerate(zip(request_indices.tolist(), tokens.tolist(), strict=True)):
            if index in self.ids:
                request, ids = self.requests[index], self.ids[index]
                ids.append(token)
                # should_stop sees every token, whatever else ends the row.
                stop = request.should_stop is not None and request.should_stop(token)
                ended[row] = stop or self.policy.is_finished(request.join_response(ids), request.stop_strings)
        return ended


def _extract_finished_caches(cache: Cache, rows: _DecodingBatch, done: Tensor) -> dict[int, Tensor]:
    """Return the kv rows of the requests that are done."""
    indices = torch.nonzero(done).squeeze(1)
    end = rows.mask.shape[1]
    spans = [(begin, end) for begin in (rows.mask[indices] == 0).sum(1).tolist()]
    kv_rows = kv_cache.unstack_caches(cache, indices, spans)
    return dict(zip(rows.request_indices[indices].tolist(), kv_rows, strict=True))


def _collect_outputs(
    steps: list[list[Tensor]], requests: Sequence[GenerationRequest], caches: dict[int, Tensor], policy: Policy
) -> list[GenerationOutput]:
    """Turn the columns of the decoding steps into one output per request."""
    count = len(requests)
    lengths = torch.zeros(count, dtype=torch.long)
    ids = torch.zeros(count, len(steps), dtype=torch.long)
    tables = [torch.zeros(count, len(steps), *column.shape[1:], dtype=column.dtype) for column in steps[0][2:]]
    for step, (request_indices, tokens, *columns) in enumerate(steps):
        indices = request_indices.cpu()
        lengths[indices] = step + 1
        ids[indices, step] = tokens.cpu()
        for table, column in zip(tables, columns, strict=True):
            table[indices, step] = column.cpu()
    outputs = []
    for index, (request, length) in enumerate(zip(requests, lengths.tolist(), strict=True)):
        new_ids = ids[index, :length].tolist()
        candidates, logp, *weights = [table[index, :length].clone() for table in tables]
        finished = policy.is_finished(request.join_response(new_ids), request.stop_strings)
        outputs.append(
            GenerationOutput(new_ids, finished, candidates, logp, weights[0] if weights else None, caches.get(index))
        )
    return outputs
