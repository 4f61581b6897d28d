"""Enumerate all responses of a small policy to a prompt, with exact probabilities, rewards and costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nabla_trl.gradient.objectives import DrawInfo, Sample
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem

MAX_RESPONSES = 20_000  # responses per prompt


@dataclass(frozen=True)
class EnumeratedResponses:
    """All N responses to one prompt: those that end in a stop token, and those that are cut at the maximum length.

    Attributes:
        logp: [N] float64 log π over the tokens that may be sampled.
        token_logps: per response, [T] log π of its tokens over all tokens, including those that are never sampled.
    """

    problem: Problem
    prompt_ids: list[int]
    responses: list[tuple[int, ...]]
    logp: np.ndarray
    token_logps: list[Tensor]

    @cached_property
    def index_by_response(self) -> dict[tuple[int, ...], int]:
        """The index of each response."""
        return {response: index for index, response in enumerate(self.responses)}


@dataclass(frozen=True)
class EnumeratedScores:
    """Rewards [N] of all responses and the FLOPs of sampling and scoring each of them [N], without their prompt.

    Attributes:
        prompt_sampling_flops, prompt_scoring_flops: FLOPs of the prompt, in the policy and in the reward.
    """

    rewards: np.ndarray
    sampling_flops: np.ndarray
    scoring_flops: np.ndarray
    prompt_sampling_flops: float
    prompt_scoring_flops: float


def count_responses(policy: Policy, max_new_tokens: int) -> float:
    """Return the number of responses of at most `max_new_tokens` tokens, or infinity if it is above 1e15."""
    num_stops = sum(not policy.forbidden_mask[stop] for stop in policy.stop_ids)
    num_others = int((~policy.forbidden_mask).sum()) - num_stops
    num_ended, num_prefixes = 0, 1
    for _ in range(max_new_tokens):
        num_ended, num_prefixes = num_ended + num_prefixes * num_stops, num_prefixes * num_others
        if num_ended + num_prefixes > 1e15:
            return math.inf
    return num_ended + num_prefixes


@torch.no_grad()
def enumerate_responses(
    policy: Policy,
    problem: Problem,
    max_new_tokens: int,
    *,
    max_responses: int = MAX_RESPONSES,
    batch_size: int = 1024,
) -> EnumeratedResponses:
    """Enumerate all responses of at most `max_new_tokens` tokens, with one plain forward pass for each prefix.

    Raises:
        ValueError: if there are more than `max_responses`, the prompt cannot be encoded or leaves no space for a
            response, or a logit is NaN.
    """
    prompt = policy.encode(problem)
    total = count_responses(policy, max_new_tokens)
    if total > max_responses:
        count = "more than 1e15" if total == math.inf else f"{total:,.0f}"
        raise ValueError(
            f"{policy.name} has {count} responses of up to {max_new_tokens} tokens, of which at most "
            f"{max_responses:,} can be enumerated: lower max_new_tokens or take a smaller vocabulary"
        )
    if len(prompt) + max_new_tokens > policy.context_length:
        raise ValueError(
            f"{problem.id}: {len(prompt)} tokens of the prompt and {max_new_tokens} of the response do not fit the "
            f"context of {policy.name}, {policy.context_length}"
        )
    vocabulary = torch.nonzero(~policy.forbidden_mask.cpu()).squeeze(1)  # tokens that may be sampled
    is_stop = torch.isin(vocabulary, torch.tensor(sorted(policy.stop_ids)))
    prefixes, prefix_logp = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
    prefix_token_logps = torch.zeros(1, 0)
    responses: list[tuple[int, ...]] = []
    logps, token_logps = list[Tensor](), list[Tensor]()
    for length in range(1, max_new_tokens + 1):
        logits = _compute_next_logits(policy, prompt, prefixes, batch_size)
        ids = _append_tokens(prefixes, vocabulary.expand(len(prefixes), -1))
        logp = prefix_logp[:, None] + logits[:, vocabulary].log_softmax(-1)
        by_token = _append_tokens(prefix_token_logps, logits.log_softmax(-1)[:, vocabulary].float())
        ends = is_stop if length < max_new_tokens else torch.ones_like(is_stop)
        responses += map(tuple, ids[:, ends].flatten(0, 1).tolist())
        logps.append(logp[:, ends].flatten())
        token_logps += by_token[:, ends].flatten(0, 1).unbind()
        prefixes, prefix_logp = ids[:, ~ends].flatten(0, 1), logp[:, ~ends].flatten()
        prefix_token_logps = by_token[:, ~ends].flatten(0, 1)
    return EnumeratedResponses(problem, prompt, responses, torch.cat(logps).numpy(), token_logps)


def compute_exact_distributions(
    policy: Policy, enumerated_responses: Sequence[EnumeratedResponses], *, batch_size: int = 1024
) -> list[np.ndarray]:
    """Return the exact distribution [N] of another policy over the responses to each prompt.

    Raises:
        ValueError: if the policy encodes a prompt in another way or samples other tokens.
    """
    distributions = []
    for expected in enumerated_responses:
        max_length, count = max(map(len, expected.responses)), len(expected.responses)
        actual = enumerate_responses(policy, expected.problem, max_length, max_responses=count, batch_size=batch_size)
        if actual.prompt_ids != expected.prompt_ids or actual.responses != expected.responses:
            raise ValueError(
                f"{policy.name} has another vocabulary, template or stop token than the policy whose responses to "
                f"{expected.problem.id} were enumerated: its distribution is one over other responses"
            )
        distributions.append(np.exp(actual.logp))
    return distributions


def score_enumerated_responses(enumerated: EnumeratedResponses, policy: Policy, reward: Reward) -> EnumeratedScores:
    """Return the rewards of all responses and their FLOPs, counted as in best-of-N and the search.

    Raises:
        ValueError: if the reward cannot read a response, or its reward is not finite.
    """
    empty = Sample(enumerated.problem, enumerated.prompt_ids, [], cost_key_override="prompt")
    flop_counter = FlopCounter()
    [caches] = reward.compute_prompt_caches([empty], flop_counter)
    samples = [
        Sample(
            enumerated.problem,
            enumerated.prompt_ids,
            list(ids),
            str(index),
            DrawInfo(policy.model, torch.tensor(ids)[:, None], token_logp[:, None]),
        )
        for index, (ids, token_logp) in enumerate(zip(enumerated.responses, enumerated.token_logps, strict=True))
    ]
    values, _ = reward.score(samples, [caches] * len(samples), flop_counter=flop_counter)
    for value, ids in zip(values, enumerated.responses, strict=True):
        if not math.isfinite(value):
            response = policy.decode(list(ids))
            raise ValueError(
                f"{enumerated.problem.id}: {reward.name} gives {response!r} the reward {value}, not a finite one"
            )
    begin = len(enumerated.prompt_ids) - 1
    return EnumeratedScores(
        rewards=np.array(values),
        sampling_flops=np.array([policy.size.compute_forward_flops(begin, len(ids)) for ids in enumerated.responses]),
        scoring_flops=np.array([flop_counter.get_cost(sample.cost_key).flops for sample in samples]),
        prompt_sampling_flops=policy.size.compute_forward_flops(0, begin, num_head_positions=0),
        prompt_scoring_flops=flop_counter.get_cost(empty.cost_key).flops,
    )


def _compute_next_logits(policy: Policy, prompt_ids: list[int], prefixes_BT: Tensor, batch_size: int) -> Tensor:
    """Return the float64 logits [B, V] after the prompt and each prefix [B, T] of a response."""
    rows = torch.cat((torch.tensor(prompt_ids).expand(len(prefixes_BT), -1), prefixes_BT), dim=1)
    batches = [policy.model(input_ids=batch.to(policy.device)).logits[:, -1] for batch in rows.split(batch_size)]
    logits = torch.cat(batches).double().cpu()
    if not (logits < torch.inf).all():
        raise ValueError(f"{policy.name} gave NaN or infinite logits")
    return logits


def _append_tokens(prefixes_BT: Tensor, tokens_BK: Tensor) -> Tensor:
    """Return [B, K, T + 1] each prefix [B, T] followed by each of its K tokens [B, K]."""
    return torch.cat((prefixes_BT[:, None].expand(-1, tokens_BK.shape[1], -1), tokens_BK[..., None]), dim=-1)
