"""Distillation: supervised fine-tuning of a LoRA adapter on the ids of refined traces. The one room that loads TRL."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_trl.compute import ModelSize, model_size
from nabla_trl.models import load_model, load_tokenizer
from nabla_trl.traces import Trace
from nabla_trl.views import sft_rows

if TYPE_CHECKING:
    from trl import SFTConfig


@dataclass
class LoraArguments:
    """The adapter."""

    lora_r: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of the adapter, over its rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "modules to adapt; all-linear = all but the head"},
    )


@dataclass(frozen=True)
class Trained:
    """What a training run did: rows used, rows left out by reason, tokens and FLOPs spent, wall seconds."""

    rows: int
    skipped: dict[str, int]
    epochs: float
    tokens: int
    flops: float
    seconds: float
    loss: float


def train_sft(
    policy: str, traces: Sequence[Trace], output: Path, *, lora: LoraArguments, config: SFTConfig, dtype: str
) -> Trained:
    """Train an adapter for `policy` on finished traces and write it to `output` (whole or not at all).

    The trainer sees `input_ids` and `labels`: text is never tokenised again.

    Raises:
        ValueError: no usable trace, a loss that is not finite, or an adapter that did not change.
    """
    from datasets import Dataset
    from trl import SFTTrainer

    rows, skipped = sft_rows(traces)
    if not rows:
        raise ValueError(
            f"no trace can be trained on ({_listed(skipped)}): raise max_new_tokens, rounds or the number of problems"
        )
    model = load_model_for_training(policy, dtype, config)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(policy),
        peft_config=lora_config(lora, "CAUSAL_LM"),
    )
    size = model_size(model, "policy")
    added = sum(weight.numel() for name, weight in trainer.model.named_parameters() if "lora_" in name)
    result = trainer.train()
    if not result.training_loss == result.training_loss:
        raise ValueError(f"the training loss became nan (learning_rate {config.learning_rate}): no adapter written")
    if all(not weight.any() for name, weight in trainer.model.named_parameters() if "lora_B" in name):
        raise ValueError(
            f"{trainer.state.global_step} steps of training changed nothing: lower warmup_steps or raise "
            "num_train_epochs"
        )
    save_whole(trainer, output)
    epochs = float(trainer.state.epoch or 0.0)
    return Trained(
        rows=len(rows),
        skipped=dict(skipped),
        epochs=epochs,
        tokens=round(epochs * sum(len(row["input_ids"]) for row in rows)),
        flops=epochs * sum(row_flops(size, added, len(row["input_ids"])) for row in rows),
        seconds=float(result.metrics["train_runtime"]),
        loss=float(result.training_loss),
    )


def load_model_for_training(policy: str, dtype: str, config: SFTConfig) -> Any:
    """The policy with weights in `dtype`, on the device of the trainer."""
    from transformers import AutoModelForCausalLM

    return load_model(AutoModelForCausalLM, policy, dtype=dtype, device=str(config.device))


def lora_config(lora: LoraArguments, task_type: str, modules_to_save: list[str] | None = None) -> Any:
    """PEFT's configuration of an adapter."""
    from peft import LoraConfig

    modules: Any = lora.lora_target_modules
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=modules[0] if modules == ["all-linear"] else modules,
        modules_to_save=modules_to_save,
        task_type=task_type,
    )


def row_flops(size: ModelSize, added: int, count: int, *, frozen: bool = True) -> float:
    """Forward and backward of `count` tokens: a base, frozen or trained, and `added` weights of an adapter."""
    base = size.forward_flops(0, count) + size.backward_flops(0, count, frozen=frozen)
    return base + 3 * 2 * added * count


def save_whole(trainer: Any, output: Path) -> None:
    """The trainer's model and tokenizer in `output`, whole or not at all; by the main process, the others wait."""
    if trainer.accelerator.is_main_process:
        _save(trainer, output)
    trainer.accelerator.wait_for_everyone()


def _save(trainer: Any, output: Path) -> None:
    scratch = output.with_name(output.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    trainer.save_model(str(scratch))
    (scratch / "training_args.bin").unlink(missing_ok=True)  # a pickle of paths and hardware, of use to no reader
    shutil.rmtree(output, ignore_errors=True)
    scratch.rename(output)


def _listed(skipped: dict[str, int]) -> str:
    return json.dumps(dict(skipped)) if skipped else "there are none"
