"""Training a reward model: the model it starts from, one training run, and what is saved of it."""

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
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed
from trl import RewardConfig, RewardTrainer

from nabla_trl.gradient.score import ScoreObjective
from nabla_trl.models.flops import measure_model_size
from nabla_trl.models.loading import DTYPES, is_adapter, load_tokenizer, read_adapter_info
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.data import LabeledResponse, build_pair_rows, build_token_rows, filter_encodable
from nabla_trl.reward_training.labels import TokenLabeler
from nabla_trl.reward_training.token_trainer import PairRewardTrainer, RelaxedLossConfig, TokenRewardTrainer
from nabla_trl.rewards.loading import build_score_objective
from nabla_trl.training.peft import (
    TUNING_MODES,
    LoraArguments,
    build_4bit_config,
    build_lora_config,
    check_precision,
    compute_training_flops,
    disable_avx512_bf16_kernel,
    save_model_atomically,
)
from nabla_trl.utils.fields import option
from nabla_trl.utils.formatting import format_load_error

REWARD_KINDS = ("scalar", "implicit")
LOSS_TYPES = ("tokens", "pairs")


@dataclass
class RewardOptions:
    """What a reward is trained for, beside the trainer's own arguments."""

    kind: str = option("scalar", "scalar (a score head) or implicit (β·(log π_φ − log π_base) of an adapter, by DPO)")
    base_model: str | None = option(
        None,
        "model the reward starts from: the policy if empty, else a reward model or a causal LM of the same tokens",
    )
    num_members: int = option(1, "scalar: members of an ensemble, trained with different seeds")
    uncertainty_penalty: float = option(1.0, "scalar: k of an ensemble's score, mean − k·std")
    implicit_beta: float = option(0.1, "implicit: β of DPO, and scale of the reward")
    tuning: str = option("lora", "full, lora or qlora (4-bit base)")
    loss_type: str = option(
        "tokens",
        "tokens (is the response free of error so far, at every token) or pairs (Bradley-Terry within problems)",
    )
    relaxed_fraction: float = option(
        0.5, "tokens: share of rows whose inputs are mixtures of the policy's alternatives"
    )
    target_samples: int = option(
        2, "tokens: hard draws that estimate a mixture's target where there are no step labels"
    )
    gradient_matching: float = option(0.0, "tokens: weight of the gap of first-order and true change under swaps")
    pairs_per_problem: int = option(4, "pairs, implicit: most pairs of a right and a wrong response to one problem")
    margin: float = option(0.0, "pairs: by which the right response should win")
    grow_layers: int = option(
        0, "full: layers added on top, copies of the last one that begin as identities (arXiv 2401.02415)"
    )

    def __post_init__(self) -> None:
        for name, choices in (("kind", REWARD_KINDS), ("objective", LOSS_TYPES), ("tuning", TUNING_MODES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if (
            not 0 <= self.relaxed_fraction <= 1
            or not 0 <= self.gradient_matching < math.inf
            or not 0 <= self.margin < math.inf
        ):
            raise ValueError("relaxed must be in [0, 1], gradient_matching and margin numbers of at least 0")
        if min(self.target_samples, self.pairs_per_problem, self.num_members) < 1 or self.grow_layers < 0:
            raise ValueError("draws, pairs_per_problem and members must be at least 1, grow_layers not negative")
        if not 0 <= self.uncertainty_penalty < math.inf or not 0 < self.implicit_beta < math.inf:
            raise ValueError("caution must be a number of at least 0, implicit_beta a positive number")
        if self.kind == "implicit" and (self.num_members > 1 or self.tuning != "lora"):
            raise ValueError("an implicit reward is one adapter: members must be 1 and tuning lora")
        if self.loss_type == "pairs" and self.gradient_matching:
            raise ValueError("gradient_matching belongs to the objective tokens")
        if self.grow_layers and self.tuning != "full":
            raise ValueError("grow_layers needs tuning full: an adapter cannot carry new layers")


@dataclass(frozen=True)
class RewardTrainingStats:
    """What a training run did: rows, steps, tokens and FLOPs spent, wall seconds, last mean loss."""

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
    """Train a reward on labelled responses and write it to `output` (whole or not at all).

    Args:
        start: a base model, or the folder of an earlier round, full weights or an adapter.
        labels: step labels, or None where only verdicts are known.
        min_p: candidates below this fraction of the likeliest are left out of mixtures.
        grow: add `options.grow_layers` layers (the first round does).

    Raises:
        ValueError: a base that cannot be loaded or that can read none of the responses, a loss that is not finite (the
            step is named; checkpoints of the trainer stay), or training that changed nothing.
    """
    check_precision(options.tuning, dtype, config)
    tokenizer = load_tokenizer(init_model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_seed(config.seed)
    model = load_initial_model(init_model, options, lora, config, dtype, add_layers=add_layers)
    term = build_score_objective(policy, _unwrap_peft_model(model), tokenizer, init_model)
    labeled_responses = filter_encodable(labeled_responses, term, init_model, quiet=config.process_index > 0)
    begun = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    trainer = _build_trainer(model, tokenizer, term, labeled_responses, options, config, token_labels, min_p)
    for name, weight in model.named_parameters():
        if weight.requires_grad:  # TRL rounds adapters of 4-bit bases to bfloat16, where small steps are lost
            weight.data = begun[name].float()
    before = _get_score_weight(model).clone()
    result = trainer.train()
    if not math.isfinite(result.training_loss):
        raise ValueError(f"the training loss became {result.training_loss}: lower learning_rate; nothing written")
    if torch.equal(before, _get_score_weight(model)):
        raise ValueError(f"{trainer.state.global_step} steps of training did not change the score head")
    save_model_atomically(trainer, output_dir)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    length = round(statistics.mean(len(one.sample.prompt_ids + one.sample.response_ids) for one in labeled_responses))
    responses = trainer.state.global_step * batch * (2 if options.loss_type == "pairs" else 1)
    frozen = options.tuning != "full"
    added = sum(weight.numel() for weight in model.parameters() if weight.requires_grad) if frozen else 0
    return RewardTrainingStats(
        rows=len(trainer.train_dataset),
        steps=trainer.state.global_step,
        tokens=responses * length,
        flops=responses
        * compute_training_flops(
            measure_model_size(_unwrap_peft_model(model), "reward"), added, length, frozen=frozen
        ),
        seconds=float(result.metrics["train_runtime"]),
        loss=float(result.training_loss),
    )


def load_initial_model(
    init_model: str, options: RewardOptions, lora: LoraArguments, config: RewardConfig, dtype: str, *, add_layers: bool
) -> Any:
    """The model to train: a classifier with one label, its head random where the start has none; or a PeftModel.

    Raises:
        ValueError: nothing loadable at `start`.
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
    """A classifier with one label and the attention and precision that the options need."""
    extra: dict[str, Any] = {"attn_implementation": "eager"} if options.gradient_matching else {}
    if options.tuning == "qlora":
        extra["quantization_config"] = build_4bit_config(DTYPES[dtype], head_name="score")
    # Weights that are trained themselves are kept in float32: in bfloat16 small steps are lost.
    extra["dtype"] = torch.float32 if options.tuning == "full" else DTYPES[dtype]
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **extra)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(format_load_error("a model", name, error)) from error
    if options.tuning != "qlora":
        return model.to(config.device)
    disable_avx512_bf16_kernel(model)
    return model


def add_top_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A deeper model: copies of the last layer on top, their output projections zero, so that nothing changes yet.

    A verifier has to compare what the policy's last layer expects with the token that came: that takes layers above
    it (block expansion, arXiv 2401.02415).

    Raises:
        ValueError: an architecture without `model.layers` of attention and gated MLP.
    """
    stack = getattr(model.base_model, "layers", None)
    if stack is None:
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
            for extra in range(last + 1, last + 1 + num_layers):
                closed = name.rpartition(".")[0].endswith(("o_proj", "down_proj"))
                copied = torch.zeros_like(weight) if closed else weight.clone()
                weights[name.replace(f"layers.{last}.", f"layers.{extra}.")] = copied
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
    # Data is never cut or left out for its length: what a response ends with decides its label.
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


def _unwrap_peft_model(model: Any) -> PreTrainedModel:
    """The classifier inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _get_score_weight(model: Any) -> torch.Tensor:
    """The trained weight of the score head."""
    return next(weight for name, weight in model.named_parameters() if "score" in name and weight.requires_grad).data
