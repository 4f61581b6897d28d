"""Training a reward model: the model it starts from, one training run, and what is saved of it."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed
from trl import RewardConfig, RewardTrainer

from nabla_trl.gradient.score import ScoreTerm
from nabla_trl.models.adapters import adapter_note, is_adapter
from nabla_trl.models.flops import model_size
from nabla_trl.models.loading import DTYPES, load_tokenizer
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.data import Labelled, legible, pair_rows, token_rows
from nabla_trl.reward_training.labels import TokenLabels
from nabla_trl.reward_training.token_trainer import PairRewardTrainer, RelaxedLoss, TokenRewardTrainer
from nabla_trl.rewards.loading import score_term
from nabla_trl.training.peft import (
    TUNING,
    LoraArguments,
    check_precision,
    four_bit,
    keep_autograd,
    lora_config,
    row_flops,
    save_whole,
)
from nabla_trl.utils.formatting import cannot_load

KINDS = ("scalar", "implicit")
OBJECTIVES = ("tokens", "pairs")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RewardOptions:
    """What a reward is trained for, beside the trainer's own arguments."""

    kind: str = _option("scalar", "scalar (a score head) or implicit (β·(log π_φ − log π_base) of an adapter, by DPO)")
    base: str | None = _option(
        None,
        "model the reward starts from: the policy if empty, else a reward model or a causal LM of the same tokens",
    )
    members: int = _option(1, "scalar: members of an ensemble, trained with different seeds")
    caution: float = _option(1.0, "scalar: k of an ensemble's score, mean − k·std")
    implicit_beta: float = _option(0.1, "implicit: β of DPO, and scale of the reward")
    tuning: str = _option("lora", "full, lora or qlora (4-bit base)")
    objective: str = _option(
        "tokens",
        "tokens (is the response free of error so far, at every token) or pairs (Bradley-Terry within problems)",
    )
    relaxed: float = _option(0.5, "tokens: share of rows whose inputs are mixtures of the policy's alternatives")
    draws: int = _option(2, "tokens: hard draws that estimate a mixture's target where there are no step labels")
    gradient_matching: float = _option(0.0, "tokens: weight of the gap of first-order and true change under swaps")
    pairs_per_problem: int = _option(4, "pairs, implicit: most pairs of a right and a wrong response to one problem")
    margin: float = _option(0.0, "pairs: by which the right response should win")
    grow_layers: int = _option(
        0, "full: layers added on top, copies of the last one that begin as identities (arXiv 2401.02415)"
    )

    def __post_init__(self) -> None:
        for name, choices in (("kind", KINDS), ("objective", OBJECTIVES), ("tuning", TUNING)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not 0 <= self.relaxed <= 1 or not 0 <= self.gradient_matching < math.inf or not 0 <= self.margin < math.inf:
            raise ValueError("relaxed must be in [0, 1], gradient_matching and margin numbers of at least 0")
        if min(self.draws, self.pairs_per_problem, self.members) < 1 or self.grow_layers < 0:
            raise ValueError("draws, pairs_per_problem and members must be at least 1, grow_layers not negative")
        if not 0 <= self.caution < math.inf or not 0 < self.implicit_beta < math.inf:
            raise ValueError("caution must be a number of at least 0, implicit_beta a positive number")
        if self.kind == "implicit" and (self.members > 1 or self.tuning != "lora"):
            raise ValueError("an implicit reward is one adapter: members must be 1 and tuning lora")
        if self.objective == "pairs" and self.gradient_matching:
            raise ValueError("gradient_matching belongs to the objective tokens")
        if self.grow_layers and self.tuning != "full":
            raise ValueError("grow_layers needs tuning full: an adapter cannot carry new layers")


@dataclass(frozen=True)
class TrainedReward:
    """What a training run did: rows, steps, tokens and FLOPs spent, wall seconds, last mean loss."""

    rows: int
    steps: int
    tokens: int
    flops: float
    seconds: float
    loss: float


def train_reward(
    start: str,
    labelled: Sequence[Labelled],
    output: Path,
    *,
    policy: Policy,
    options: RewardOptions,
    lora: LoraArguments,
    config: RewardConfig,
    dtype: str,
    labels: TokenLabels | None,
    min_p: float,
    grow: bool,
) -> TrainedReward:
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
    tokenizer = load_tokenizer(start)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_seed(config.seed)
    model = starting_model(start, options, lora, config, dtype, grow=grow)
    term = score_term(policy, _bare(model), tokenizer, start)
    labelled = legible(labelled, term, start, quiet=config.process_index > 0)
    begun = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    trainer = _trainer(model, tokenizer, term, labelled, options, config, labels, min_p)
    for name, weight in model.named_parameters():
        if weight.requires_grad:  # TRL rounds adapters of 4-bit bases to bfloat16, where small steps are lost
            weight.data = begun[name].float()
    before = _head(model).clone()
    result = trainer.train()
    if not math.isfinite(result.training_loss):
        raise ValueError(f"the training loss became {result.training_loss}: lower learning_rate; nothing written")
    if torch.equal(before, _head(model)):
        raise ValueError(f"{trainer.state.global_step} steps of training did not change the score head")
    save_whole(trainer, output)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    length = round(statistics.mean(len(one.sample.prompt + one.sample.response) for one in labelled))
    responses = trainer.state.global_step * batch * (2 if options.objective == "pairs" else 1)
    frozen = options.tuning != "full"
    added = sum(weight.numel() for weight in model.parameters() if weight.requires_grad) if frozen else 0
    return TrainedReward(
        rows=len(trainer.train_dataset),
        steps=trainer.state.global_step,
        tokens=responses * length,
        flops=responses * row_flops(model_size(_bare(model), "reward"), added, length, frozen=frozen),
        seconds=float(result.metrics["train_runtime"]),
        loss=float(result.training_loss),
    )


def starting_model(
    start: str, options: RewardOptions, lora: LoraArguments, config: RewardConfig, dtype: str, *, grow: bool
) -> Any:
    """The model to train: a classifier with one label, its head random where the start has none; or a PeftModel.

    Raises:
        ValueError: nothing loadable at `start`.
    """
    adapter = is_adapter(start)
    model = _classifier(adapter_note(start).base if adapter else start, options, config, dtype)
    if grow and options.grow_layers:
        model = grown(model, options.grow_layers)
    if options.tuning == "full":
        return model
    if options.tuning == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)
    if adapter:
        return PeftModel.from_pretrained(model, start, is_trainable=True)
    return get_peft_model(model, lora_config(lora, "SEQ_CLS", modules_to_save=["score"]))


def _classifier(name: str, options: RewardOptions, config: RewardConfig, dtype: str) -> PreTrainedModel:
    """A classifier with one label and the attention and precision that the options need."""
    extra: dict[str, Any] = {"attn_implementation": "eager"} if options.gradient_matching else {}
    if options.tuning == "qlora":
        extra["quantization_config"] = four_bit(DTYPES[dtype], head="score")
    # Weights that are trained themselves are kept in float32: in bfloat16 small steps are lost.
    extra["dtype"] = torch.float32 if options.tuning == "full" else DTYPES[dtype]
    try:
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **extra)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(cannot_load("a model", name, error)) from error
    if options.tuning != "qlora":
        return model.to(config.device)
    keep_autograd(model)
    return model


def grown(model: PreTrainedModel, layers: int) -> PreTrainedModel:
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
    config.num_hidden_layers += layers
    if getattr(config, "layer_types", None):
        config.layer_types = [*config.layer_types, *[config.layer_types[-1]] * layers]
    deeper = type(model)(config).to(model.dtype)
    weights = model.state_dict()
    last = model.config.num_hidden_layers - 1
    for name, weight in list(weights.items()):
        if f"layers.{last}." in name:
            for extra in range(last + 1, last + 1 + layers):
                closed = name.rpartition(".")[0].endswith(("o_proj", "down_proj"))
                copied = torch.zeros_like(weight) if closed else weight.clone()
                weights[name.replace(f"layers.{last}.", f"layers.{extra}.")] = copied
    deeper.load_state_dict(weights)
    return deeper.to(model.device)


def _trainer(
    model: Any,
    tokenizer: Any,
    term: ScoreTerm,
    labelled: Sequence[Labelled],
    options: RewardOptions,
    config: RewardConfig,
    labels: TokenLabels | None,
    min_p: float,
) -> RewardTrainer:
    # Data is never cut or left out for its length: what a response ends with decides its label.
    common = {"model": model, "args": replace(config, max_length=None), "processing_class": tokenizer}
    if options.objective == "pairs":
        rows = pair_rows(
            labelled, term, per_problem=options.pairs_per_problem, margin=options.margin, seed=config.seed
        )
        return PairRewardTrainer(train_dataset=Dataset.from_list(rows), **common)
    rows = token_rows(labelled, term, labels=labels, min_p=min_p)
    loss = RelaxedLoss(options.relaxed, options.draws, options.gradient_matching)
    return TokenRewardTrainer(train_dataset=Dataset.from_list(rows), options=loss, **common)


def _bare(model: Any) -> PreTrainedModel:
    """The classifier inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _head(model: Any) -> torch.Tensor:
    """The trained weight of the score head."""
    return next(weight for name, weight in model.named_parameters() if "score" in name and weight.requires_grad).data
