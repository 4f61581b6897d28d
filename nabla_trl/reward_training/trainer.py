"""Train a scalar reward: load the initial model, run TRL's trainer and save the result."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer, set_seed
from transformers.trainer_utils import TrainOutput
from trl import RewardConfig, RewardTrainer

from nabla_trl.gradient.score import ScoreObjective
from nabla_trl.models.flops import ModelSize, measure_model_size
from nabla_trl.models.loading import DTYPES, is_adapter, load_model, read_adapter_info
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.data import LabeledResponse, build_pair_rows, build_token_rows, filter_encodable
from nabla_trl.reward_training.labels import TokenLabeler
from nabla_trl.reward_training.token_trainer import PairRewardTrainer, RelaxedLossConfig, TokenRewardTrainer
from nabla_trl.rewards.loading import CAUSAL_HEAD_WEIGHTS, SCORE_HEAD_WEIGHT, build_score_objective
from nabla_trl.rewards.spec import check_uncertainty_penalty
from nabla_trl.training.callbacks import ProgressCallback
from nabla_trl.training.peft import (
    TUNING_MODES,
    LoraArguments,
    build_4bit_config,
    build_lora_config,
    check_precision,
    compute_training_flops,
    load_padded_tokenizer,
    save_model_atomically,
)
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option

REWARD_KINDS = ("scalar", "head", "implicit")
LOSS_TYPES = ("tokens", "pairs")
IMPLICIT_LOSSES = ("dpo", "outcome")
IMPLICIT_REFERENCES = ("base", "none")


@dataclass
class RewardOptions:
    """Options of training a reward, beside those of TRL's trainer."""

    kind: str = option(
        "scalar",
        "scalar: a model with a score head. head: a head on the policy's own states, whose scores cost nothing. "
        "implicit: β·(log π_φ − log π_base) of a LoRA adapter",
    )
    base_model: str | None = option(
        None, "initial model: a reward model, or a causal LM with the policy's tokens. Default: the policy"
    )
    head_width: int = option(0, "head: units of a hidden layer. 0 is a linear map")
    ranking_weight: float = option(
        1.0, "head: weight of Bradley-Terry within problems beside the loss at every token. 0 disables it"
    )
    num_members: int = option(1, "scalar, head: members of an ensemble, trained with different seeds")
    uncertainty_penalty: float = option(1.0, "scalar, head: k of an ensemble's reward, mean − k·std")
    implicit_loss: str = option(
        "dpo",
        "implicit: dpo on pairs of a correct and a wrong response, or outcome: cross-entropy with the reward as logit "
        "of a correct answer (arXiv 2412.01981), which needs no pairs",
    )
    implicit_beta: float = option(0.1, "implicit: β of the loss and scale of the reward")
    implicit_reference: str = option(
        "base",
        "implicit: base, or none with the loss outcome. Without a reference the reward β·log π_φ begins as the base's "
        "likelihood, so training only has to improve on the ranking by likelihood",
    )
    tuning: str = option("lora", "full, lora or qlora (LoRA on a 4-bit base)")
    loss_type: str = option(
        "tokens",
        "tokens: predict at every token whether the response is free of error so far. pairs: Bradley-Terry within "
        "problems",
    )
    relaxed_fraction: float = option(
        0.5,
        "tokens: fraction of rows whose inputs are mixtures of the policy's alternatives. It makes the reward smooth "
        "where its gradient is taken",
    )
    target_samples: int = option(
        2, "tokens: sampled responses that estimate the target of a mixture where there are no step labels"
    )
    gradient_matching: float = option(
        0.0, "tokens: weight of the loss between first-order and true change under token swaps. 0 disables it"
    )
    pairs_per_problem: int = option(
        4, "pairs, implicit: most pairs of a correct and a wrong response to the same problem"
    )
    margin: float = option(0.0, "pairs: margin by which the correct response should win")
    grow_layers: int = option(
        0, "full: layers added on top. Each is a copy of the last layer that begins as an identity (arXiv 2401.02415)"
    )

    def __post_init__(self) -> None:
        checks = Checks()
        checks.require_choice(self, kind=REWARD_KINDS, loss_type=LOSS_TYPES, implicit_loss=IMPLICIT_LOSSES)
        checks.require_choice(self, implicit_reference=IMPLICIT_REFERENCES, tuning=TUNING_MODES)
        checks.require(0 <= self.relaxed_fraction <= 1, "relaxed_fraction must be in [0, 1]")
        for name in ("head_width", "ranking_weight", "gradient_matching", "margin"):
            checks.require(0 <= getattr(self, name) < math.inf, f"{name} must be a number of at least 0")
        checks.require_minimum(self, 1, "target_samples", "pairs_per_problem", "num_members")
        checks.require(self.grow_layers >= 0, "grow_layers must not be negative")
        checks.call(check_uncertainty_penalty, self.uncertainty_penalty)
        checks.require(0 < self.implicit_beta < math.inf, "implicit_beta must be a positive number")
        checks.require(
            self.kind != "head" or not self.base_model,
            "a head reads the policy's own states: base_model must not be set",
        )
        checks.require(
            self.kind != "implicit" or (self.num_members == 1 and self.tuning == "lora"),
            "an implicit reward is one adapter: num_members must be 1 and tuning lora",
        )
        checks.require(
            self.implicit_reference != "none" or self.implicit_loss == "outcome",
            "implicit_reference none needs implicit_loss outcome: DPO compares with a reference",
        )
        checks.require(
            self.loss_type != "pairs" or not self.gradient_matching,
            "gradient_matching belongs to the loss_type tokens",
        )
        checks.require(
            not self.grow_layers or self.tuning == "full",
            "grow_layers needs tuning full: an adapter cannot hold new layers",
        )
        checks.raise_faults()


@dataclass(frozen=True)
class RewardTrainingStats:
    """Numbers of a training run: rows of data, optimizer steps, tokens, FLOPs, wall seconds and the mean loss."""

    rows: int
    steps: int
    tokens: int
    flops: float
    seconds: float
    loss: float


def train_reward(
    init_model: str,
    labeled_responses: Sequence[LabeledResponse],
    output_dir: Path,
    *,
    policy: Policy,
    options: RewardOptions,
    lora: LoraArguments,
    config: RewardConfig,
    dtype: str,
    token_labels: TokenLabeler | None,
    min_p: float,
    add_layers: bool,
) -> RewardTrainingStats:
    """Train a scalar reward on labeled responses and write it to a folder, whole or not at all.

    Args:
        init_model: a base model, or the folder of an earlier round with full weights or an adapter.
        labeled_responses: the data, with the policy's candidates (`label_responses`).
        dtype: of weights that are not trained themselves.
        token_labels: step labels. None where only the correctness of the answer is known.
        min_p: candidates below this fraction of the likeliest are left out of mixtures.
        add_layers: add `options.grow_layers` layers, as the first round does.

    Raises:
        ValueError: a base that cannot be loaded or cannot read any of the responses, a loss that is not finite (the
            message names the step, checkpoints of the trainer stay), or training that changed nothing.
    """
    check_precision(options.tuning, dtype, config)
    tokenizer = load_padded_tokenizer(init_model)
    set_seed(config.seed)
    model = load_initial_model(init_model, options, lora, config, dtype, add_layers=add_layers)
    classifier = model.get_base_model() if isinstance(model, PeftModel) else model
    objective = build_score_objective(policy, classifier, tokenizer, init_model)
    labeled_responses = filter_encodable(labeled_responses, objective, init_model, quiet=config.process_index > 0)
    initial_weights = {
        name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad
    }
    trainer = _build_trainer(model, tokenizer, objective, labeled_responses, options, config, token_labels, min_p)
    for name, weight in model.named_parameters():
        if weight.requires_grad:  # TRL rounds adapters of 4-bit bases to bfloat16, where small steps are lost
            weight.data = initial_weights[name].float()
    initial_head = _get_score_weight(model).clone()
    result = run_training(trainer)
    if torch.equal(initial_head, _get_score_weight(model)):
        raise ValueError(f"{trainer.state.global_step} steps of training did not change the score head")
    save_model_atomically(trainer, output_dir)
    lengths = [len(row.sample.prompt_ids + row.sample.response_ids) for row in labeled_responses]
    frozen = options.tuning != "full"
    return build_training_stats(
        trainer,
        result,
        responses_per_row=2 if options.loss_type == "pairs" else 1,
        length=round(statistics.mean(lengths)),
        size=measure_model_size(classifier, "reward"),
        frozen=frozen,
    )


def run_training(trainer: Trainer) -> TrainOutput:
    """Train, and refuse a mean loss that is not finite.

    Raises:
        ValueError: the loss is not finite. Nothing is written.
    """
    with ProgressCallback.show(trainer, "train reward"):
        result = trainer.train()
    if not math.isfinite(result.training_loss):
        raise ValueError(f"the training loss became {result.training_loss}: lower learning_rate; nothing written")
    return result


def build_training_stats(
    trainer: Trainer,
    result: TrainOutput,
    *,
    responses_per_row: int,
    length: int,
    size: ModelSize,
    frozen: bool = True,
    has_reference: bool = False,
) -> RewardTrainingStats:
    """Return what a finished training run did.

    Args:
        responses_per_row: responses in a row of the training data.
        length: mean tokens of prompt and response.
        size: of the base model.
        frozen: the base is frozen and an adapter is trained.
        has_reference: a reference model reads every response once more, as in DPO.
    """
    config = trainer.args
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    responses = trainer.state.global_step * rows_per_step * responses_per_row
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad) if frozen else 0
    flops_per_response = compute_training_flops(size, trained, length, frozen=frozen)
    flops_per_response += size.compute_forward_flops(0, length) if has_reference else 0
    return RewardTrainingStats(
        rows=len(trainer.train_dataset),
        steps=trainer.state.global_step,
        tokens=responses * length,
        flops=responses * flops_per_response,
        seconds=float(result.metrics["train_runtime"]),
        loss=float(result.training_loss),
    )


def load_initial_model(
    init_model: str, options: RewardOptions, lora: LoraArguments, config: RewardConfig, dtype: str, *, add_layers: bool
) -> Any:
    """Load the model to train: a classifier with one label, or a PeftModel of one.

    The score head is random where the initial model has none.

    Raises:
        ValueError: nothing can be loaded from `init_model`.
    """
    adapter = is_adapter(init_model)
    model = _load_trainable_classifier(
        read_adapter_info(init_model).base_model if adapter else init_model, options, config, dtype
    )
    if add_layers and options.grow_layers:
        model = add_top_layers(model, options.grow_layers)
    if options.tuning == "full":
        return model
    if options.tuning == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)
    if adapter:
        return PeftModel.from_pretrained(model, init_model, is_trainable=True)
    return get_peft_model(model, build_lora_config(lora, "SEQ_CLS", modules_to_save=["score"]))


def _load_trainable_classifier(name: str, options: RewardOptions, config: RewardConfig, dtype: str) -> PreTrainedModel:
    """Load a classifier with one label and the attention and precision that the options need."""
    model_options: dict[str, Any] = {"attn_implementation": "eager"} if options.gradient_matching else {}
    if options.tuning == "qlora":
        model_options["quantization_config"] = build_4bit_config(DTYPES[dtype], head_name="score")
    return load_model(
        AutoModelForSequenceClassification,
        name,
        # Weights that are trained themselves stay in float32: bfloat16 loses small steps.
        dtype="float32" if options.tuning == "full" else dtype,
        device=str(config.device),
        sharded=True,
        allowed_missing=SCORE_HEAD_WEIGHT,
        allowed_unexpected=CAUSAL_HEAD_WEIGHTS,
        model_options=model_options,
        num_labels=1,
    )


def add_top_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Return a deeper model: copies of the last layer on top, with output projections of zero.

    The new model computes the same function. A verifier has to compare what the policy's last layer expects with the
    next token, which needs layers above the last one (block expansion, arXiv 2401.02415).

    Raises:
        ValueError: an architecture without `model.layers` of attention and gated MLP.
    """
    if getattr(model.base_model, "layers", None) is None:
        raise ValueError(f"grow_layers does not know the layers of {model.config.model_type}")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers += num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types, *[config.layer_types[-1]] * num_layers]
    deeper = type(model)(config).to(model.dtype)
    weights = model.state_dict()
    last = model.config.num_hidden_layers - 1
    for name, weight in list(weights.items()):
        if f"layers.{last}." in name:
            is_output = name.rpartition(".")[0].endswith(("o_proj", "down_proj"))
            for layer in range(last + 1, last + 1 + num_layers):
                new_weight = torch.zeros_like(weight) if is_output else weight.clone()
                weights[name.replace(f"layers.{last}.", f"layers.{layer}.")] = new_weight
    deeper.load_state_dict(weights)
    return deeper.to(model.device)


def _build_trainer(
    model: Any,
    tokenizer: Any,
    objective: ScoreObjective,
    labeled_responses: Sequence[LabeledResponse],
    options: RewardOptions,
    config: RewardConfig,
    token_labels: TokenLabeler | None,
    min_p: float,
) -> RewardTrainer:
    # No max_length: rows are never cut, because the end of a response decides its label.
    common = {"model": model, "args": replace(config, max_length=None), "processing_class": tokenizer}
    if options.loss_type == "pairs":
        rows = build_pair_rows(
            labeled_responses,
            objective,
            pairs_per_problem=options.pairs_per_problem,
            margin=options.margin,
            seed=config.seed,
        )
        return PairRewardTrainer(train_dataset=Dataset.from_list(rows), **common)
    rows = build_token_rows(labeled_responses, objective, token_labels=token_labels, min_p=min_p)
    loss = RelaxedLossConfig(options.relaxed_fraction, options.target_samples, options.gradient_matching)
    return TokenRewardTrainer(train_dataset=Dataset.from_list(rows), loss_config=loss, **common)


def _get_score_weight(model: Any) -> torch.Tensor:
    """Return the trained weight of the score head."""
    return next(weight for name, weight in model.named_parameters() if "score" in name and weight.requires_grad).data
