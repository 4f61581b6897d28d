"""Every response of a policy to a prompt, with its exact probability, its reward and its cost: small worlds only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nabla_trl.gradient.objectives import Known, Sample
from nabla_trl.models.flops import Meter
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem

LIMIT = 20_000  # responses per prompt


@dataclass(frozen=True)
class Tree:
    """All N responses to one prompt: those that end in a stop token, and those that are cut at the longest length.

    Attributes:
        prompt: ids.
        logp: [N] float64 log π, over the tokens that may be drawn.
        steps: per response [T] log π of its tokens as the policy's own head has it, forbidden tokens included.
    """

    problem: Problem
    prompt: list[int]
    responses: list[tuple[int, ...]]
    logp: np.ndarray
    steps: list[Tensor]

    @cached_property
    def places(self) -> dict[tuple[int, ...], int]:
        """The place of each response."""
        return {response: place for place, response in enumerate(self.responses)}


@dataclass(frozen=True)
class Scored:
    """Rewards [N] of a tree's responses, and FLOPs: of drawing and of scoring each [N], and of the bare prompt."""

    rewards: np.ndarray
    drawing: np.ndarray
    scoring: np.ndarray
    drawing_prompt: float
    scoring_prompt: float


def count(policy: Policy, length: int) -> float:
    """Number of responses of at most `length` tokens; infinite beyond 1e15."""
    stops = sum(not policy.forbidden[stop] for stop in policy.stop_ids)
    going = int((~policy.forbidden).sum()) - stops
    total, prefixes = 0, 1
    for _ in range(length):
        total, prefixes = total + prefixes * stops, prefixes * going
        if total + prefixes > 1e15:
            return math.inf
    return total + prefixes


@torch.no_grad()
def enumerate_tree(
    policy: Policy, problem: Problem, length: int, *, limit: int = LIMIT, batch_size: int = 1024
) -> Tree:
    """Every response of at most `length` tokens, by one plain forward for each beginning of one.

    Raises:
        ValueError: more than `limit` of them, a prompt that cannot be encoded or leaves no room, or NaN logits.
    """
    prompt = policy.encode(problem)
    _check_size(policy, problem, len(prompt), length, limit)
    drawable = torch.nonzero(~policy.forbidden.cpu()).squeeze(1)
    stops = torch.isin(drawable, torch.tensor(sorted(policy.stop_ids)))
    begun, logp = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
    steps = torch.zeros(1, 0)
    responses: list[tuple[int, ...]] = []
    logps, walks = list[Tensor](), list[Tensor]()
    for size in range(1, length + 1):
        logits = _next_logits(policy, prompt, begun, batch_size)
        ids = _extended(begun, drawable.expand(len(begun), -1))
        total = logp[:, None] + logits[:, drawable].log_softmax(-1)
        walk = _extended(steps, logits.log_softmax(-1)[:, drawable].float())
        ends = stops if size < length else torch.ones_like(stops)
        responses += map(tuple, ids[:, ends].flatten(0, 1).tolist())
        logps.append(total[:, ends].flatten())
        walks += walk[:, ends].flatten(0, 1).unbind()
        begun, logp, steps = ids[:, ~ends].flatten(0, 1), total[:, ~ends].flatten(), walk[:, ~ends].flatten(0, 1)
    return Tree(problem, prompt, responses, torch.cat(logps).numpy(), walks)


def law_of(policy: Policy, trees: Sequence[Tree], *, batch_size: int = 1024) -> list[np.ndarray]:
    """[N] the exact law of another policy, a trained one, over the responses of each tree.

    Raises:
        ValueError: it reads another prompt, or may draw other tokens.
    """
    laws = []
    for tree in trees:
        length = max(map(len, tree.responses))
        own = enumerate_tree(policy, tree.problem, length, limit=len(tree.responses), batch_size=batch_size)
        if own.prompt != tree.prompt or own.responses != tree.responses:
            raise ValueError(
                f"{policy.name} has another vocabulary, template or stop token than the policy that "
                f"{tree.problem.id} was written down for: its law is one over other responses"
            )
        laws.append(np.exp(own.logp))
    return laws


def score_tree(tree: Tree, policy: Policy, reward: Reward) -> Scored:
    """Rewards of all responses, and what a method is charged for each, as best-of-N and the search are.

    Raises:
        ValueError: a response that the reward cannot read, or NaN.
    """
    bare = Sample(tree.problem, tree.prompt, [], account="prompt")
    meter = Meter()
    [memos] = reward.prompt_memos([bare], meter)
    samples = [
        Sample(
            tree.problem,
            tree.prompt,
            list(ids),
            str(place),
            Known(policy.model, torch.tensor(ids)[:, None], walk[:, None]),
        )
        for place, (ids, walk) in enumerate(zip(tree.responses, tree.steps, strict=True))
    ]
    values, _ = reward.score(samples, [memos] * len(samples), meter=meter)
    bad = next((place for place, value in enumerate(values) if not math.isfinite(value)), None)
    if bad is not None:
        said = policy.decode(list(tree.responses[bad]))
        raise ValueError(f"{tree.problem.id}: {reward.name} gives {said!r} the reward {values[bad]}, not a finite one")
    begin = len(tree.prompt) - 1
    return Scored(
        rewards=np.array(values),
        drawing=np.array([policy.size.forward_flops(begin, len(ids)) for ids in tree.responses]),
        scoring=np.array([meter.cost(sample.key).flops for sample in samples]),
        drawing_prompt=policy.size.forward_flops(0, begin, head=0),
        scoring_prompt=meter.cost(bare.key).flops,
    )


def _check_size(policy: Policy, problem: Problem, prompt: int, length: int, limit: int) -> None:
    total = count(policy, length)
    if total > limit:
        said = "more than 1e15" if total == math.inf else f"{total:,.0f}"
        raise ValueError(
            f"{policy.name} has {said} responses of up to {length} tokens, of which at most {limit:,} can be written "
            "down: lower max_new_tokens or take a smaller vocabulary"
        )
    if prompt + length > policy.context:
        raise ValueError(
            f"{problem.id}: {prompt} tokens of the prompt and {length} of the response do not fit the context of "
            f"{policy.name}, {policy.context}"
        )


def _next_logits(policy: Policy, prompt: list[int], begun: Tensor, batch_size: int) -> Tensor:
    """[B, V] float64 logits after the prompt and each beginning [B, T] of a response."""
    rows = torch.cat((torch.tensor(prompt).expand(len(begun), -1), begun), dim=1)
    parts = [policy.model(input_ids=some.to(policy.device)).logits[:, -1] for some in rows.split(batch_size)]
    logits = torch.cat(parts).double().cpu()
    if not (logits < torch.inf).all():
        raise ValueError(f"{policy.name} gave NaN or infinite logits")
    return logits


def _extended(rows: Tensor, more: Tensor) -> Tensor:
    """[B, K, T + 1] each row [B, T] with each of its K continuations [B, K] behind it."""
    return torch.cat((rows[:, None].expand(-1, more.shape[1], -1), more[..., None]), dim=-1)
