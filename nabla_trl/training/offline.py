"""Train a policy on traces by SFT, reward-weighted regression, DPO or soft targets, as token ids."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    build_soft_target_rows,
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
    load_padded_tokenizer,
    load_trainable_model,
    save_model_atomically,
)
from nabla_trl.training.rollouts import RolloutOptions
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option
from nabla_trl.utils.formatting import pluralize

if TYPE_CHECKING:
    from trl import SFTConfig

    from nabla_trl.training.callbacks import EvaluationCallback

SOFT_TARGETS, ON_POLICY = "soft-targets", "on-policy-distillation"
OFFLINE_METHODS = ("sft", "reward-weighted", "dpo", SOFT_TARGETS)  # on traces
GROUP_METHODS = ("rloo", "grpo")  # on groups of samples of the policy in training
ONLINE_METHODS = (*GROUP_METHODS, ON_POLICY)  # on samples of the policy in training
TRAIN_METHODS = (*OFFLINE_METHODS, *ONLINE_METHODS)
ONLINE_REWARDS = ("reward", "verifier")
FORWARD_KL, REVERSE_KL = "forward_kl", "reverse_kl"
DEFAULT_DIVERGENCES = {SOFT_TARGETS: FORWARD_KL, ON_POLICY: REVERSE_KL}


@dataclass
class TrainOptions(RolloutOptions):
    """Options of training beside the trainer's own arguments. β is the search's, for all methods."""

    tuning: str = option("lora", "Weights to train: lora, qlora (an adapter on a 4-bit base) or full (all weights).")
    sft_selection: str = option(
        "best",
        "Responses that sft trains on: best (the best of each problem), improved (all accepted responses above the "
        "first one's reward), samples (the last response of every Metropolis chain) or correct (every distinct last "
        "response with the right answer).",
    )
    divergence: str | None = option(
        None,
        "KL that soft-targets and on-policy-distillation minimize between the policy p and the refined distribution "
        "q. forward_kl is KL(q ‖ p) and covers all that q holds likely. reverse_kl is KL(p ‖ q) and avoids what q "
        "holds unlikely (default: forward_kl for soft-targets, reverse_kl for on-policy-distillation).",
    )
    num_generations: int = option(8, "Responses that rloo and grpo sample per problem.")
    num_iterations: int = option(1, "Optimizer steps of rloo and grpo on the same responses.")
    online_reward: str = option(
        "reward",
        "What rloo and grpo maximize: reward (that of the search) or verifier (1 for a correct answer, else 0).",
    )
    max_callback_problems: int = option(
        0, "Training problems that are held out, to measure accuracy, reward and KL during training. 0 disables it."
    )
    callback_steps: int = option(50, "Steps between two evaluations on the held-out training problems.")
    stop_on_overoptimization: bool = option(
        False,
        "Stop when an evaluation during training finds a higher reward and a significantly lower accuracy, and "
        "restore the most accurate weights (the last ones, if none was more accurate than the untrained policy).",
    )

    def __post_init__(self) -> None:
        checks = Checks()
        with checks.collect():
            super().__post_init__()
        for name, choices in (
            ("tuning", TUNING_MODES),
            ("sft_selection", SFT_SELECTIONS),
            ("online_reward", ONLINE_REWARDS),
            ("divergence", (FORWARD_KL, REVERSE_KL)),
        ):
            value = getattr(self, name)
            is_default = name == "divergence" and value is None
            checks.require(
                is_default or value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}"
            )
        checks.require(
            self.num_generations >= 2,
            "num_generations must be at least 2: a response is compared with others to its problem",
        )
        checks.require(
            self.num_iterations >= 1 and self.callback_steps >= 1 and self.max_callback_problems >= 0,
            "num_iterations and callback_steps must be at least 1, max_callback_problems not negative",
        )
        checks.require(
            not self.stop_on_overoptimization or bool(self.max_callback_problems),
            "stop_on_overoptimization needs evaluations during training: set max_callback_problems",
        )
        checks.raise_faults()

    def get_divergence(self, method: str) -> str:
        """Return the KL that a distillation minimizes."""
        return self.divergence or DEFAULT_DIVERGENCES[method]


@dataclass(frozen=True)
class TrainingResult:
    """Record of a training run.

    Attributes:
        rows: number of rows trained on (online: problems).
        skipped: number of rows left out, by reason.
        tokens: trained tokens (online: sampled tokens with their prompts).
        flops: of training. Online also of sampling, of scoring and of the reference model.
        seconds: wall-clock time of all sessions of a resumed run.
        stop_reason: why training ended early, empty where it did not.
        method_metrics: metrics of this method alone (groups without variance, clipped responses).
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
    """Return the rows that a method on traces is trained on.

    Args:
        sft_selection: responses for sft, see `build_sft_rows`.
        beta: β of the weights of reward-weighted.
        include_unfinished: take responses that were cut at the limit, too.

    Raises:
        ValueError: there are none, or no proposal was accepted, so that the search teaches nothing.
    """
    takes_accepted = method == "dpo" or (method == "sft" and sft_selection in ("best", "improved"))
    num_proposals = sum(len(trace.revisions) for trace in traces)
    # Several draws of the policy for a problem, and no proposals: the best of them is rejection sampling.
    has_draws = not num_proposals and len({(trace.task, trace.problem_id) for trace in traces}) < len(traces)
    is_rejection_sampling = has_draws and method == "sft" and sft_selection == "best"
    has_accepted = any(revision.accepted for trace in traces for revision in trace.revisions)
    if takes_accepted and not is_rejection_sampling and not has_accepted:
        raise ValueError(
            f"none of {num_proposals} proposals in {len(traces)} traces was accepted, so there is nothing to learn "
            "from: raise max_rounds or top_k_candidates, choose another solver.gradient_at, or audit the reward"
        )
    if method == "dpo":
        training_rows = build_preference_rows(traces)
    elif method == "reward-weighted":
        training_rows = build_weighted_rows(traces, beta, include_unfinished=include_unfinished)
    elif method == SOFT_TARGETS:
        training_rows = build_soft_target_rows(traces)
    else:
        training_rows = build_sft_rows(traces, sft_selection, include_unfinished=include_unfinished)
    if not training_rows.rows:
        reasons = ", ".join(f"{number} {reason}" for reason, number in training_rows.skipped.items())
        raise ValueError(
            f"no trace can be trained on ({reasons or 'there are none'}): raise max_new_tokens, max_rounds or the "
            "number of problems"
        )
    return training_rows


def check_tokenizer(traces: Sequence[Trace], policy: str) -> None:
    """Refuse traces whose ids mean other tokens than the policy's."""
    policy_hash = hash_vocabulary(load_tokenizer(policy))
    for trace in traces:
        trace_hash = trace.meta.get("tokenizer_hash", policy_hash)
        if trace_hash != policy_hash:
            raise ValueError(
                f"trace {trace.problem_id} was made with another tokenizer (hash {trace_hash}) than {policy}'s "
                f"({policy_hash}): generate the traces again"
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
    trl_options: Mapping[str, Any] | None = None,
    divergence: str = FORWARD_KL,
) -> TrainingResult:
    """Train a policy on rows of traces and write the adapter, or the full model, whole or not at all.

    Checkpoints are the trainer's, in `config.output_dir`. Training continues from the last complete one.

    Args:
        method: "sft", "reward-weighted", "dpo" or "soft-targets".
        beta: of DPO. That of soft targets is in the targets.
        dtype: of a frozen base.
        trl_options: further options of TRL's trainer (see `trl_options.select_trl_options`).
        divergence: of soft-targets, "forward_kl" or "reverse_kl".

    Raises:
        ValueError: no row within `max_length`, a loss that is not finite, weights that did not change, a disk that is
            full, or what `load_trainable_model` and (dpo) `check_reference_model` refuse.
    """
    if method == "dpo":
        check_reference_model(policy, tuning)
    else:
        training_rows = _drop_long_rows(training_rows, config.max_length)
    is_frozen = tuning != "full"
    model = load_trainable_model(policy, tuning=tuning, dtype=dtype, config=config)
    peft_config = build_lora_config(lora, "CAUSAL_LM") if is_frozen else None
    trainer = _build_offline_trainer(
        method, policy, model, training_rows, beta, peft_config, config, trl_options or {}, divergence
    )
    size = measure_model_size(model, "policy")
    outcome = run_trainer(trainer, output_dir, tuning=tuning, callback=callback, name=f"train {method}")
    lengths = [length for row in training_rows.rows for length in _list_sequence_lengths(row)]
    adapter_parameters = outcome.trainable_parameters if is_frozen else 0
    flops = [compute_training_flops(size, adapter_parameters, length, frozen=is_frozen) for length in lengths]
    if method == "dpo":  # the reference reads both responses, too
        flops += [size.compute_forward_flops(0, length) for length in lengths]
    return TrainingResult(
        method=method,
        tuning=tuning,
        beta=None if method in ("sft", SOFT_TARGETS) else beta,
        rows=len(training_rows.rows),
        skipped=dict(training_rows.skipped),
        steps=outcome.steps,
        epochs=outcome.epochs,
        tokens=round(outcome.epochs * sum(lengths)),
        flops=outcome.epochs * sum(flops),
        seconds=outcome.seconds,
        loss=outcome.loss,
        stop_reason=outcome.stop_reason,
    )


def _drop_long_rows(training_rows: TrainingRows, max_length: int | None) -> TrainingRows:
    """Return the rows that TRL would not cut, since a response without its end teaches not to end."""
    rows = [row for row in training_rows.rows if max_length is None or len(row["input_ids"]) <= max_length]
    if not rows:
        raise ValueError(f"every row is longer than max_length {max_length}: raise it")
    num_long = len(training_rows.rows) - len(rows)
    return TrainingRows(rows, training_rows.skipped + Counter({"longer than max_length": num_long}))


def _list_sequence_lengths(row: dict[str, Any]) -> list[int]:
    if "input_ids" in row:
        return [len(row["input_ids"])]
    return [len(row["prompt_ids"]) + len(row[name]) for name in ("chosen_ids", "rejected_ids")]


def _build_offline_trainer(
    method: str,
    policy: str,
    model: Any,
    training_rows: TrainingRows,
    beta: float,
    peft_config: Any,
    config: SFTConfig,
    trl_options: Mapping[str, Any],
    divergence: str,
) -> Any:
    from datasets import Dataset
    from trl import DPOConfig

    from nabla_trl.training.trainers import (
        SoftTargetTrainer,
        TokenIdsDPOTrainer,
        TokenIdsSFTTrainer,
        WeightedSFTTrainer,
        convert_config,
    )

    common = {
        "model": model,
        "train_dataset": Dataset.from_list(training_rows.rows),
        "processing_class": load_padded_tokenizer(policy),
        "peft_config": peft_config,
    }
    if method == "dpo":
        # Without max_length no response is cut: its end decides whether it is chosen.
        dpo_config = convert_config(DPOConfig, config, **{"max_length": None, "beta": beta, **trl_options})
        return TokenIdsDPOTrainer(args=dpo_config, **common)
    if method == SOFT_TARGETS:
        return SoftTargetTrainer(args=config, divergence=divergence, **common)
    trainer_class = WeightedSFTTrainer if method == "reward-weighted" else TokenIdsSFTTrainer
    return trainer_class(args=config, **common)


@dataclass(frozen=True)
class TrainerOutcome:
    """Result of a trainer.

    Attributes:
        trainable_parameters: number of weights that were trained.
        seconds: wall-clock time of all sessions of a resumed run.
        stop_reason: why training ended early, empty where it did not.
    """

    trainable_parameters: int
    steps: int
    epochs: float
    seconds: float
    loss: float
    stop_reason: str
    log_history: list[dict[str, Any]]


def run_trainer(
    trainer: Any, output_dir: Path, *, tuning: str, callback: EvaluationCallback | None, name: str = "train"
) -> TrainerOutcome:
    """Train from the last complete checkpoint, if there is one, and save the model and `log.jsonl` beside it.

    Args:
        name: of the training in its line of progress.

    Raises:
        ValueError: nothing trainable, a loss that is not finite, weights that did not change, or a full disk.
    """
    if tuning == "qlora":
        cast_trainable_to_float32(trainer.model)
    trainable_weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    if not trainable_weights:
        raise ValueError("nothing is trainable: lora_target_modules names no module of the policy")
    if callback is not None:
        callback.attach(trainer)
    initial_sums = _compute_weight_sums(trainer.model)
    checkpoint = find_last_checkpoint(Path(trainer.args.output_dir))
    timer = TrainingTimeCallback(checkpoint)
    trainer.add_callback(timer)
    from nabla_trl.training.callbacks import ProgressCallback

    with ProgressCallback.show(trainer, name):
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not math.isfinite(result.training_loss):
        raise ValueError(f"the training loss became {result.training_loss}: lower learning_rate; nothing written")
    stop_reason = "" if callback is None else callback.restore_best_weights(trainer)
    if torch.equal(initial_sums, _compute_weight_sums(trainer.model)):
        raise ValueError(
            f"{pluralize(trainer.state.global_step, 'step')} of training changed nothing: lower warmup_steps or raise "
            "num_train_epochs"
        )
    save_model_atomically(trainer, output_dir)
    if trainer.accelerator.is_main_process:
        lines = "".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
        output_dir.with_name("log.jsonl").write_text(lines, encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    return TrainerOutcome(
        # ZeRO-3 leaves an empty tensor in place of a sharded weight.
        trainable_parameters=sum(getattr(weight, "ds_numel", weight.numel()) for weight in trainable_weights),
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0.0),
        seconds=timer.measure_seconds(),
        loss=float(result.training_loss),
        stop_reason=stop_reason,
        log_history=list(trainer.state.log_history),
    )


class TrainingTimeCallback(TrainerCallback):
    """Timer of training over all sessions. Each checkpoint stores the seconds that led to it."""

    FILE = "training_seconds.json"

    def __init__(self, checkpoint: Path | None):
        file = None if checkpoint is None else checkpoint / self.FILE
        self._previous_seconds = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else 0.0
        self._start_time = time.perf_counter()

    def measure_seconds(self) -> float:
        """Return the seconds of training so far."""
        return self._previous_seconds + time.perf_counter() - self._start_time

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            (folder / self.FILE).write_text(json.dumps(self.measure_seconds()), encoding="utf-8")


def _compute_weight_sums(model: Any) -> Tensor:
    """Return [trainable weights, 2] sums that differ if one of the weights does. Every process must call this."""
    sums = []
    for weight in model.parameters():
        if weight.requires_grad:
            with _gathered(weight) as whole:
                sums.append(torch.stack([whole.double().sum(), whole.double().square().sum()]).cpu())
    return torch.stack(sums)


@contextmanager
def _gathered(weight: Any) -> Iterator[Tensor]:
    """Give the whole of a weight that FSDP2 or ZeRO-3 may have sharded."""
    if isinstance(weight, DTensor):
        yield weight.detach().full_tensor()
    elif hasattr(weight, "ds_id"):
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters([weight]):
            yield weight.detach()
    else:
        yield weight.detach()
