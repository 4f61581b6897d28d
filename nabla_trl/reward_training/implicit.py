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

from nabla_trl.models.flops import model_size
from nabla_trl.models.loading import load_policy, load_tokenizer
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.data import Labelled, choose_pairs, legible
from nabla_trl.reward_training.trainer import TrainedReward
from nabla_trl.rewards.loading import log_ratio
from nabla_trl.training.peft import LoraArguments, load_trainable, lora_config, row_flops, save_whole
from nabla_trl.training.trainers import IdsDPOTrainer, config_as


def train_implicit(
    base: str,
    labelled: Sequence[Labelled],
    output: Path,
    *,
    policy: Policy,
    beta: float,
    pairs_per_problem: int,
    lora: LoraArguments,
    config: RewardConfig,
    dtype: str,
) -> TrainedReward:
    """Train an adapter of `base` by DPO and write it to `output` (whole or not at all).

    Args:
        base: the policy itself, or another causal LM over the same token strings; it is the reference, too.
        beta: β of DPO, and the scale of the reward.

    Raises:
        ValueError: no pairs that the base can read, vocabularies that cannot be matched, a loss that is not finite.
    """
    reader = policy if base == policy.name else load_policy(base, dtype=dtype, device=str(config.device))
    term = log_ratio(policy, reader, reader, base).terms[0]
    readable = legible(labelled, term, base, quiet=config.process_index > 0)
    rows = [
        {"prompt_ids": good.prompt, "chosen_ids": good.response, "rejected_ids": bad.response}
        for chosen, rejected in choose_pairs(readable, pairs_per_problem, config.seed)
        for good, bad in [(term.encode(chosen), term.encode(rejected))]
    ]
    set_seed(config.seed)
    model = load_trainable(base, tuning="lora", dtype=dtype, config=config)
    trainer = IdsDPOTrainer(
        model=model,
        args=dpo_config(config, beta),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(base),
        peft_config=lora_config(lora, "CAUSAL_LM"),
    )
    size = model_size(model, "reward")
    added = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    result = trainer.train()
    if not math.isfinite(result.training_loss):
        raise ValueError(f"the training loss became {result.training_loss}: lower learning_rate; nothing written")
    if not any(weight.any() for name, weight in trainer.model.named_parameters() if "lora_B" in name):
        raise ValueError(
            f"{trainer.state.global_step} steps of training changed nothing: raise learning_rate or max_steps"
        )
    save_whole(trainer, output)
    length = round(sum(len(row["prompt_ids"] + row["chosen_ids"]) for row in rows) / len(rows))
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    responses = 2 * batch * trainer.state.global_step
    # The reference reads every response once more.
    flops = responses * (row_flops(size, added, length) + size.forward_flops(0, length))
    return TrainedReward(
        rows=len(rows),
        steps=trainer.state.global_step,
        tokens=responses * length,
        flops=flops,
        seconds=float(result.metrics["train_runtime"]),
        loss=float(result.training_loss),
    )


def dpo_config(config: RewardConfig, beta: float) -> DPOConfig:
    """DPO's configuration with the arguments of another trainer's that both know."""
    # Never cut a response: what it ends with decides which one is chosen.
    return config_as(DPOConfig, config, max_length=None, beta=beta)
