"""Every response of a policy to a prompt, with its exact probability, its reward and its cost: small worlds only."""

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
    """All N responses to one prompt: those that end in a stop token, and those that are cut at the longest length.

    Attributes:
        prompt: ids.
        logp: [N] float64 log π, over the tokens that may be drawn.
        steps: per response [T] log π of its tokens as the policy's own head has it, forbidden tokens included.
    """

    problem: Problem
    prompt_ids: list[int]
    responses: list[tuple[int, ...]]
    logp: np.ndarray
    token_logps: list[Tensor]

    @cached_property
    def index_by_response(self) -> dict[tuple[int, ...], int]:
        """The place of each response."""
        return {response: place for place, response in enumerate(self.responses)}


@dataclass(frozen=True)
class EnumeratedScores:
    """Rewards [N] of a tree's responses, and FLOPs: of drawing and of scoring each [N], and of the bare prompt."""

    rewards: np.ndarray
    sampling_flops: np.ndarray
    scoring_flops: np.ndarray
    prompt_sampling_flops: float
    prompt_scoring_flops: float


def count_responses(policy: Policy, max_new_tokens: int) -> float:
    """Number of responses of at most `length` tokens; infinite beyond 1e15."""
    stops = sum(not policy.forbidden_mask[stop] for stop in policy.stop_ids)
    going = int((~policy.forbidden_mask).sum()) - stops
    total, prefixes = 0, 1
    for _ in range(max_new_tokens):
        total, prefixes = total + prefixes * stops, prefixes * going
        if total + prefixes > 1e15:
            return math.inf
    return total + prefixes


@torch.no_grad()
def enumerate_responses(
    policy: Policy,
    problem: Problem,
    max_new_tokens: int,
    *,
    max_responses: int = MAX_RESPONSES,
    batch_size: int = 1024,
) -> EnumeratedResponses:
    """Every response of at most `length` tokens, by one plain forward for each beginning of one.

    Raises:
        ValueError: more than `limit` of them, a prompt that cannot be encoded or leaves no room, or NaN logits.
    """
    prompt = policy.encode(problem)
    _check_size(policy, problem, len(prompt), max_new_tokens, max_responses)
    drawable = torch.nonzero(~policy.forbidden_mask.cpu()).squeeze(1)
    stops = torch.isin(drawable, torch.tensor(sorted(policy.stop_ids)))
    begun, logp = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
    steps = torch.zeros(1, 0)
    responses: list[tuple[int, ...]] = []
    logps, walks = list[Tensor](), list[Tensor]()
    for size in range(1, max_new_tokens + 1):
        logits = _compute_next_logits(policy, prompt, begun, batch_size)
        ids = _append_tokens(begun, drawable.expand(len(begun), -1))
        total = logp[:, None] + logits[:, drawable].log_softmax(-1)
        walk = _append_tokens(steps, logits.log_softmax(-1)[:, drawable].float())
        ends = stops if size < max_new_tokens else torch.ones_like(stops)
        responses += map(tuple, ids[:, ends].flatten(0, 1).tolist())
        logps.append(total[:, ends].flatten())
        walks += walk[:, ends].flatten(0, 1).unbind()
        begun, logp, steps = ids[:, ~ends].flatten(0, 1), total[:, ~ends].flatten(), walk[:, ~ends].flatten(0, 1)
    return EnumeratedResponses(problem, prompt, responses, torch.cat(logps).numpy(), walks)


def compute_exact_distributions(
    policy: Policy, enumerated_responses: Sequence[EnumeratedResponses], *, batch_size: int = 1024
) -> list[np.ndarray]:
    """[N] the exact law of another policy, a trained one, over the responses of each tree.

    Raises:
        ValueError: it reads another prompt, or may draw other tokens.
    """
    laws = []
    for tree in enumerated_responses:
        length = max(map(len, tree.responses))
        own = enumerate_responses(
            policy, tree.problem, length, max_responses=len(tree.responses), batch_size=batch_size
        )
        if own.prompt_ids != tree.prompt_ids or own.responses != tree.responses:
            raise ValueError(
                f"{policy.name} has another vocabulary, template or stop token than the policy that "
                f"{tree.problem.id} was written down for: its law is one over other responses"
            )
        laws.append(np.exp(own.logp))
    return laws


def score_enumerated_responses(enumerated: EnumeratedResponses, policy: Policy, reward: Reward) -> EnumeratedScores:
    """Rewards of all responses, and what a method is charged for each, as best-of-N and the search are.

    Raises:
        ValueError: a response that the reward cannot read, or NaN.
    """
    bare = Sample(enumerated.problem, enumerated.prompt_ids, [], cost_key_override="prompt")
    meter = FlopCounter()
    [memos] = reward.compute_prompt_caches([bare], meter)
    samples = [
        Sample(
            enumerated.problem,
            enumerated.prompt_ids,
            list(ids),
            str(place),
            DrawInfo(policy.model, torch.tensor(ids)[:, None], walk[:, None]),
        )
        for place, (ids, walk) in enumerate(zip(enumerated.responses, enumerated.token_logps, strict=True))
    ]
    values, _ = reward.score(samples, [memos] * len(samples), flop_counter=meter)
    bad = next((place for place, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is not None:
        said = policy.decode(list(enumerated.responses[bad]))
        raise ValueError(
            f"{enumerated.problem.id}: {reward.name} gives {said!r} the reward {values[bad]}, not a finite one"
        )
    begin = len(enumerated.prompt_ids) - 1
    return EnumeratedScores(
        rewards=np.array(values),
        sampling_flops=np.array([policy.size.compute_forward_flops(begin, len(ids)) for ids in enumerated.responses]),
        scoring_flops=np.array([meter.get_cost(sample.cost_key).flops for sample in samples]),
        prompt_sampling_flops=policy.size.compute_forward_flops(0, begin, num_head_positions=0),
        prompt_scoring_flops=meter.get_cost(bare.cost_key).flops,
    )


def _check_size(policy: Policy, problem: Problem, prompt_length: int, max_new_tokens: int, max_responses: int) -> None:
    total = count_responses(policy, max_new_tokens)
    if total > max_responses:
        said = "more than 1e15" if total == math.inf else f"{total:,.0f}"
        raise ValueError(
            f"{policy.name} has {said} responses of up to {max_new_tokens} tokens, of which at most {max_responses:,} can be written "
            "down: lower max_new_tokens or take a smaller vocabulary"
        )
    if prompt_length + max_new_tokens > policy.context_length:
        raise ValueError(
            f"{problem.id}: {prompt_length} tokens of the prompt and {max_new_tokens} of the response do not fit the context of "
            f"{policy.name}, {policy.context_length}"
        )


def _compute_next_logits(policy: Policy, prompt_ids: list[int], prefixes_BT: Tensor, batch_size: int) -> Tensor:
    """[B, V] float64 logits after the prompt and each beginning [B, T] of a response."""
    rows = torch.cat((torch.tensor(prompt_ids).expand(len(prefixes_BT), -1), prefixes_BT), dim=1)
    parts = [policy.model(input_ids=some.to(policy.device)).logits[:, -1] for some in rows.split(batch_size)]
    logits = torch.cat(parts).double().cpu()
    if not (logits < torch.inf).all():
        raise ValueError(f"{policy.name} gave NaN or infinite logits")
    return logits


def _append_tokens(prefixes_BT: Tensor, tokens_BK: Tensor) -> Tensor:
    """[B, K, T + 1] each row [B, T] with each of its K continuations [B, K] behind it."""
    return torch.cat((prefixes_BT[:, None].expand(-1, tokens_BK.shape[1], -1), tokens_BK[..., None]), dim=-1)
