"""Train implicit rewards: a causal LM's adapter such that β·(log π_φ − log π_ref) prefers correct responses.

The training is DPO (Rafailov et al., arXiv 2305.18290) on pairs of a correct and a wrong response to one problem, or
the cross-entropy of outcomes with the reward as logit (Yuan et al., arXiv 2412.01981), which also uses problems whose
answers are all correct or all wrong. Both need answer labels alone. The reward costs one adapter and has a dense
gradient at every token.

Cross-entropy may also go without a reference. Then the logit is β·log π_φ(y|x) + b, and the reward β·log π_φ begins as
the base's likelihood, which ranks answers already. In a search it multiplies π by π_φ^β. Answers to the same problem
are read in one row after one copy of their prompt (`PromptGroupCollator`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import set_seed
from trl import DPOConfig, RewardConfig, SFTConfig

from nabla_trl.gradient.objectives import Objective, Sample
from nabla_trl.models.flops import FlopCounter, measure_model_size
from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.data import LabeledResponse, choose_pairs, filter_encodable
from nabla_trl.reward_training.trainer import RewardTrainingStats, build_training_stats, run_training
from nabla_trl.rewards.loading import build_log_ratio_reward
from nabla_trl.states.probe import get_layout
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
MAX_INTERCEPT_RESPONSES = 256  # responses by which the intercept is set


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
    has_reference: bool = True,
) -> RewardTrainingStats:
    """Train an adapter and write it to a folder, whole or not at all.

    Args:
        base_model: the policy itself, or another causal LM over the same token strings. It is the reference, too.
        beta: β of the loss, and the scale of the reward.
        pairs_per_problem: of DPO.
        loss_type: "dpo" or "outcome".
        has_reference: False: the reward is β·log π_φ. Needs loss_type "outcome".

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
        rows = _build_outcome_rows(readable, objective, beta, has_reference=has_reference)
        sft_config = convert_config(SFTConfig, config, max_length=None)
        trainer = OutcomeTrainer(
            beta=beta,
            share_prompts=takes_group_masks(base),
            args=sft_config,
            train_dataset=Dataset.from_list(rows),
            **common,
        )
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


def _build_outcome_rows(
    labeled_responses: Sequence[LabeledResponse], objective: Objective, beta: float, *, has_reference: bool
) -> list[dict[str, Any]]:
    """Return rows of `input_ids`, `labels`, `reference_logp` (log π_ref of the response) and `outcome` (0 or 1).

    Without a reference, `reference_logp` is the constant that makes it an intercept of the logit.
    """
    outcomes = [float(response.correct) for response in labeled_responses]
    samples = [response.sample for response in labeled_responses]
    if has_reference:
        reference_logps = _compute_logps(samples, objective)
    else:
        # Whole problems, evenly spread: their responses share prompts.
        problems = list(dict.fromkeys(sample.problem.id for sample in samples))
        chosen = set(problems[:: -(-len(samples) // MAX_INTERCEPT_RESPONSES)])
        indices = [index for index, sample in enumerate(samples) if sample.problem.id in chosen]
        logps = _compute_logps([samples[index] for index in indices], objective)
        intercept = fit_intercept([beta * logp for logp in logps], [outcomes[index] for index in indices])
        reference_logps = [-intercept / beta] * len(samples)
    rows = []
    for sample, logp, outcome in zip(samples, reference_logps, outcomes, strict=True):
        encoded = objective.encode(sample)
        rows.append(
            {
                "input_ids": encoded.prompt_ids + encoded.response_ids,
                "labels": [IGNORE_INDEX] * len(encoded.prompt_ids) + encoded.response_ids,
                "reference_logp": logp,
                "outcome": outcome,
            }
        )
    return rows


def _compute_logps(samples: Sequence[Sample], objective: Objective) -> list[float]:
    """Return log π_ref of responses. A prompt is read once for its responses in a batch."""
    logps: list[float] = []
    for begin in range(0, len(samples), REFERENCE_BATCH_SIZE):
        batch = samples[begin : begin + REFERENCE_BATCH_SIZE]
        prompts = {sample.problem.id: sample for sample in batch}
        caches = dict(
            zip(prompts, objective.compute_prompt_caches(list(prompts.values()), FlopCounter()), strict=True)
        )
        by_sample = [caches[sample.problem.id] for sample in batch]
        logps += objective.score(batch, by_sample, [0] * len(batch), FlopCounter())[0]
    return logps


def takes_group_masks(policy: Policy) -> bool:
    """Tell whether a model's layers all attend by one mask that may come from outside, at given positions."""
    layout = get_layout(policy.model)
    return (
        policy.model.config._attn_implementation in ("eager", "sdpa")
        and layout.mask_style == "one"
        and layout.takes_positions
        and not (layout.is_recurrent or layout.window or layout.chunk)
    )


def fit_intercept(logits: Sequence[float], outcomes: Sequence[float]) -> float:
    """Return b such that the mean of sigmoid(logit + b) is the mean outcome, by bisection.

    It minimizes the cross-entropy over b. Outcomes that are all the same have no minimum and get an end of the range.
    """
    values, target = torch.tensor(logits, dtype=torch.float64), sum(outcomes) / len(outcomes)
    low, high = -50.0 - float(values.max()), 50.0 - float(values.min())
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((values + middle).sigmoid().mean()) < target else (low, middle)
    return (low + high) / 2


@dataclass
class PromptGroupCollator:
    """Rows of `_build_outcome_rows` → one batch, in which the responses to the same prompt share one copy of it.

    A row of the batch is a prompt, padded on the left to a common width, and its responses one after another. Each
    response attends to the prompt and to itself, at the positions that it has alone. So a prompt is read once and not
    once per response, and logits are needed from the last prompt token on.

    Args:
        share: False: every response has a row of its own, for models whose layers take no mask from outside.
    """

    pad_id: int
    share: bool

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch.

        - `input_ids`, `position_ids` [G, L], and `attention_mask` [G, 1, L, L] bool, or [G, L] without sharing.
        - `targets` [N]: the tokens of all responses. `sources` [N, 2]: row and column whose logits predict each.
          `responses` [N]: which response each belongs to.
        - `reference_logp`, `outcome` [B].
        """
        lengths = [row["labels"].count(IGNORE_INDEX) for row in rows]
        groups: dict[Any, list[int]] = {}
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            groups.setdefault(tuple(row["input_ids"][:length]) if self.share else index, []).append(index)
        ids: list[list[int]] = []
        positions: list[list[int]] = []
        owners: list[list[int]] = []  # the response of each token, −1 for a prompt and −2 for padding
        targets, sources, responses = [], [], []
        for number, (first, *_) in enumerate(groups.values()):
            length, padding = lengths[first], max(lengths) - lengths[first] if self.share else 0
            ids.append([self.pad_id] * padding + rows[first]["input_ids"][:length])
            positions.append([0] * padding + list(range(length)))
            owners.append([-2] * padding + [-1] * length)
            prompt_end = padding + length - 1
            for index in list(groups.values())[number]:
                response, begin = rows[index]["labels"][length:], len(ids[number])
                ids[number] += response
                positions[number] += range(length, length + len(response))
                owners[number] += [index] * len(response)
                targets += response
                sources += [(number, column) for column in (prompt_end, *range(begin, begin + len(response) - 1))]
                responses += [index] * len(response)
        owner = _pad(owners, -2)
        return {
            "input_ids": _pad(ids, self.pad_id),
            "position_ids": _pad(positions, 0),
            "attention_mask": _build_group_mask(owner) if self.share else (owner > -2).long(),
            "targets": torch.tensor(targets),
            "sources": torch.tensor(sources),
            "responses": torch.tensor(responses),
            "reference_logp": torch.tensor([row["reference_logp"] for row in rows]),
            "outcome": torch.tensor([row["outcome"] for row in rows]),
        }


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _build_group_mask(owner: Tensor) -> Tensor:
    """Return [G, 1, L, L] which tokens each token reads: earlier ones of its prompt and of its own response.

    Padding reads padding, because a token that reads nothing would be NaN.
    """
    readable = (owner[:, None, :] == -1) | (owner[:, None, :] == owner[:, :, None])
    return (readable & torch.ones(owner.shape[1], owner.shape[1], dtype=torch.bool).tril())[:, None]


class PromptGroupSampler(Sampler[int]):
    """Sampler that shuffles prompts at each epoch and keeps the responses to a prompt together."""

    def __init__(self, prompts: Sequence[tuple[int, ...]], seed: int):
        self.groups: dict[tuple[int, ...], list[int]] = {}
        for index, prompt in enumerate(prompts):
            self.groups.setdefault(prompt, []).append(index)
        self.num_rows, self.generator = len(prompts), torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        groups = list(self.groups.values())
        for number in torch.randperm(len(groups), generator=self.generator).tolist():
            yield from groups[number]


class OutcomeTrainer(TokenIdsSFTTrainer):
    """Trainer of the cross-entropy of outcomes, with β·(log π_φ(y|x) − log π_ref(y|x)) as logit of a correct answer.

    Args:
        beta: β.
        share_prompts: read the responses to a prompt after one copy of it.
    """

    def __init__(self, *args: Any, beta: float, share_prompts: bool, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reward_beta = beta
        self.model_accepts_loss_kwargs = False  # the loss is a mean over responses, not over tokens
        base = self.accelerator.unwrap_model(self.model).get_base_model()
        self.model_inputs = {"position_ids", "logits_to_keep"} & set(inspect.signature(base.forward).parameters)
        self.data_collator = PromptGroupCollator(self.processing_class.pad_token_id, share_prompts)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["input_ids", "labels", "reference_logp", "outcome"]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> PromptGroupSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        prompts = [tuple(row["input_ids"][: row["labels"].count(IGNORE_INDEX)]) for row in rows]
        return PromptGroupSampler(prompts, self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logp = self.compute_response_logp(model, inputs)
        logits = self.reward_beta * (logp - inputs["reference_logp"])
        loss = F.binary_cross_entropy_with_logits(logits, inputs["outcome"])
        return (loss, {"logits": logits}) if return_outputs else loss

    def compute_response_logp(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return [B] log π_φ of the responses of a batch of `PromptGroupCollator`."""
        rows, columns = inputs["sources"].T
        num_kept = inputs["input_ids"].shape[1] - int(columns.min())  # nothing is predicted inside prompts
        options = {"position_ids": inputs["position_ids"], "logits_to_keep": num_kept}
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            use_cache=False,
            **{name: options[name] for name in self.model_inputs},
        ).logits[:, -num_kept:]
        token_logp = -F.cross_entropy(
            logits[rows, columns - int(columns.min())].float(), inputs["targets"], reduction="none"
        )
        return torch.zeros_like(inputs["outcome"]).index_add(0, inputs["responses"], token_logp)


def make_dpo_config(config: RewardConfig, beta: float) -> DPOConfig:
    """Return DPO's configuration with the arguments that both trainers have."""
    # No max_length: responses are never cut, because their end decides which one is chosen.
    return convert_config(DPOConfig, config, max_length=None, beta=beta)
