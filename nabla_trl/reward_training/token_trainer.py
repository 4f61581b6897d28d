"""Train a scalar reward with a meaningful gradient: token targets, relaxed inputs and gradient matching.

The score head is read at every response token. It learns to predict whether the response is free of error so far (step
labels) or will be correct (answer labels).

On *relaxed inputs* the embedding at each position is a mixture of the response's token and the policy's alternatives,
with random shares at random positions. The target is the probability that a sample from the mixture is free of error.
With step labels the target is exact: the running product of the weights of correct tokens. Without them it is the mean
of the model's own predictions for sampled tokens. A reward that is trained on mixtures is smooth between tokens, where
its gradient is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trl import RewardTrainer

from nabla_trl.gradient.embeddings import has_embeddings_per_layer
from nabla_trl.training.trainers import FiniteLossMixin

if TYPE_CHECKING:
    from datasets import Dataset

ROW_COLUMNS = (
    "input_ids",
    "response_start",
    "candidate_ids",
    "candidate_weights",
    "correct",
    "answer_correct",
    "ends_with_stop",
)


@dataclass(frozen=True)
class RelaxedLossConfig:
    """What `TokenRewardTrainer` adds to the loss on the tokens themselves.

    Attributes:
        relaxed_fraction: fraction of the rows that are mixtures, in [0, 1].
        target_samples: samples per mixture whose mean prediction is the target where there are no step labels.
        gradient_matching: weight of gradient matching. 0 = none. Needs attention with a double backward ("eager").
    """

    relaxed_fraction: float = 0.0
    target_samples: int = 2
    gradient_matching: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.relaxed_fraction <= 1 or self.target_samples < 1 or not self.gradient_matching >= 0:
            raise ValueError(
                "relaxed_fraction must be in [0, 1], target_samples at least 1 and gradient_matching at least 0"
            )


@dataclass
class TokenCollator:
    """Rows of `build_token_rows` → one right-padded batch of relaxed sequences.

    The shares of mixtures are drawn from torch's global generator, which the Trainer seeds and restores. A batch of B
    rows of L tokens with K candidates at most holds:

    - `input_ids`, `attention_mask` [B, L]: the responses themselves.
    - `candidate_ids`, `candidate_weights` [B, L, K+1]: the tokens mixed at each position. The response's own token
      comes first. Prompts, turn ends and rows that are not relaxed have weight 1 on their own token.
    - `is_alternative` [B, L, K+1] bool: the policy's other tokens.
    - `targets` [B, L]: NaN where there is none.
    - `needs_estimate` [B] bool: rows whose targets are estimated from samples.
    - `last_position` [B]: the position whose score is the reward.
    """

    pad_id: int
    relaxed_fraction: float

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        width = max((len(row["candidate_ids"][0]) for row in rows if row["candidate_ids"]), default=1)
        size = (len(rows), length)
        batch = {
            "attention_mask": torch.zeros(size, dtype=torch.long),
            "input_ids": torch.full(size, self.pad_id),
            "candidate_ids": torch.full((*size, width), self.pad_id),
            "candidate_weights": torch.zeros(*size, width),
            "is_alternative": torch.zeros(*size, width, dtype=torch.bool),
            "targets": torch.full(size, torch.nan),
            "needs_estimate": torch.zeros(len(rows), dtype=torch.bool),
            "last_position": torch.tensor([len(row["input_ids"]) - 1 for row in rows]),
        }
        batch["candidate_weights"][..., 0] = 1
        for index, row in enumerate(rows):
            self._fill_row({name: values[index] for name, values in batch.items()}, row)
        return batch

    def _fill_row(self, views: dict[str, Tensor], row: dict[str, Any]) -> None:
        """Write a row into its views of the batch."""
        input_ids, begin = torch.tensor(row["input_ids"]), row["response_start"]
        total = len(input_ids)
        views["attention_mask"][:total] = 1
        views["input_ids"][:total] = input_ids
        views["candidate_ids"][:total, 0] = input_ids
        if not row["candidate_ids"]:  # nothing but a stop token, which the reward's template drops
            views["targets"][begin:total] = row["answer_correct"]
            return
        ids, policy_weights = torch.tensor(row["candidate_ids"]), torch.tensor(row["candidate_weights"])
        end, width = begin + len(ids), ids.shape[1]
        shares = sample_mixture_weights(len(ids), self.relaxed_fraction)
        weights = shares[:, None] * policy_weights
        weights[:, 0] += 1 - shares
        views["candidate_ids"][begin:end, :width] = ids
        views["candidate_weights"][begin:end, :width] = weights
        views["is_alternative"][begin:end, :width] = (policy_weights > 0) & (ids != input_ids[begin:end, None])
        if row["correct"]:
            error_free = (weights * torch.tensor(row["correct"])).sum(-1).cumprod(0)
            views["targets"][begin:end] = error_free
            views["targets"][end:total] = error_free[-1] * row["ends_with_stop"]
        else:
            views["targets"][begin:total] = row["answer_correct"]
            views["needs_estimate"].fill_(bool(shares.any()))


def sample_mixture_weights(length: int, relaxed_fraction: float) -> Tensor:
    """Return [T] random shares α_t of the policy's candidates.

    With probability `relaxed_fraction` a row is relaxed: one α in (0, 1) at random positions, 0 elsewhere. Half of the
    relaxed rows mix every position. The others mix each position with a random probability.
    """
    if torch.rand(()) >= relaxed_fraction:
        return torch.zeros(length)
    density = 1.0 if torch.rand(()) < 0.5 else float(torch.rand(()))
    return torch.rand(()) * (torch.rand(length) < density)


class PairRewardTrainer(FiniteLossMixin, RewardTrainer):
    """TRL's RewardTrainer on rows of ids (`chosen_ids`, `rejected_ids` and optionally `margin`)."""


class TokenRewardTrainer(FiniteLossMixin, RewardTrainer):
    """TRL's RewardTrainer on single responses, with a score and a target at every token.

    Args:
        loss_config: relaxed inputs and gradient matching.
        kwargs: as for RewardTrainer. The dataset holds rows of `build_token_rows`.

    Raises:
        ValueError: a model that reads embeddings per layer, which a mixture of its input embeddings would leave out.
    """

    def __init__(self, *args: Any, loss_config: RelaxedLossConfig, **kwargs: Any):
        self.loss_config = loss_config
        super().__init__(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        if has_embeddings_per_layer(model.get_base_model() if hasattr(model, "get_base_model") else model):
            raise ValueError(
                f"{model.config.model_type} reads embeddings of each token in every layer, and targets per token mix "
                "the input embeddings alone: train it on pairs of responses"
            )
        self.data_collator = TokenCollator(self.processing_class.pad_token_id, loss_config.relaxed_fraction)

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # already rows of ids

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(ROW_COLUMNS)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        embed = self.accelerator.unwrap_model(model).get_input_embeddings()
        embeds = mix_embeddings(embed, inputs["candidate_ids"], inputs["candidate_weights"])
        if self.loss_config.gradient_matching:
            embeds.requires_grad_(True)
        scores = compute_token_scores(model, embeds, inputs["attention_mask"])
        targets = self._estimate_targets(model, embed, inputs)
        has_target = ~targets.isnan()
        loss = F.binary_cross_entropy_with_logits(scores[has_target].float(), targets[has_target])
        if self.loss_config.gradient_matching:
            matching_loss = self._compute_matching_loss(model, embed, inputs, embeds, scores)
            loss = loss + self.loss_config.gradient_matching * matching_loss
        self._log_reward_metrics(scores.detach(), targets, inputs)
        return (loss, scores) if return_outputs else loss

    def _estimate_targets(self, model: nn.Module, embed: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the targets. Rows that need an estimate get the mean prediction for tokens sampled from them."""
        targets, rows = inputs["targets"], inputs["needs_estimate"]
        if not rows.any():
            return targets
        ids, weights = inputs["candidate_ids"][rows], inputs["candidate_weights"][rows]
        mask = inputs["attention_mask"][rows]
        total = torch.zeros_like(targets[rows])
        with torch.no_grad():
            for _ in range(self.loss_config.target_samples):
                columns = torch.multinomial(weights.flatten(0, 1), 1).view(*mask.shape, 1)
                sampled_ids = ids.gather(-1, columns).squeeze(-1)
                total += compute_token_scores(model, embed(sampled_ids), mask).float().sigmoid()
        targets = targets.clone()
        targets[rows] = torch.where(targets[rows].isnan(), targets[rows], total / self.loss_config.target_samples)
        return targets

    def _compute_matching_loss(
        self, model: nn.Module, embed: nn.Module, inputs: dict[str, Tensor], embeds: Tensor, scores: Tensor
    ) -> Tensor:
        """Return the mean Huber loss between first-order and true change of reward under one random swap per row."""
        input_ids, mask, last = inputs["input_ids"], inputs["attention_mask"], inputs["last_position"]
        rows = torch.arange(len(scores), device=scores.device)
        (gradients,) = torch.autograd.grad(scores[rows, last].sum(), embeds, create_graph=True)
        positions, tokens = sample_token_swaps(inputs)
        swapped_ids = input_ids.clone()
        swapped_ids[rows, positions] = tokens
        with torch.no_grad():
            reward = compute_token_scores(model, embed(input_ids), mask)[rows, last]
            true_change = compute_token_scores(model, embed(swapped_ids), mask)[rows, last] - reward
        step = embed(tokens) - embed(input_ids[rows, positions])
        return F.smooth_l1_loss((gradients[rows, positions] * step.detach()).sum(-1), true_change)

    @torch.no_grad()
    def _log_reward_metrics(self, scores: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> None:
        """Log RewardTrainer's metrics: the mean reward, and the accuracy at the last position."""
        mode = "train" if self.model.training else "eval"
        rows = torch.arange(len(scores), device=scores.device)
        rewards, last_targets = (values[rows, inputs["last_position"]] for values in (scores.float(), targets))
        accuracy = ((rewards > 0) == (last_targets > 0.5)).float().mean()
        self._metrics[mode]["mean_reward"].append(self.accelerator.gather(rewards).mean().item())
        self._metrics[mode]["accuracy"].append(self.accelerator.gather(accuracy).mean().item())


def mix_embeddings(embed: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """Return the mixed embeddings Σ_k weights[b, t, k]·e(ids[b, t, k]), [B, L, d]."""
    embeddings = embed(ids)
    return torch.einsum("btk,btkd->btd", weights.to(embeddings), embeddings)


def sample_token_swaps(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sample per row one position and one of the policy's alternatives there, uniformly over all alternatives.

    A row without any alternative gets its own token, which changes nothing.

    Args:
        inputs: a batch of `TokenCollator`.

    Returns:
        positions [B] and tokens [B].
    """
    ids, is_choice = inputs["candidate_ids"], inputs["is_alternative"].clone()
    is_choice[~is_choice.flatten(1).any(1), :, 0] = True
    choices = torch.multinomial(is_choice.flatten(1).float(), 1).squeeze(1)
    positions, columns = choices // ids.shape[2], choices % ids.shape[2]
    return positions, ids[torch.arange(len(ids), device=ids.device), positions, columns]


def compute_token_scores(model: nn.Module, embeds: Tensor, mask: Tensor) -> Tensor:
    """Return the score head's output at every position, [B, L].

    A hook on the head catches the output, because the model's own forward pools it. The forward is the model's, so
    that data-parallel wrappers see the call.

    Args:
        model: a sequence classifier with a head named `score`, perhaps wrapped.
        embeds: input embeddings [B, L, d].
        mask: attention mask [B, L].
    """
    outputs: list[Tensor] = []
    head = next(module for name, module in model.named_modules() if name.rpartition(".")[2] == "score")
    handle = head.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    finally:
        handle.remove()
    return outputs[-1].squeeze(-1)
