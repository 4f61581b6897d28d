"""Run TRL's trainers on token ids, so that what is scored, trained on and compared is never tokenized again."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainingArguments
from trl import DistillationTrainer, DPOTrainer, GRPOTrainer, RLOOTrainer, SFTTrainer

from nabla_trl.traces.datasets import IGNORE_INDEX
from nabla_trl.training.peft import find_last_checkpoint
from nabla_trl.training.rollouts import default_generation_config
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.formatting import format_error

Config = TypeVar("Config", bound=TrainingArguments)

# Training stops after so many steps in a row whose responses differ while all their rewards are the same.
MAX_CONSTANT_REWARD_STEPS = 10
# Probability of all other tokens that counts as none, since 1 − Σ p is not more exact in float32.
MIN_REST = 1e-6


class ResponseScorer(Protocol):
    """Scorer of responses by their ids.

    Attributes:
        components: means of the reward's parts over the last call, by name, for the log.
    """

    components: dict[str, float]

    def __call__(self, prompts: Sequence[str], responses: Sequence[list[int]]) -> list[float]:
        """Return one reward per pair of problem id and response, −inf where the reward cannot read the response."""

    def compute_flops_per_response(self) -> float:
        """Return the mean FLOPs of scoring one response."""


def convert_config(config_class: type[Config], config: TrainingArguments, **options: Any) -> Config:
    """Return the configuration of one of TRL's trainers with the general arguments of another one, and `options`.

    Only arguments that every trainer has are taken. Others of the same name may have another meaning (`loss_type`).
    """
    shared = [option.name for option in fields(TrainingArguments) if option.init]
    return config_class(**{name: getattr(config, name) for name in shared} | options)


def check_amounts(config: TrainingArguments) -> None:
    """Refuse epochs, batches and step sizes that a trainer takes, but cannot train with.

    Raises:
        ValueError: names all of them.
    """
    checks = Checks()
    checks.require(
        config.max_steps > 0 or 0 < config.num_train_epochs < math.inf,
        f"num_train_epochs must be positive, not {config.num_train_epochs:g}",
    )
    checks.require(
        0 <= config.learning_rate < math.inf, f"learning_rate must be at least 0, not {config.learning_rate:g}"
    )
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        value = getattr(config, name)
        checks.require(value >= 1, f"{name} must be at least 1, not {value}")
    max_length = getattr(config, "max_length", None)
    checks.require(max_length is None or max_length >= 1, f"max_length must be at least 1, not {max_length}")
    if str(getattr(config.save_strategy, "value", config.save_strategy)) == "steps":
        checks.require(config.save_steps > 0, f"save_steps must be positive, not {config.save_steps:g}")
    checks.raise_faults()


def check_seeds(config: TrainingArguments, *, num_derived: int = 1) -> None:
    """Refuse seeds that a trainer cannot take, before anything is loaded.

    Args:
        num_derived: number of consecutive seeds that are used, from `config.seed` on.

    Raises:
        ValueError: `seed` beyond what numpy takes, or `data_seed` beyond what torch takes.
    """
    # TRL adds the number of the process to the seed of samples.
    largest = 2**32 - num_derived - config.world_size + 1
    checks = Checks()
    checks.require(0 <= config.seed <= largest, f"seed must be between 0 and {largest}, not {config.seed}")
    checks.require(
        config.data_seed is None or 0 <= config.data_seed < 2**63,
        f"data_seed must be between 0 and {2**63 - 1}, not {config.data_seed}",
    )
    checks.raise_faults()


class FiniteLossMixin:
    """Trainer mix-in that stops the training before the step if the loss is not finite.

    Raises:
        ValueError: with the step. Checkpoints that the trainer has saved stay where they are.
    """

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if not loss.isfinite():
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            raise ValueError(f"the loss became {loss.item()} at step {step}: lower learning_rate")
        return loss


class AtomicCheckpointMixin:
    """Trainer mix-in that removes a checkpoint that cannot be written, and keeps those before it.

    Raises:
        ValueError: the disk is full, or the folder cannot be written to. The step is named.
    """

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, folder = self.state.global_step, Path(self.args.output_dir)  # type: ignore[attr-defined]
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
            last_checkpoint = find_last_checkpoint(folder)
            raise ValueError(
                f"cannot save the checkpoint of step {step}: {format_error(error)}; "
                + (
                    f"{last_checkpoint} is intact: run the same command to continue from there"
                    if last_checkpoint
                    else "no earlier checkpoint exists"
                )
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save each tied weight once: gathered copies of sharded weights do not show that they are one."""
        tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", None) or {}  # type: ignore[attr-defined]
        if state_dict is not None:
            copies = {name for name, source in tied.items() if source in state_dict}
            state_dict = {name: weight for name, weight in state_dict.items() if name not in copies}
        super()._save(output_dir, state_dict)  # type: ignore[misc]


class TokenIdsSFTTrainer(AtomicCheckpointMixin, FiniteLossMixin, SFTTrainer):
    """TRL's SFTTrainer on rows of `input_ids` and `labels`."""


class WeightedSFTTrainer(TokenIdsSFTTrainer):
    """TokenIdsSFTTrainer on rows with a `weight`: the loss is Σ_i w_i · NLL_i over the number of trained tokens."""

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
        row_losses = F.cross_entropy(
            outputs.logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
        ).sum(1)
        count = (labels != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        loss = (inputs["weight"] * row_losses).sum() / count
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # tokens are summed, gradients averaged
        return (loss, outputs) if return_outputs else loss


def compute_lumped_kl(student_logp: Tensor, target_ids: Tensor, target_logp: Tensor, *, is_reverse: bool) -> Tensor:
    """Return the KL [...] in nats between the policy p and a target q, where all tokens without a target are one.

    It is at most the KL over the whole vocabulary (data processing), and equal to it if every token has a target.

    Args:
        student_logp: [..., V] log p.
        target_ids: [..., K] distinct tokens.
        target_logp: [..., K] log q of these tokens. -inf: no target, the token counts to the rest.
        is_reverse: KL(p ‖ q) in place of KL(q ‖ p).
    """
    has_target = target_logp > -torch.inf
    logp = student_logp.gather(-1, target_ids)
    probs, target_probs = logp.exp() * has_target, target_logp.exp()
    log_ratio = (logp - target_logp).masked_fill(~has_target, 0.0)
    rest, target_rest = ((1 - values.sum(-1)).clamp(min=0) for values in (probs, target_probs))
    rest_log_ratio = rest.clamp(min=MIN_REST).log() - target_rest.clamp(min=MIN_REST).log()
    if is_reverse:
        return (probs * log_ratio).sum(-1) + rest * rest_log_ratio
    return -(target_probs * log_ratio).sum(-1) - target_rest * rest_log_ratio


class SoftTargetTrainer(TokenIdsSFTTrainer):
    """TokenIdsSFTTrainer on rows with a target distribution for each response token: the loss is the mean KL to it.

    TRL's GKDTrainer does not fit, since it computes its targets by a teacher model in each step.

    Args:
        divergence: "forward_kl" or "reverse_kl".
        kwargs: as for TRL's trainer. The rows are those of `build_soft_target_rows`.
    """

    def __init__(self, *args: Any, divergence: str, **kwargs: Any):
        self.is_reverse = divergence == "reverse_kl"
        super().__init__(*args, **kwargs)
        collate: Any = self.data_collator  # type: ignore[has-type]

        def with_targets(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
            batch: dict[str, Tensor] = collate(rows)
            shape = (*batch["labels"].shape, max(row["top_k"] for row in rows))
            ids, logp = torch.zeros(shape, dtype=torch.long), torch.full(shape, -torch.inf)
            for index, row in enumerate(rows):
                end, top_k = len(row["input_ids"]), row["top_k"]
                span = slice(end - len(row["target_ids"]) // top_k, end)
                ids[index, span, :top_k] = torch.tensor(row["target_ids"]).view(-1, top_k)
                logp[index, span, :top_k] = torch.tensor(row["target_logp"]).view(-1, top_k)
            return batch | {"target_ids": ids, "target_logp": logp}

        self.data_collator = with_targets

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # TRL would cut the targets to max_length entries

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, "target_ids", "target_logp", "top_k"]  # type: ignore[has-type]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        is_trained = inputs["labels"][:, 1:] != IGNORE_INDEX
        logp = outputs.logits[:, :-1][is_trained].float().log_softmax(-1)
        targets = (inputs[name][:, 1:][is_trained] for name in ("target_ids", "target_logp"))
        total = compute_lumped_kl(logp, *targets, is_reverse=self.is_reverse).sum()
        loss = total / (is_trained.sum() if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # tokens are summed, gradients averaged
        return (loss, outputs) if return_outputs else loss


class TokenIdsDPOTrainer(AtomicCheckpointMixin, FiniteLossMixin, DPOTrainer):
    """TRL's DPOTrainer on rows of ids (`prompt_ids`, `chosen_ids`, `rejected_ids`)."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset


class _PromptIdsMixin(AtomicCheckpointMixin, FiniteLossMixin):
    """Trainer mix-in for methods that sample: prompts are problem ids, whose token ids `prompt_ids` holds."""

    prompt_ids: dict[str, list[int]]

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.prompt_ids[prompt] for prompt in prompts], None, {}

    def _generate_single_turn(self, *args: Any) -> Any:
        with default_generation_config(self.accelerator.unwrap_model(self.model)):  # type: ignore[attr-defined]
            return super()._generate_single_turn(*args)  # type: ignore[misc]


class _OnlineTrainerMixin(_PromptIdsMixin):
    """Trainer mix-in for RLOO and GRPO: prompts are problem ids, rewards are of the sampled token ids.

    Args:
        prompt_ids: problem id → prompt ids.
        scorer: gives the rewards.
        reward_name: what the rewards are logged under.
        allow_constant_rewards: for rewards that are labels, which may all be the same.
        kwargs: as for TRL's trainer. The dataset holds the column `prompt`, problem ids.

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
        self.prompt_ids, self.scorer = prompt_ids, scorer
        self.reward_name, self.allow_constant_rewards = reward_name, allow_constant_rewards
        self._num_constant_steps = 0

        def score(prompts: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
            return scorer(prompts, completion_ids)

        score.__name__ = reward_name  # what TRL logs it under
        super().__init__(*args, reward_funcs=[score], **kwargs)  # type: ignore[call-arg]

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[str], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        invalid = rewards.isnan() | rewards.isposinf()
        if invalid.any():
            self._save_and_raise(f"a reward became {rewards[invalid][0].item()}")
        unscorable = rewards.isneginf().any(1)
        mode = "train" if self.model.training else "eval"  # type: ignore[attr-defined]
        self._metrics[mode]["unscorable_ratio"].append(unscorable.float().mean().item())  # type: ignore[attr-defined]
        for part, mean in self.scorer.components.items():
            process_means = self.accelerator.gather(torch.tensor([mean], device=rewards.device))  # type: ignore[attr-defined]
            name = f"rewards/{self.reward_name}/{part}"
            self._metrics[mode][name].append(process_means.mean().item())  # type: ignore[attr-defined]
        distinct = set(zip(prompts, map(tuple, completion_ids_list), strict=True))
        differ = torch.tensor([len(distinct) > len(set(prompts))], device=rewards.device)
        if not self.allow_constant_rewards:
            do_any_differ = bool(self.accelerator.gather(differ).any())  # type: ignore[attr-defined]
            self._check_reward_variance(rewards[~unscorable].sum(1), do_any_differ)
        return rewards.masked_fill(unscorable[:, None], math.nan)  # TRL leaves these out of the baseline

    def _check_reward_variance(self, rewards: Tensor, do_responses_differ: bool) -> None:
        is_constant = do_responses_differ and bool((rewards == rewards[:1]).all())
        self._num_constant_steps = self._num_constant_steps + 1 if is_constant else 0
        if self._num_constant_steps >= MAX_CONSTANT_REWARD_STEPS:
            value = rewards[0].item() if len(rewards) else -math.inf
            self._save_and_raise(
                f"every reward of the last {MAX_CONSTANT_REWARD_STEPS} steps was {value:g}, so nothing can be learned"
            )

    def _save_and_raise(self, reason: str) -> None:
        # Every process comes here together, since the rewards are gathered.
        step = self.state.global_step  # type: ignore[attr-defined]
        if step:
            self._save_checkpoint(self.model, None)  # type: ignore[attr-defined]
        result = f"checkpoint-{step} is kept" if step else "nothing was trained"
        raise ValueError(f"{reason} at step {step + 1}; {result} in {self.args.output_dir}")  # type: ignore[attr-defined]


class TokenIdsRLOOTrainer(_OnlineTrainerMixin, RLOOTrainer):
    """TRL's RLOOTrainer: maximizes E[r] − β KL(q ‖ π), with β · log-ratio inside the reward of each response."""


class TokenIdsGRPOTrainer(_OnlineTrainerMixin, GRPOTrainer):
    """TRL's GRPOTrainer: the KL is a term of the loss, token by token."""


def compute_advantage_gains(student_logp: Tensor, own_ids: Tensor, advantages: Tensor) -> Tensor:
    """Return [N] each sampled token's advantage times its likelihood ratio p/p, which has the policy gradient.

    Args:
        student_logp: [N, V] log p.
        own_ids: [N] the sampled tokens.
        advantages: [N] in nats.
    """
    own_logp = student_logp.gather(1, own_ids[:, None]).squeeze(1)
    return advantages * (own_logp - own_logp.detach()).exp()


@dataclass(frozen=True)
class TeacherTargets:
    """What a teacher says about a response of T tokens.

    Attributes:
        ids, logp: [T, K] tokens and the teacher's log-probabilities of them, -inf for none (see `compute_lumped_kl`).
        advantages: [T] advantages of the response's own tokens, in nats, that are not in the log-probabilities.
    """

    ids: Tensor
    logp: Tensor
    advantages: Tensor


class ResponseTeacher(Protocol):
    """Teacher of the responses that a policy samples in training."""

    def __call__(self, prompts: Sequence[str], responses: Sequence[list[int]]) -> list[TeacherTargets]:
        """Return the targets along each response. A response that cannot be judged has no target."""


class TokenIdsDistillationTrainer(_PromptIdsMixin, DistillationTrainer):
    """TRL's DistillationTrainer with a teacher that depends on the sampled response, and knows K tokens a position.

    The loss of a response token is the KL to the teacher, less what `compute_advantage_gains` returns.

    Args:
        prompt_ids: problem id → prompt ids.
        teacher: gives the targets along the sampled token ids.
        divergence: "forward_kl" or "reverse_kl".
        kwargs: as for TRL's trainer. The dataset holds the column `prompt`, problem ids.
    """

    def __init__(
        self, *args: Any, prompt_ids: dict[str, list[int]], teacher: ResponseTeacher, divergence: str, **kwargs: Any
    ):
        self.prompt_ids, self.teacher, self.is_reverse = prompt_ids, teacher, divergence == "reverse_kl"
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        ids, mask = output["completion_ids"], output["completion_mask"]
        responses = [row[row_mask != 0].tolist() for row, row_mask in zip(ids, mask, strict=True)]
        targets = self.teacher([entry["prompt"] for entry in inputs], responses)
        shape = (*ids.shape, max(row.ids.shape[1] for row in targets))
        output["teacher_ids"] = torch.zeros(shape, dtype=torch.long, device=ids.device)
        output["teacher_logp"] = torch.full(shape, -torch.inf, device=ids.device)
        output["advantages"] = torch.zeros(ids.shape, device=ids.device)
        for index, row in enumerate(targets):
            length, width = row.ids.shape
            output["teacher_ids"][index, :length, :width] = row.ids
            output["teacher_logp"][index, :length, :width] = row.logp
            output["advantages"][index, :length] = row.advantages
        unscorable = torch.tensor([not bool(row.logp.isfinite().any()) for row in targets], device=ids.device)
        ratio = self.accelerator.gather(unscorable).float().mean().item()
        self._metrics["train" if self.model.training else "eval"]["unscorable_ratio"].append(ratio)
        return output

    def _compute_loss(
        self, unwrapped_student: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        completion_ids, is_trained = inputs["completion_ids"], inputs["completion_mask"] != 0
        mask = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), 1)
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
        if "position_ids" in self.model_kwarg_keys:  # prompts are padded on the left
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if "logits_to_keep" in self.model_kwarg_keys:
            options["logits_to_keep"] = completion_ids.shape[1] + 1
        output = unwrapped_student(input_ids=torch.cat((inputs["prompt_ids"], completion_ids), 1), **options)
        logits = output.logits[:, :-1][:, -completion_ids.shape[1] :]
        logp = logits[is_trained].float().log_softmax(-1)
        targets = (inputs[name][is_trained] for name in ("teacher_ids", "teacher_logp"))
        kl = compute_lumped_kl(logp, *targets, is_reverse=self.is_reverse)
        gains = compute_advantage_gains(logp, completion_ids[is_trained], inputs["advantages"][is_trained])
        total = (kl - gains).sum()
        count = is_trained.sum()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["teacher_kl"].append(kl.detach().mean().item())
        entropy = -(logp.exp() * logp).detach().sum()
        return total / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch), entropy, count
