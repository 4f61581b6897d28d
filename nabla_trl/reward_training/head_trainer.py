"""Train a head on the policy's own hidden states: which of its answers are correct?

The policy is frozen, so the states of all responses are computed once, and the head is trained on them in seconds to
minutes. They take T·d numbers of memory for a response of T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from trl import RewardConfig

from nabla_trl.gradient.objectives import Sample
from nabla_trl.gradient.state_head import StateHead, compute_probe
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.data import LabeledResponse, compute_hidden_states
from nabla_trl.reward_training.labels import TokenLabeler
from nabla_trl.reward_training.trainer import RewardOptions, RewardTrainingStats

MIN_STD = 1e-3  # of a component of the states, relative to the mean over components


@dataclass
class StateData:
    """States of N responses with their targets, one after the other.

    Attributes:
        states: [tokens, d] that predicted the tokens, so the first one of a response has read the prompt alone.
        targets: [tokens] 0 or 1: the response is correct (with step labels: free of error so far).
        ends: [N] index of each response's last state.
        lengths: [N] states of each response.
        correct: [N] bool.
        problem_indices: [N] the same number for responses to the same problem.
    """

    states: Tensor
    targets: Tensor
    ends: Tensor
    lengths: Tensor
    correct: Tensor
    problem_indices: Tensor


def train_state_head(
    labeled_responses: Sequence[LabeledResponse],
    output_dir: Path,
    *,
    policy: Policy,
    options: RewardOptions,
    config: RewardConfig,
    token_labels: TokenLabeler | None = None,
    batch_size: int = 64,
) -> RewardTrainingStats:
    """Train a head on labeled responses and write it to a folder, whole or not at all.

    The loss is the cross-entropy at every state, with the same weight for every response, and with
    `options.ranking_weight` that of Bradley-Terry between correct and wrong responses to one problem.

    Args:
        labeled_responses: the data. A repeated response counts as often as it is given.
        options: `head_width`, `ranking_weight` and `loss_type` are used. "pairs": Bradley-Terry alone.
        config: its learning rate, weight decay, batch size, maximum of steps and seed are used.
        token_labels: step labels. None where only the correctness of the answer is known.
        batch_size: responses that the policy reads together.

    Raises:
        ValueError: a loss that is not finite.
    """
    start = time.perf_counter()
    data, num_tokens, forward_flops = collect_states(labeled_responses, policy, token_labels, batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        head = StateHead(data.states.shape[1], options.head_width).to(data.states.device)
    head.mean.copy_(data.states.mean(0))
    std = data.states.std(0)
    head.std.copy_(std.clamp(min=MIN_STD * float(std.mean())))
    head.probe.copy_(compute_probe(policy.model))
    loss, num_states = _optimize(head, data, options, config)
    head.save(output_dir)
    return RewardTrainingStats(
        rows=len(labeled_responses),
        steps=_count_steps(config, len(labeled_responses)),
        tokens=num_tokens,
        flops=forward_flops + 6.0 * head.num_params * num_states,
        seconds=time.perf_counter() - start,
        loss=loss,
    )


def collect_states(
    labeled_responses: Sequence[LabeledResponse], policy: Policy, token_labels: TokenLabeler | None, batch_size: int
) -> tuple[StateData, int, float]:
    """Return states and targets, the number of tokens that the policy has read, and its FLOPs."""
    distinct = {id(response): response.sample for response in labeled_responses}
    states = dict(zip(distinct, compute_hidden_states(policy, list(distinct.values()), batch_size), strict=True))
    problems: dict[str, int] = {}
    lengths = torch.tensor([len(states[id(response)]) for response in labeled_responses])
    data = StateData(
        torch.cat([states[id(response)] for response in labeled_responses]),
        torch.cat([_build_targets(response, token_labels) for response in labeled_responses]),
        lengths.cumsum(0) - 1,
        lengths,
        torch.tensor([response.correct for response in labeled_responses]),
        torch.tensor(
            [problems.setdefault(response.sample.problem.id, len(problems)) for response in labeled_responses]
        ),
    )
    prompts = {tuple(sample.prompt_ids) for sample in distinct.values()}
    spans = [(0, len(prompt) - 1) for prompt in prompts]
    spans += [(len(sample.prompt_ids) - 1, len(sample.response_ids)) for sample in distinct.values()]
    flops = sum(policy.size.compute_forward_flops(*span, num_head_positions=0) for span in spans)
    return data, sum(count for _, count in spans), flops


def _build_targets(response: LabeledResponse, token_labels: TokenLabeler | None) -> Tensor:
    """Return [T] the target of each state. State t has read t tokens of the response."""
    sample: Sample = response.sample
    if token_labels is None:
        return torch.full((len(sample.response_ids),), float(response.correct))
    labels = token_labels.label_prefixes(sample.problem, sample.response_ids)
    return torch.tensor([True, *labels[:-1]]).float()


def _count_steps(config: RewardConfig, num_responses: int) -> int:
    if config.max_steps > 0:
        return config.max_steps
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return max(1, round(config.num_train_epochs * num_responses / rows))


def _optimize(head: StateHead, data: StateData, options: RewardOptions, config: RewardConfig) -> tuple[float, int]:
    """Train a head by AdamW with a cosine schedule. Return the mean loss and the number of states read."""
    optimizer = torch.optim.AdamW(head.layers.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    num_steps = _count_steps(config, len(data.lengths))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator = torch.Generator().manual_seed(config.seed)
    rows = min(len(data.lengths), config.per_device_train_batch_size * config.gradient_accumulation_steps)
    order, total, num_states = torch.zeros(0, dtype=torch.long), 0.0, 0
    by_problem = data.problem_indices.argsort(stable=True)
    for step in range(num_steps):
        if len(order) < rows:
            order = _shuffle_problems(data.problem_indices[by_problem], by_problem, generator)
        batch, order = order[:rows], order[rows:]
        loss, count = _compute_loss(head, data, batch, options)
        if not loss.isfinite():
            raise ValueError(f"the loss became {loss.item()} at step {step + 1}: lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        total, num_states = total + float(loss.detach()), num_states + count
    return total / num_steps, num_states


def _shuffle_problems(sorted_indices: Tensor, responses: Tensor, generator: torch.Generator) -> Tensor:
    """Return the responses with the problems in random order, so that a batch has several responses of each."""
    groups = responses.split(torch.unique_consecutive(sorted_indices, return_counts=True)[1].tolist())
    return torch.cat([groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()])


def _compute_loss(head: StateHead, data: StateData, batch: Tensor, options: RewardOptions) -> tuple[Tensor, int]:
    """Return the loss of a batch of responses, and how many states were read."""
    lengths = data.lengths[batch]
    ends = data.ends[batch] + 1
    tokens = torch.cat([torch.arange(int(end - n), int(end)) for end, n in zip(ends, lengths, strict=True)])
    scores = head(data.states[tokens])
    last = scores[lengths.cumsum(0) - 1]
    loss = scores.new_zeros(())
    if options.loss_type == "tokens":
        weights = (1.0 / lengths.float() / len(batch)).repeat_interleave(lengths).to(scores)
        losses = F.binary_cross_entropy_with_logits(scores, data.targets[tokens].to(scores), reduction="none")
        loss = loss + (weights * losses).sum()
    ranking_weight = options.ranking_weight if options.loss_type == "tokens" else 1.0
    if ranking_weight:
        same = data.problem_indices[batch][:, None] == data.problem_indices[batch]
        correct = data.correct[batch]
        winners, losers = (same & correct[:, None] & ~correct).nonzero(as_tuple=True)
        if len(winners):
            loss = loss + ranking_weight * F.softplus(last[losers] - last[winners]).mean()
    return loss, len(tokens)
