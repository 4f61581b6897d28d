"""Train implicit rewards: a causal LM's adapter such that β·(log π_φ − log π_ref) prefers correct responses.

The training is DPO (Rafailov et al., arXiv 2305.18290) on pairs of a correct and a wrong response to one problem, or
the cross-entropy of outcomes with the reward as logit (Yuan et al., arXiv 2412.01981), which also uses problems whose
answers are all correct or all wrong. Both need answer labels alone. The reward costs one adapter and has a dense
gradient at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import set_seed
from trl import DPOConfig, RewardConfig, SFTConfig

from nabla_trl.gradient.objectives import Objective
from nabla_trl.models.flops import FlopCounter, measure_model_size
from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.data import LabeledResponse, choose_pairs, filter_encodable
from nabla_trl.reward_training.trainer import RewardTrainingStats, build_training_stats, run_training
from nabla_trl.rewards.loading import build_log_ratio_reward
from nabla_trl.traces.datasets import IGNORE_INDEX
from nabla_trl.training.peft import (
    LoraArguments,
    build_lora_config,
    load_padded_tokenizer,
    load_trainable_model,
    save_model_atomically,
)
from nabla_trl.training.trainers import TokenIdsDPOTrainer, TokenIdsSFTTrainer, convert_config
from nabla_trl.utils.formatting import pluralize

REFERENCE_BATCH_SIZE = 64  # responses that the reference reads together


def train_implicit_reward(
    base_model: str,
    labeled_responses: Sequence[LabeledResponse],
    output_dir: Path,
    *,
    policy: Policy,
    beta: float,
    pairs_per_problem: int,
    lora: LoraArguments,
    config: RewardConfig,
    dtype: str,
    loss_type: str = "dpo",
) -> RewardTrainingStats:
    """Train an adapter and write it to a folder, whole or not at all.

    Args:
        base_model: the policy itself, or another causal LM over the same token strings. It is the reference, too.
        beta: β of the loss, and the scale of the reward.
        pairs_per_problem: of DPO.
        loss_type: "dpo" or "outcome".

    Raises:
        ValueError: no pairs that the base can read, vocabularies that cannot be matched, a loss that is not finite, or
            training that changed nothing.
    """
    base = policy if base_model == policy.name else load_policy(base_model, dtype=dtype, device=str(config.device))
    objective = build_log_ratio_reward(policy, base, base, base_model).objectives[0]
    readable = filter_encodable(labeled_responses, objective, base_model, quiet=config.process_index > 0)
    set_seed(config.seed)
    model = load_trainable_model(base_model, tuning="lora", dtype=dtype, config=config)
    common = {
        "model": model,
        "processing_class": load_padded_tokenizer(base_model),
        "peft_config": build_lora_config(lora, "CAUSAL_LM"),
    }
    trainer: Any
    if loss_type == "dpo":
        rows = _build_pair_rows(readable, objective, pairs_per_problem, config.seed)
        trainer = TokenIdsDPOTrainer(
            args=make_dpo_config(config, beta), train_dataset=Dataset.from_list(rows), **common
        )
    else:
        rows = _build_outcome_rows(readable, objective)
        sft_config = convert_config(SFTConfig, config, max_length=None)
        trainer = OutcomeTrainer(beta=beta, args=sft_config, train_dataset=Dataset.from_list(rows), **common)
    size = measure_model_size(model, "reward")
    result = run_training(trainer)
    if not any(weight.any() for name, weight in trainer.model.named_parameters() if "lora_B" in name):
        raise ValueError(
            f"{pluralize(trainer.state.global_step, 'step')} of training changed nothing: raise learning_rate or "
            "max_steps"
        )
    save_model_atomically(trainer, output_dir)
    lengths = [len(response.sample.prompt_ids) + len(response.sample.response_ids) for response in readable]
    return build_training_stats(
        trainer,
        result,
        responses_per_row=2 if loss_type == "dpo" else 1,
        length=round(sum(lengths) / len(lengths)),
        size=size,
        has_reference=True,
    )


def _build_pair_rows(
    labeled_responses: Sequence[LabeledResponse], objective: Objective, pairs_per_problem: int, seed: int
) -> list[dict[str, Any]]:
    pairs = [
        (objective.encode(chosen), objective.encode(rejected))
        for chosen, rejected in choose_pairs(labeled_responses, pairs_per_problem, seed)
    ]
    return [
        {"prompt_ids": chosen.prompt_ids, "chosen_ids": chosen.response_ids, "rejected_ids": rejected.response_ids}
        for chosen, rejected in pairs
    ]


def _build_outcome_rows(labeled_responses: Sequence[LabeledResponse], objective: Objective) -> list[dict[str, Any]]:
    """Return rows of `input_ids`, `labels`, `reference_logp` (log π_ref of the response) and `outcome` (0 or 1)."""
    rows = []
    for begin in range(0, len(labeled_responses), REFERENCE_BATCH_SIZE):
        batch = labeled_responses[begin : begin + REFERENCE_BATCH_SIZE]
        samples = [response.sample for response in batch]
        caches = objective.compute_prompt_caches(samples, FlopCounter())
        logps, _ = objective.score(samples, caches, [0] * len(samples), FlopCounter())
        for response, logp in zip(batch, logps, strict=True):
            encoded = objective.encode(response.sample)
            rows.append(
                {
                    "input_ids": encoded.prompt_ids + encoded.response_ids,
                    "labels": [IGNORE_INDEX] * len(encoded.prompt_ids) + encoded.response_ids,
                    "reference_logp": logp,
                    "outcome": float(response.correct),
                }
            )
    return rows


class OutcomeTrainer(TokenIdsSFTTrainer):
    """Trainer of the cross-entropy of outcomes, with β·(log π_φ(y|x) − log π_ref(y|x)) as logit of a correct answer.

    Args:
        beta: β.
    """

    COLUMNS = ("reference_logp", "outcome")

    def __init__(self, *args: Any, beta: float, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reward_beta, collate = beta, self.data_collator  # type: ignore[has-type]
        self.model_accepts_loss_kwargs = False  # the loss is a mean over responses, not over tokens

        def with_columns(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
            return collate(rows) | {name: torch.tensor([row[name] for row in rows]) for name in self.COLUMNS}

        self.data_collator = with_columns

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*self._signature_columns, *self.COLUMNS]  # type: ignore[has-type]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        logp = -F.cross_entropy(
            outputs.logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none"
        ).sum(1)
        logits = self.reward_beta * (logp - inputs["reference_logp"])
        loss = F.binary_cross_entropy_with_logits(logits, inputs["outcome"])
        return (loss, outputs) if return_outputs else loss


def make_dpo_config(config: RewardConfig, beta: float) -> DPOConfig:
    """Return DPO's configuration with the arguments that both trainers have."""
    # No max_length: responses are never cut, because their end decides which one is chosen.
    return convert_config(DPOConfig, config, max_length=None, beta=beta)
