"""What is trained of a model (a LoRA adapter, one on a 4-bit base, or all weights), and saving it whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TrainingArguments

from nabla_trl.models.adapters import adapter_folder
from nabla_trl.models.flops import ModelSize
from nabla_trl.models.loading import DTYPES, load_causal
from nabla_trl.utils.formatting import cannot_load, one_line

TUNING = ("full", "lora", "qlora")


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


def load_trainable(name: str, *, tuning: str, dtype: str, config: TrainingArguments) -> PreTrainedModel:
    """The causal LM that training starts from, on the trainer's device; adapters are put on it by the trainer.

    Args:
        dtype: of a frozen base. Weights that are trained themselves are float32: in bfloat16 small steps are lost.

    Raises:
        ValueError: nothing loadable at `name`, an adapter as the base of another one in 4 bits, or a half-precision
            base without mixed precision.
    """
    check_precision(tuning, dtype, config)
    if tuning == "qlora":
        return _load_four_bit(name, dtype, config)
    return load_causal(name, dtype="float32" if tuning == "full" else dtype, device=str(config.device))


def check_precision(tuning: str, dtype: str, config: TrainingArguments) -> None:
    """Refuse a half-precision base under a float32 adapter without autocast, whose matrices cannot be multiplied."""
    if tuning == "lora" and dtype != "float32" and not (config.bf16 or config.fp16):
        raise ValueError(
            f"a {dtype} base under a float32 adapter needs mixed precision: set bf16 true, or dtype float32"
        )


def check_reference(name: str, tuning: str) -> None:
    """Refuse to hold full weights to an adapter: TRL would load its base as the reference instead."""
    if tuning == "full" and adapter_folder(name) is not None:
        raise ValueError(
            f"{name} is an adapter, which cannot be the reference of full weights: set tuning lora, or start from "
            "whole weights (nabla-trl ship --merge makes them)"
        )


def _load_four_bit(name: str, dtype: str, config: TrainingArguments) -> PreTrainedModel:
    from peft import prepare_model_for_kbit_training

    if adapter_folder(name) is not None:
        raise ValueError(f"{name} is an adapter: qlora starts from whole weights (nabla-trl ship --merge makes them)")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            quantization_config=four_bit(DTYPES[dtype], head="lm_head"),
            dtype=DTYPES[dtype],
            device_map={"": str(config.device)},
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(cannot_load("a model", name, error)) from error
    keep_autograd(model)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)


def four_bit(compute: torch.dtype, *, head: str) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314); the head stays as it is."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=[head],
    )


def keep_autograd(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16 a 4-bit forward without autograd repacks the weights for a kernel that has none:
    gradients after it are silently wrong."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def widen(model: Any) -> None:
    """Trained weights in float32: TRL rounds adapters of 4-bit bases to bfloat16, where small steps are lost."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def row_flops(size: ModelSize, added: int, count: int, *, frozen: bool = True) -> float:
    """Forward and backward of `count` tokens: a base, frozen or trained, and `added` weights of an adapter."""
    base = size.forward_flops(0, count) + size.backward_flops(0, count, frozen=frozen)
    return base + 3 * 2 * added * count


def save_whole(trainer: Any, output: Path) -> None:
    """The trainer's model and tokenizer in `output`, whole or not at all.

    Every process calls this: weights that are sharded over them are gathered.

    Raises:
        ValueError: it cannot be written.
    """
    scratch = output.with_name(output.name + ".tmp")
    if trainer.accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.parent.mkdir(parents=True, exist_ok=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(scratch))
    except (OSError, RuntimeError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise ValueError(f"cannot save {output}: {one_line(error)}") from error
    if trainer.accelerator.is_main_process:
        for name in ("training_args.bin", "README.md"):  # paths and hardware; a card that knows no figures
            (scratch / name).unlink(missing_ok=True)
        shutil.rmtree(output, ignore_errors=True)
        scratch.rename(output)
    trainer.accelerator.wait_for_everyone()


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint of a trainer's folder; None without one.

    A trainer writes its state last, so a checkpoint without a readable one was cut off while it was written.
    """
    found = {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    whole = [step for step, path in found.items() if _is_whole(path)]
    return found[max(whole)] if whole else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True
