"""TRL's trainers, on token ids: what is scored, trained on and compared is never tokenised again."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainingArguments
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer, SFTTrainer

from nabla_trl.traces.datasets import IGNORE_INDEX
from nabla_trl.training.peft import find_last_checkpoint
from nabla_trl.utils.formatting import format_error

Config = TypeVar("Config", bound=TrainingArguments)

# Steps in a row whose responses differ while all their rewards are the same: nothing can be learned from that.
MAX_CONSTANT_REWARD_STEPS = 10


class ResponseScorer(Protocol):
    """Problem ids and response ids → one reward each; −inf: the reward cannot read that response.

    Attributes:
        components: means of the reward's parts over the last call, by name, for the log.
    """

    components: dict[str, float]

    def __call__(self, prompts: Sequence[str], responses: Sequence[list[int]]) -> list[float]: ...


def convert_config(config_class: type[Config], config: TrainingArguments, **options: Any) -> Config:
    """The configuration of one of TRL's trainers, with another's arguments that every trainer has, and `options`.

    Others of the same name may mean another thing (`loss_type`).
    """
    shared = [option.name for option in fields(TrainingArguments) if option.init]
    return config_class(**{name: getattr(config, name) for name in shared} | options)


class FiniteLossMixin:
    """Trainer mix-in: a loss that is not finite stops the training before the step is taken.

    Raises:
        ValueError: the step is named; checkpoints that the trainer has saved stay where they are.
    """

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not loss.isfinite():
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            raise ValueError(f"the loss became {loss.item()} at step {step}: lower learning_rate")
        return loss


class AtomicCheckpointMixin:
    """Trainer mix-in: a checkpoint that cannot be written leaves nothing behind, and the ones before it alone.

    Raises:
        ValueError: the disk is full, or the folder cannot be written to; the step is named.
    """

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, folder = self.state.global_step, Path(self.args.output_dir)  # type: ignore[attr-defined]
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
            kept = find_last_checkpoint(folder)
            raise ValueError(
                f"cannot save the checkpoint of step {step}: {format_error(error)}; "
                + (f"{kept} is intact: run the same command to go on from there" if kept else "there is none yet")
            ) from error


class TokenIdsSFTTrainer(AtomicCheckpointMixin, FiniteLossMixin, SFTTrainer):
    """TRL's SFTTrainer on rows of `input_ids` and `labels`."""


class WeightedSFTTrainer(TokenIdsSFTTrainer):
    """The same with a `weight` for each row: Σ_i w_i · NLL_i over the number of trained tokens."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        collate: Any = self.data_collator  # type: ignore[has-type]

        def with_weights(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
            return collate(rows) | {"weight": torch.tensor([row["weight"] for row in rows])}

        self.data_collator = with_weights

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, "weight"]  # type: ignore[has-type]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        each = F.cross_entropy(
            outputs.logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
        ).sum(1)
        count = (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        loss = (inputs["weight"] * each).sum() / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # tokens are counted over all of them, gradients averaged
        return (loss, outputs) if return_outputs else loss


class TokenIdsDPOTrainer(AtomicCheckpointMixin, FiniteLossMixin, DPOTrainer):
    """TRL's DPOTrainer on rows of ids (`prompt_ids`, `chosen_ids`, `rejected_ids`)."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset


class _OnlineTrainerMixin(AtomicCheckpointMixin, FiniteLossMixin):
    """Trainer mix-in for RLOO and GRPO: prompts are problem ids, rewards are of the ids that were drawn.

    Args:
        encoded: problem id → prompt ids.
        scorer: gives the rewards; `name` is what they are logged under.
        labels: rewards are labels, which may well be all the same.
        kwargs: as for TRL's trainer; the dataset holds the column `prompt`, problem ids.

    Raises:
        ValueError: in training, a reward that is NaN or +inf, or the same for all responses of many steps, though they
            differ. The step is named and its checkpoint saved.
    """

    def __init__(
        self,
        *args: Any,
        prompt_ids: dict[str, list[int]],
        scorer: ResponseScorer,
        reward_name: str = "reward",
        allow_constant_rewards: bool = False,
        **kwargs: Any,
    ):
        self.prompt_ids, self.scorer, self.reward_name, self.allow_constant_rewards = (
            prompt_ids,
            scorer,
            reward_name,
            allow_constant_rewards,
        )
        self._num_constant_steps = 0
        super().__init__(*args, reward_funcs=[_make_reward_function(reward_name, scorer)], **kwargs)  # type: ignore[call-arg]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.prompt_ids[prompt] for prompt in prompts], None, {}

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[str], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        bad = rewards.isnan() | rewards.isposinf()
        if bad.any():
            self._save_and_raise(f"a reward became {rewards[bad][0].item()}")
        unreadable = rewards.isneginf().any(1)
        mode = "train" if self.model.training else "eval"  # type: ignore[attr-defined]
        self._metrics[mode]["unreadable_ratio"].append(unreadable.float().mean().item())  # type: ignore[attr-defined]
        for part, mean in self.scorer.components.items():
            shares = self.accelerator.gather(torch.tensor([mean], device=rewards.device))  # type: ignore[attr-defined]
            self._metrics[mode][f"rewards/{self.reward_name}/{part}"].append(shares.mean().item())  # type: ignore[attr-defined]
        self._check_reward_variance(
            rewards[~unreadable].sum(1), self._do_responses_differ(prompts, completion_ids_list, rewards.device)
        )
        return rewards.masked_fill(unreadable[:, None], math.nan)  # TRL leaves these out of the baseline

    def _do_responses_differ(self, prompts: list[str], responses: list[list[int]], device: torch.device) -> bool:
        """Some responses to the same problem differ, in any process."""
        pairs = set(zip(prompts, map(tuple, responses), strict=True))
        here = torch.tensor([len(pairs) > len(set(prompts))], device=device)
        return bool(self.accelerator.gather(here).any())  # type: ignore[attr-defined]

    def _check_reward_variance(self, rewards: Tensor, differ: bool) -> None:
        same = differ and not self.allow_constant_rewards and bool((rewards == rewards[:1]).all())
        self._num_constant_steps = self._num_constant_steps + 1 if same else 0
        if self._num_constant_steps >= MAX_CONSTANT_REWARD_STEPS:
            value = rewards[0].item() if len(rewards) else -math.inf
            self._save_and_raise(
                f"every reward of the last {MAX_CONSTANT_REWARD_STEPS} steps was {value:g}, so nothing can be learned"
            )

    def _save_and_raise(self, why: str) -> None:
        """Every process comes here together: the rewards are gathered."""
        step = self.state.global_step  # type: ignore[attr-defined]
        if step:
            self._save_checkpoint(self.model, None)  # type: ignore[attr-defined]
        kept = f"checkpoint-{step} is kept" if step else "nothing was trained"
        raise ValueError(f"{why} at step {step + 1}; {kept} in {self.args.output_dir}")  # type: ignore[attr-defined]


class TokenIdsRLOOTrainer(_OnlineTrainerMixin, RLOOTrainer):
    """TRL's RLOOTrainer: maximises E[r] − β KL(q ‖ π), β · log-ratio inside the reward of each response."""


class TokenIdsGRPOTrainer(_OnlineTrainerMixin, GRPOTrainer):
    """TRL's GRPOTrainer: the KL is a term of the loss, token by token."""


def _make_reward_function(reward_name: str, scorer: ResponseScorer) -> Callable[..., list[float]]:
    def score(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return scorer(prompts, completion_ids)

    score.__name__ = reward_name  # what TRL logs it under
    return score
