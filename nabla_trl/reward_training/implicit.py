"""Implicit rewards: a causal LM's adapter trained so that β·(log π_φ − log π_ref) tells right responses from wrong.

DPO (Rafailov et al., arXiv 2305.18290) on pairs of a right and a wrong response to one problem, by outcome labels
alone. The reward costs one adapter, shares the vocabulary of its base, and has a dense gradient at every token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, RewardConfig

from nabla_trl.models.flops import measure_model_size
from nabla_trl.models.loading import load_policy, load_tokenizer
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.data import LabeledResponse, choose_pairs, filter_encodable
from nabla_trl.reward_training.trainer import RewardTrainingStats
from nabla_trl.rewards.loading import build_log_ratio_reward
from nabla_trl.training.peft import (
    LoraArguments,
    build_lora_config,
    compute_training_flops,
    load_trainable_model,
    save_model_atomically,
)
from nabla_trl.training.trainers import TokenIdsDPOTrainer, convert_config


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
) -> RewardTrainingStats:
    """Train an adapter of `base` by DPO and write it to `output` (whole or not at all).

    Args:
        base: the policy itself, or another causal LM over the same token strings; it is the reference, too.
        beta: β of DPO, and the scale of the reward.

    Raises:
        ValueError: no pairs that the base can read, vocabularies that cannot be matched, a loss that is not finite.
    """
    reader = policy if base_model == policy.name else load_policy(base_model, dtype=dtype, device=str(config.device))
    term = build_log_ratio_reward(policy, reader, reader, base_model).objectives[0]
    readable = filter_encodable(labeled_responses, term, base_model, quiet=config.process_index > 0)
    rows = [
        {"prompt_ids": good.prompt_ids, "chosen_ids": good.response_ids, "rejected_ids": bad.response_ids}
        for chosen, rejected in choose_pairs(readable, pairs_per_problem, config.seed)
        for good, bad in [(term.encode(chosen), term.encode(rejected))]
    ]
    set_seed(config.seed)
    model = load_trainable_model(base_model, tuning="lora", dtype=dtype, config=config)
    trainer = TokenIdsDPOTrainer(
        model=model,
        args=make_dpo_config(config, beta),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(base_model),
        peft_config=build_lora_config(lora, "CAUSAL_LM"),
    )
    size = measure_model_size(model, "reward")
    added = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    result = trainer.train()
    if not math.isfinite(result.training_loss):
        raise ValueError(f"the training loss became {result.training_loss}: lower learning_rate; nothing written")
    if not any(weight.any() for name, weight in trainer.model.named_parameters() if "lora_B" in name):
        raise ValueError(
            f"{trainer.state.global_step} steps of training changed nothing: raise learning_rate or max_steps"
        )
    save_model_atomically(trainer, output_dir)
    length = round(sum(len(row["prompt_ids"] + row["chosen_ids"]) for row in rows) / len(rows))
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    responses = 2 * batch * trainer.state.global_step
    # The reference reads every response once more.
    flops = responses * (compute_training_flops(size, added, length) + size.compute_forward_flops(0, length))
    return RewardTrainingStats(
        rows=len(rows),
        steps=trainer.state.global_step,
        tokens=responses * length,
        flops=flops,
        seconds=float(result.metrics["train_runtime"]),
        loss=float(result.training_loss),
    )


def make_dpo_config(config: RewardConfig, beta: float) -> DPOConfig:
    """DPO's configuration with the arguments of another trainer's that both know."""
    # Never cut a response: what it ends with decides which one is chosen.
    return convert_config(DPOConfig, config, max_length=None, beta=beta)
