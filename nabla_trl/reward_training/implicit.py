"""Train implicit rewards: a causal LM's adapter such that β·(log π_φ − log π_ref) prefers correct responses.

The training is DPO (Rafailov et al., arXiv 2305.18290) on pairs of a correct and a wrong response to one problem, by
answer labels alone. The reward costs one adapter and has a dense gradient at every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import set_seed
from trl import DPOConfig, RewardConfig

from nabla_trl.models.flops import measure_model_size
from nabla_trl.models.loading import load_policy, load_tokenizer
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.data import LabeledResponse, choose_pairs, filter_encodable
from nabla_trl.reward_training.trainer import RewardTrainingStats, build_training_stats, run_training
from nabla_trl.rewards.loading import build_log_ratio_reward
from nabla_trl.training.peft import (
    LoraArguments,
    build_lora_config,
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
    """Train an adapter by DPO and write it to a folder, whole or not at all.

    Args:
        base_model: the policy itself, or another causal LM over the same token strings. It is the reference, too.
        beta: β of DPO, and the scale of the reward.

    Raises:
        ValueError: no pairs that the base can read, vocabularies that cannot be matched, a loss that is not finite, or
            training that changed nothing.
    """
    base = policy if base_model == policy.name else load_policy(base_model, dtype=dtype, device=str(config.device))
    objective = build_log_ratio_reward(policy, base, base, base_model).objectives[0]
    readable = filter_encodable(labeled_responses, objective, base_model, quiet=config.process_index > 0)
    pairs = [
        (objective.encode(chosen), objective.encode(rejected))
        for chosen, rejected in choose_pairs(readable, pairs_per_problem, config.seed)
    ]
    rows = [
        {"prompt_ids": chosen.prompt_ids, "chosen_ids": chosen.response_ids, "rejected_ids": rejected.response_ids}
        for chosen, rejected in pairs
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
    result = run_training(trainer)
    if not any(weight.any() for name, weight in trainer.model.named_parameters() if "lora_B" in name):
        raise ValueError(
            f"{trainer.state.global_step} steps of training changed nothing: raise learning_rate or max_steps"
        )
    save_model_atomically(trainer, output_dir)
    length = round(sum(len(row["prompt_ids"] + row["chosen_ids"]) for row in rows) / len(rows))
    return build_training_stats(trainer, result, responses_per_row=2, length=length, size=size, has_reference=True)


def make_dpo_config(config: RewardConfig, beta: float) -> DPOConfig:
    """Return DPO's configuration with the arguments that both trainers have."""
    # No max_length: responses are never cut, because their end decides which one is chosen.
    return convert_config(DPOConfig, config, max_length=None, beta=beta)
