"""Training a scalar reward whose gradient means something: token targets, relaxed inputs, gradient matching.

A score head read at every response token is trained to tell whether the response is free of error so far (step
labels) or will be right (outcome labels). On *relaxed inputs* the embedding at each position is a mixture of the
response's token and the policy's alternatives, in random shares and places, and the target is the probability that
a draw from the mixture is free of error: exact with step labels (the running product of the right tokens' weight);
without them the mean of the model's own predictions for hard draws. A reward that has seen mixtures is smooth
between tokens, where its gradient is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trl import RewardTrainer

from nabla_trl.training.trainers import FiniteLossMixin

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class RelaxedLossConfig:
    """What `TokenRewardTrainer` adds to the loss on hard tokens.

    Attributes:
        relaxed: share of the rows that are mixtures, in [0, 1].
        draws: hard draws per mixture whose mean prediction is the target where there are no step labels.
        matching: weight of gradient matching; 0 = none. Needs attention with a double backward ("eager").
    """

    relaxed_fraction: float = 0.0
    target_samples: int = 2
    gradient_matching: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.relaxed_fraction <= 1 or self.target_samples < 1 or not self.gradient_matching >= 0:
            raise ValueError("relaxed must be in [0, 1], draws at least 1 and matching at least 0")


@dataclass
class TokenCollator:
    """Rows of `reward_data.token_rows` → one right-padded batch of relaxed sequences.

    Batch: `attention_mask`, `hard` [B, L], the response itself; `ids`, `weights` [B, L, K+1], the tokens mixed at each
    position (prompt, tail and hard rows have weight 1 on their own token, which comes first); `offered` [B, L, K+1]
    bool, the policy's other tokens; `targets` [B, L], NaN where there is none; `estimated` [B] bool, rows whose
    targets are to be estimated by draws; `last` [B] index of the position that is the reward. Shares are drawn from
    torch's global generator, which the Trainer seeds and restores.
    """

    pad_id: int
    relaxed_fraction: float

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        width = max((len(row["ids"][0]) for row in rows if row["ids"]), default=1)
        size = (len(rows), length)
        batch = {
            "attention_mask": torch.zeros(size, dtype=torch.long),
            "hard": torch.full(size, self.pad_id),
            "ids": torch.full((*size, width), self.pad_id),
            "weights": torch.zeros(*size, width),
            "offered": torch.zeros(*size, width, dtype=torch.bool),
            "targets": torch.full(size, torch.nan),
            "estimated": torch.zeros(len(rows), dtype=torch.bool),
            "last": torch.tensor([len(row["input_ids"]) - 1 for row in rows]),
        }
        batch["weights"][..., 0] = 1
        for index, row in enumerate(rows):
            self._fill_row(batch, index, row)
        return batch

    def _fill_row(self, batch: dict[str, Tensor], index: int, row: dict[str, Any]) -> None:
        total, begin = len(row["input_ids"]), row["start"]
        ids, policy = torch.tensor(row["ids"]), torch.tensor(row["weights"])
        end = begin + len(ids)
        hard = torch.tensor(row["input_ids"])
        batch["attention_mask"][index, :total] = 1
        batch["hard"][index, :total] = hard
        batch["ids"][index, :total, 0] = hard
        if not row["ids"]:  # nothing but a stop token, which the reward's template drops
            batch["targets"][index, begin:total] = row["outcome"]
            return
        batch["ids"][index, begin:end, : ids.shape[1]] = ids
        batch["offered"][index, begin:end, : ids.shape[1]] = (policy > 0) & (ids != hard[begin:end, None])
        shares = sample_mixture_weights(len(ids), self.relaxed_fraction)
        mixed = shares[:, None] * policy
        mixed[:, 0] += 1 - shares
        batch["weights"][index, begin:end, : ids.shape[1]] = mixed
        if row["right"]:
            free = (mixed * torch.tensor(row["right"])).sum(-1).cumprod(0)
            batch["targets"][index, begin:end] = free
            batch["targets"][index, end:total] = free[-1] * row["closed"]
        else:
            batch["targets"][index, begin:total] = row["outcome"]
            batch["estimated"][index] = bool(shares.any())


def sample_mixture_weights(length: int, relaxed_fraction: float) -> Tensor:
    """[T] shares α_t of the policy's candidates: with probability `relaxed` one α in (0, 1) at random places, else 0.

    Half of the relaxed rows mix every position, the others each position with a probability of their own.
    """
    if torch.rand(()) >= relaxed_fraction:
        return torch.zeros(length)
    density = 1.0 if torch.rand(()) < 0.5 else float(torch.rand(()))
    return torch.rand(()) * (torch.rand(length) < density)


class PairRewardTrainer(FiniteLossMixin, RewardTrainer):
    """TRL's RewardTrainer on rows of ids (`chosen_ids`, `rejected_ids`, perhaps `margin`)."""


class TokenRewardTrainer(FiniteLossMixin, RewardTrainer):
    """TRL's RewardTrainer on single responses with a target per token, read by the score head at every position.

    Args:
        options: relaxed inputs and gradient matching.
        kwargs: as for RewardTrainer; the dataset holds rows of `reward_data.token_rows`.
    """

    def __init__(self, *args: Any, loss_config: RelaxedLossConfig, **kwargs: Any):
        self.loss_config = loss_config
        super().__init__(*args, **kwargs)
        self.data_collator = TokenCollator(self.processing_class.pad_token_id, loss_config.relaxed_fraction)

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # rows of ids already

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "start", "ids", "weights", "right", "outcome", "closed"]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        mask = inputs["attention_mask"]
        embed = self.accelerator.unwrap_model(model).get_input_embeddings()
        embeds = mix_embeddings(embed, inputs["ids"], inputs["weights"])
        if self.loss_config.gradient_matching:
            embeds.requires_grad_(True)
        scores = compute_token_scores(model, embeds, mask)
        targets = self._estimate_targets(model, inputs)
        labelled = ~targets.isnan()
        loss = F.binary_cross_entropy_with_logits(scores[labelled].float(), targets[labelled])
        if self.loss_config.gradient_matching:
            loss = loss + self.loss_config.gradient_matching * self._compute_matching_loss(
                model, embed, inputs, embeds, scores
            )
        self._log_reward_metrics(scores.detach(), targets, inputs)
        return (loss, scores) if return_outputs else loss

    def _estimate_targets(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Known targets, and for relaxed rows without step labels the mean prediction for hard draws from them."""
        targets, rows = inputs["targets"], inputs["estimated"]
        if not rows.any():
            return targets
        ids, weights, mask = inputs["ids"][rows], inputs["weights"][rows], inputs["attention_mask"][rows]
        embed = self.accelerator.unwrap_model(model).get_input_embeddings()
        total = torch.zeros_like(targets[rows])
        with torch.no_grad():
            for _ in range(self.loss_config.target_samples):
                picks = torch.multinomial(weights.flatten(0, 1), 1).view(*mask.shape, 1)
                total += compute_token_scores(model, embed(ids.gather(-1, picks).squeeze(-1)), mask).float().sigmoid()
        targets = targets.clone()
        targets[rows] = torch.where(targets[rows].isnan(), targets[rows], total / self.loss_config.target_samples)
        return targets

    def _compute_matching_loss(
        self, model: nn.Module, embed: nn.Module, inputs: dict[str, Tensor], embeds: Tensor, scores: Tensor
    ) -> Tensor:
        """Mean gap (Huber) of first-order and true change of reward under one random swap per row."""
        rows = torch.arange(len(scores), device=scores.device)
        reward = scores[rows, inputs["last"]]
        (slopes,) = torch.autograd.grad(reward.sum(), embeds, create_graph=True)
        places, tokens = sample_token_swaps(inputs)
        swapped = inputs["hard"].clone()
        swapped[rows, places] = tokens
        mask = inputs["attention_mask"]
        with torch.no_grad():
            plain = compute_token_scores(model, embed(inputs["hard"]), mask)[rows, inputs["last"]]
            true = compute_token_scores(model, embed(swapped), mask)[rows, inputs["last"]] - plain
        step = embed(tokens) - embed(inputs["hard"][rows, places])
        return F.smooth_l1_loss((slopes[rows, places] * step.detach()).sum(-1), true)

    @torch.no_grad()
    def _log_reward_metrics(self, scores: Tensor, targets: Tensor, inputs: dict[str, Tensor]) -> None:
        """Metrics under the names of RewardTrainer's: reward statistics, and accuracy at the last position."""
        mode = "train" if self.model.training else "eval"
        rows = torch.arange(len(scores), device=scores.device)
        rewards, wanted = scores[rows, inputs["last"]].float(), targets[rows, inputs["last"]]
        agree = ((rewards > 0) == (wanted > 0.5)).float().mean()
        gathered = self.accelerator.gather(rewards)
        self._metrics[mode]["mean_reward"].append(gathered.mean().item())
        self._metrics[mode]["accuracy"].append(self.accelerator.gather(agree).mean().item())


def mix_embeddings(embed: nn.Module, ids: Tensor, weights: Tensor) -> Tensor:
    """Σ_k weights[b, t, k]·e(ids[b, t, k]): [B, L, d]."""
    table = embed(ids)
    return torch.einsum("btk,btkd->btd", weights.to(table), table)


def sample_token_swaps(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One position [B] and one of the policy's other tokens there [B] per row, uniform over what was offered."""
    ids = inputs["ids"]
    offered = inputs["offered"].clone()
    offered[~offered.flatten(1).any(1), :, 0] = (
        True  # no alternative anywhere: the token itself, which changes nothing
    )
    flat = offered.flatten(1).float()
    picks = torch.multinomial(flat, 1).squeeze(1)
    places, columns = picks // ids.shape[2], picks % ids.shape[2]
    rows = torch.arange(len(ids), device=ids.device)
    return places, ids[rows, places, columns]


@contextmanager
def _capture_token_scores(model: nn.Module) -> Iterator[list[Tensor]]:
    """Catches what the score head gives at every position; the model's own forward pools it."""
    caught: list[Tensor] = []
    head = next(module for name, module in model.named_modules() if name.rpartition(".")[2] == "score")
    handle = head.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        yield caught
    finally:
        handle.remove()


def compute_token_scores(model: nn.Module, embeds: Tensor, mask: Tensor) -> Tensor:
    """[B, L] scores at every position, through the model's forward, so that data-parallel wrappers see it."""
    with _capture_token_scores(model) as caught:
        model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    return caught[-1].squeeze(-1)
