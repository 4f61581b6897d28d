"""What is trained of a model (a LoRA adapter, one on a 4-bit base, or all weights), and saving it whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TrainingArguments

from nabla_trl.models.flops import ModelSize
from nabla_trl.models.loading import DTYPES, find_adapter_folder, load_causal_lm
from nabla_trl.utils.formatting import format_error, format_load_error

TUNING_MODES = ("full", "lora", "qlora")


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


def build_lora_config(lora: LoraArguments, task_type: str, modules_to_save: list[str] | None = None) -> Any:
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


def load_trainable_model(name: str, *, tuning: str, dtype: str, config: TrainingArguments) -> PreTrainedModel:
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
    return load_causal_lm(name, dtype="float32" if tuning == "full" else dtype, device=str(config.device))


def check_precision(tuning: str, dtype: str, config: TrainingArguments) -> None:
    """Refuse a half-precision base under a float32 adapter without autocast, whose matrices cannot be multiplied."""
    if tuning == "lora" and dtype != "float32" and not (config.bf16 or config.fp16):
        raise ValueError(
            f"a {dtype} base under a float32 adapter needs mixed precision: set bf16 true, or dtype float32"
        )


def check_reference_model(name: str, tuning: str) -> None:
    """Refuse to hold full weights to an adapter: TRL would load its base as the reference instead."""
    if tuning == "full" and find_adapter_folder(name) is not None:
        raise ValueError(
            f"{name} is an adapter, which cannot be the reference of full weights: set tuning lora, or start from "
            "whole weights (nabla-trl ship --merge makes them)"
        )


def _load_four_bit(name: str, dtype: str, config: TrainingArguments) -> PreTrainedModel:
    from peft import prepare_model_for_kbit_training

    if find_adapter_folder(name) is not None:
        raise ValueError(f"{name} is an adapter: qlora starts from whole weights (nabla-trl ship --merge makes them)")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            quantization_config=build_4bit_config(DTYPES[dtype], head_name="lm_head"),
            dtype=DTYPES[dtype],
            device_map={"": str(config.device)},
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(format_load_error("a model", name, error)) from error
    disable_avx512_bf16_kernel(model)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)


def build_4bit_config(compute_dtype: torch.dtype, *, head_name: str) -> BitsAndBytesConfig:
    """NF4 with double quantisation (QLoRA, arXiv 2305.14314); the head stays as it is."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[head_name],
    )


def disable_avx512_bf16_kernel(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16 a 4-bit forward without autograd repacks the weights for a kernel that has none:
    gradients after it are silently wrong."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def cast_trainable_to_float32(model: Any) -> None:
    """Trained weights in float32: TRL rounds adapters of 4-bit bases to bfloat16, where small steps are lost."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def compute_training_flops(size: ModelSize, adapter_parameters: int, num_tokens: int, *, frozen: bool = True) -> float:
    """Forward and backward of `count` tokens: a base, frozen or trained, and `added` weights of an adapter."""
    base = size.compute_forward_flops(0, num_tokens) + size.compute_backward_flops(0, num_tokens, frozen=frozen)
    return base + 3 * 2 * adapter_parameters * num_tokens


def save_model_atomically(trainer: Any, output_dir: Path) -> None:
    """The trainer's model and tokenizer in `output`, whole or not at all.

    Every process calls this: weights that are sharded over them are gathered.

    Raises:
        ValueError: it cannot be written.
    """
    scratch = output_dir.with_name(output_dir.name + ".tmp")
    if trainer.accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.parent.mkdir(parents=True, exist_ok=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(scratch))
    except (OSError, RuntimeError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise ValueError(f"cannot save {output_dir}: {format_error(error)}") from error
    if trainer.accelerator.is_main_process:
        for name in ("training_args.bin", "README.md"):  # paths and hardware; a card that knows no figures
            (scratch / name).unlink(missing_ok=True)
        shutil.rmtree(output_dir, ignore_errors=True)
        scratch.rename(output_dir)
    trainer.accelerator.wait_for_everyone()


def find_last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint of a trainer's folder; None without one.

    A trainer writes its state last, so a checkpoint without a readable one was cut off while it was written.
    """
    found = {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    whole = [step for step, path in found.items() if _is_complete(path)]
    return found[max(whole)] if whole else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True
