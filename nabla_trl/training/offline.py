"""Training a policy on refined traces (SFT, reward-weighted, DPO), as token ids. `alignment.py` has RLOO and GRPO."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from nabla_trl.models.flops import measure_model_size
from nabla_trl.models.loading import load_tokenizer
from nabla_trl.models.policy import hash_vocabulary
from nabla_trl.traces.datasets import (
    SFT_SELECTIONS,
    TrainingRows,
    build_preference_rows,
    build_sft_rows,
    build_weighted_rows,
)
from nabla_trl.traces.schema import Trace
from nabla_trl.training.peft import (
    TUNING_MODES,
    LoraArguments,
    build_lora_config,
    cast_trainable_to_float32,
    check_reference_model,
    compute_training_flops,
    find_last_checkpoint,
    load_trainable_model,
    save_model_atomically,
)
from nabla_trl.utils.fields import option

if TYPE_CHECKING:
    from trl import SFTConfig

    from nabla_trl.training.callbacks import EvaluationCallback

OFFLINE_METHODS = ("sft", "reward-weighted", "dpo")  # on traces
ONLINE_METHODS = ("rloo", "grpo")  # on what the policy draws as it is trained
TRAIN_METHODS = (*OFFLINE_METHODS, *ONLINE_METHODS)
ONLINE_REWARDS = ("reward", "verifier")


@dataclass
class TrainOptions:
    """What is trained and on what, beside the trainer's own arguments. β is the reasoner's, for all methods alike."""

    tuning: str = option("lora", "lora, qlora (an adapter on a 4-bit base) or full (all weights)")
    sft_selection: str = option(
        "best",
        "sft: best (per problem), improved (all accepted responses above the first one's reward) or samples (the last "
        "state of every Metropolis chain)",
    )
    num_generations: int = option(8, "rloo, grpo: responses drawn per problem")
    num_iterations: int = option(1, "rloo, grpo: optimiser steps on the same responses")
    online_reward: str = option(
        "reward", "rloo, grpo: reward (the one the search uses) or verifier (1 for a right answer, else 0)"
    )
    max_callback_problems: int = option(
        0, "training problems kept apart, to measure accuracy and KL on in training; 0 = none"
    )
    callback_steps: int = option(50, "steps between two probes")
    stop_on_overoptimization: bool = option(
        False,
        "stop when a probe finds the reward up and the accuracy down, beyond chance, and keep the weights of the most "
        "accurate probe (the last ones, where none was better than the untrained policy)",
    )

    def __post_init__(self) -> None:
        for name, choices in (("tuning", TUNING_MODES), ("select", SFT_SELECTIONS), ("online_reward", ONLINE_REWARDS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.num_generations < 2:
            raise ValueError("num_generations must be at least 2: a response is compared with others to its problem")
        if self.num_iterations < 1 or self.callback_steps < 1 or self.max_callback_problems < 0:
            raise ValueError("num_iterations and probe_steps must be at least 1, probe_problems not negative")
        if self.stop_on_overoptimization and not self.max_callback_problems:
            raise ValueError("stop_on_overoptimisation needs a probe: set probe_problems")


@dataclass(frozen=True)
class TrainingResult:
    """What a training run did.

    Attributes:
        rows: rows trained on (online: problems); `skipped`: what was left out, by reason.
        tokens, flops: of training; online also of drawing, scoring and reading them with the reference.
        seconds: wall seconds, of all sittings of a resumed run.
        stopped: why it ended early; empty where it did not.
        facts: what the method alone has to tell (zero-variance groups, clipped responses).
    """

    method: str
    tuning: str
    beta: float | None
    rows: int
    skipped: dict[str, int]
    steps: int
    epochs: float
    tokens: int
    flops: float
    seconds: float
    loss: float
    stop_reason: str = ""
    method_metrics: dict[str, float] = field(default_factory=dict)


def build_training_rows(
    method: str, traces: Sequence[Trace], *, sft_selection: str, beta: float, include_unfinished: bool = False
) -> TrainingRows:
    """The rows that a method on traces is trained on.

    Raises:
        ValueError: there are none, or no proposal was accepted, so that there is nothing of the search to learn from.
    """
    chosen = method == "dpo" or (method == "sft" and sft_selection != "samples")
    if chosen and not any(revision.accepted for trace in traces for revision in trace.revisions):
        proposed = sum(len(trace.revisions) for trace in traces)
        raise ValueError(
            f"none of {proposed} proposals in {len(traces)} traces was accepted, so there is nothing to learn from: "
            "raise rounds or candidates, choose another point, or audit the reward"
        )
    if method == "dpo":
        found = build_preference_rows(traces)
    elif method == "reward-weighted":
        found = build_weighted_rows(traces, beta, include_unfinished=include_unfinished)
    else:
        found = build_sft_rows(traces, sft_selection, include_unfinished=include_unfinished)
    if not found.rows:
        left_out = json.dumps(dict(found.skipped)) if found.skipped else "there are none"
        raise ValueError(
            f"no trace can be trained on ({left_out}): raise max_new_tokens, rounds or the number of problems"
        )
    return found


def check_tokenizer(traces: Sequence[Trace], policy: str) -> None:
    """Refuse traces whose ids mean other tokens than the policy's."""
    own = hash_vocabulary(load_tokenizer(policy))
    for trace in traces:
        made = trace.meta.get("tokenizer_hash", own)
        if made != own:
            raise ValueError(
                f"trace {trace.problem_id} was made with another tokenizer (hash {made}) than {policy}'s ({own}): "
                "make the traces anew"
            )


def train_on_traces(
    method: str,
    policy: str,
    training_rows: TrainingRows,
    output_dir: Path,
    *,
    beta: float,
    tuning: str,
    lora: LoraArguments,
    config: SFTConfig,
    dtype: str,
    callback: EvaluationCallback | None = None,
) -> TrainingResult:
    """Train a policy on rows of traces and write the adapter, or the whole model, to `output` (whole or not at all).

    Checkpoints are the trainer's, in `config.output_dir`; the last whole one there is gone on from.

    Args:
        method: "sft", "reward-weighted" or "dpo".
        beta: of DPO.
        dtype: of a frozen base.

    Raises:
        ValueError: no row within `max_length`, a loss that is not finite, weights that did not change, a disk that is
            full, or what `load_trainable` and (dpo) `check_reference` refuse.
    """
    if method == "dpo":
        check_reference_model(policy, tuning)
    else:
        training_rows = _drop_long_rows(training_rows, config.max_length)
    model = load_trainable_model(policy, tuning=tuning, dtype=dtype, config=config)
    trainer = _build_offline_trainer(method, policy, model, training_rows, beta, tuning, lora, config)
    size = measure_model_size(model, "policy")
    outcome = run_trainer(trainer, output_dir, tuning=tuning, callback=callback)
    lengths = [_count_sequence_tokens(row) for row in training_rows.rows]
    added = outcome.trainable_parameters if tuning != "full" else 0
    each = [
        compute_training_flops(size, added, count, frozen=tuning != "full") for counts in lengths for count in counts
    ]
    if method == "dpo":  # the reference reads both responses, too
        each += [size.compute_forward_flops(0, count) for counts in lengths for count in counts]
    return TrainingResult(
        method=method,
        tuning=tuning,
        beta=None if method == "sft" else beta,
        rows=len(training_rows.rows),
        skipped=dict(training_rows.skipped),
        steps=outcome.steps,
        epochs=outcome.epochs,
        tokens=round(outcome.epochs * sum(map(sum, lengths))),
        flops=outcome.epochs * sum(each),
        seconds=outcome.seconds,
        loss=outcome.loss,
        stop_reason=outcome.stop_reason,
    )


def _drop_long_rows(found: TrainingRows, longest: int | None) -> TrainingRows:
    """The rows that TRL would not cut: a response without its end teaches not to end.

    Raises:
        ValueError: there are none.
    """
    rows = [row for row in found.rows if longest is None or len(row["input_ids"]) <= longest]
    if not rows:
        raise ValueError(f"every row is longer than max_length {longest}: raise it")
    return TrainingRows(rows, found.skipped + Counter({"longer than max_length": len(found.rows) - len(rows)}))


def _count_sequence_tokens(row: dict[str, Any]) -> list[int]:
    """Tokens of the sequences of a row."""
    if "input_ids" in row:
        return [len(row["input_ids"])]
    return [len(row["prompt_ids"]) + len(row[name]) for name in ("chosen_ids", "rejected_ids")]


def _build_offline_trainer(
    method: str,
    policy: str,
    model: Any,
    found: TrainingRows,
    beta: float,
    tuning: str,
    lora: LoraArguments,
    config: SFTConfig,
) -> Any:
    from datasets import Dataset
    from trl import DPOConfig

    from nabla_trl.training.trainers import TokenIdsDPOTrainer, TokenIdsSFTTrainer, WeightedSFTTrainer, convert_config

    common = {
        "model": model,
        "train_dataset": Dataset.from_list(found.rows),
        "processing_class": load_padded_tokenizer(policy),
        "peft_config": None if tuning == "full" else build_lora_config(lora, "CAUSAL_LM"),
    }
    if method == "dpo":
        # Never cut a response: what it ends with decides which one is chosen.
        return TokenIdsDPOTrainer(args=convert_config(DPOConfig, config, max_length=None, beta=beta), **common)
    kind = WeightedSFTTrainer if method == "reward-weighted" else TokenIdsSFTTrainer
    return kind(args=config, **common)


def load_padded_tokenizer(policy: str) -> Any:
    """The policy's tokenizer with a padding token, which trainers need."""
    tokenizer = load_tokenizer(policy)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class TrainerOutcome:
    """What a trainer did; `added`: weights that were trained."""

    trainable_parameters: int
    steps: int
    epochs: float
    seconds: float
    loss: float
    stop_reason: str
    log_history: list[dict[str, Any]]


def run_trainer(trainer: Any, output_dir: Path, *, tuning: str, callback: EvaluationCallback | None) -> TrainerOutcome:
    """Train, from the last whole checkpoint if there is one, and save; the log goes to `log.jsonl` beside it.

    Raises:
        ValueError: nothing trainable, a loss that is not finite, weights that did not change, or a full disk.
    """
    if tuning == "qlora":
        cast_trainable_to_float32(trainer.model)
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    if not trained:
        raise ValueError("nothing is trainable: lora_target_modules names no module of the policy")
    if callback is not None:
        callback.attach(trainer)
    before = _compute_weight_sums(trainer.model)
    checkpoint = find_last_checkpoint(Path(trainer.args.output_dir))
    clock = TrainingTimeCallback(checkpoint)
    trainer.add_callback(clock)
    result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not math.isfinite(result.training_loss):
        raise ValueError(f"the training loss became {result.training_loss}: lower learning_rate; nothing written")
    stopped = "" if callback is None else callback.restore_best_weights(trainer)
    if torch.equal(before, _compute_weight_sums(trainer.model)):
        raise ValueError(
            f"{trainer.state.global_step} steps of training changed nothing: lower warmup_steps or raise "
            "num_train_epochs"
        )
    save_model_atomically(trainer, output_dir)
    if trainer.accelerator.is_main_process:
        lines = "".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
        output_dir.with_name("log.jsonl").write_text(lines, encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return TrainerOutcome(
        trainable_parameters=sum(weight.numel() for weight in trained),
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0.0),
        seconds=clock.measure_seconds(),
        loss=float(result.training_loss),
        stop_reason=stopped,
        log_history=list(trainer.state.log_history),
    )


class TrainingTimeCallback(TrainerCallback):
    """Seconds of training over all sittings: each checkpoint remembers how many led to it."""

    def __init__(self, checkpoint: Path | None):
        note = None if checkpoint is None else checkpoint / "clock.json"
        self._previous_seconds = (
            json.loads(note.read_text(encoding="utf-8")) if note is not None and note.exists() else 0.0
        )
        self._start_time = time.perf_counter()

    def measure_seconds(self) -> float:
        return self._previous_seconds + time.perf_counter() - self._start_time

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            (folder / "clock.json").write_text(json.dumps(self.measure_seconds()), encoding="utf-8")


def _compute_weight_sums(model: Any) -> Tensor:
    """[trained weights, 2] sums that differ once one of the weights does."""
    sums = []
    for weight in model.parameters():
        if weight.requires_grad:
            whole = weight.detach().full_tensor() if isinstance(weight, DTensor) else weight.detach()
            sums.append(torch.stack([whole.double().sum(), whole.double().square().sum()]).cpu())
    return torch.stack(sums)
