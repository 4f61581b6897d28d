"""Load what is trained of a model (a LoRA adapter, one on a 4-bit base, or all weights), and save it whole."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TrainingArguments

from nabla_trl.models.flops import ModelSize
from nabla_trl.models.loading import (
    ADAPTER_CONFIG_FILE,
    DTYPES,
    find_adapter_folder,
    has_adapter_beside,
    load_causal_lm,
    load_model,
    load_tokenizer,
)
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option
from nabla_trl.utils.files import read_json_file, write_atomic
from nabla_trl.utils.formatting import format_error
from nabla_trl.utils.progress import announce

TUNING_MODES = ("full", "lora", "qlora")


@dataclass
class LoraArguments:
    """Options of the LoRA adapter."""

    lora_r: int = option(16, "Rank of the adapter. Increase it if the adapter learns too little.")
    lora_alpha: int = option(32, "Scale of the adapter, which is divided by its rank.")
    lora_dropout: float = option(0.0, "Dropout on the input of the adapter.")
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules to adapt. all-linear adapts all linear layers but the head."},
    )

    def __post_init__(self) -> None:
        checks = Checks()
        checks.require(self.lora_r >= 1, f"lora_r must be at least 1, not {self.lora_r}")
        checks.require(self.lora_alpha >= 1, f"lora_alpha must be at least 1, not {self.lora_alpha}")
        checks.require(
            0 <= self.lora_dropout < 1, f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout:g}"
        )
        checks.require(bool(self.lora_target_modules), "lora_target_modules names no module")
        checks.raise_faults()


def build_lora_config(lora: LoraArguments, task_type: str, modules_to_save: list[str] | None = None) -> Any:
    """Return PEFT's configuration of an adapter."""
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
    """Load the causal LM that training starts from, on the trainer's device. The trainer adds the adapter.

    Args:
        dtype: of a frozen base. Weights that are trained themselves are float32, since bfloat16 loses small steps.

    Raises:
        ValueError: nothing loadable at `name`, an adapter as the base of another one in 4 bits, or a half-precision
            base without mixed precision.
    """
    check_precision(tuning, dtype, config)
    with announce(f"loading {name} to train it"):
        if tuning == "qlora":
            return _load_four_bit(name, dtype, config)
        weights_dtype = "float32" if tuning == "full" else dtype
        model = load_causal_lm(name, dtype=weights_dtype, device=str(config.device), sharded=True)
    if has_adapter_beside(model):
        raise ValueError(f"{name} is an adapter beside quantized weights: train from whole weights")
    return model


def check_precision(tuning: str, dtype: str, config: TrainingArguments) -> None:
    """Refuse a half-precision base with a float32 adapter without autocast: their matrices cannot be multiplied."""
    if tuning == "lora" and dtype in {*DTYPES} - {"float32"} and not (config.bf16 or config.fp16):
        raise ValueError(
            f"a {dtype} base under a float32 adapter needs mixed precision: set bf16 true, or dtype float32"
        )


def check_reference_model(name: str, tuning: str) -> None:
    """Refuse full weights with an adapter as their reference: TRL would load the adapter's base instead."""
    if tuning == "full" and find_adapter_folder(name) is not None:
        raise ValueError(
            f"{name} is an adapter, which cannot be the reference of full weights: set tuning lora, or start from "
            "whole weights (nabla-trl export --merge writes them)"
        )


def _load_four_bit(name: str, dtype: str, config: TrainingArguments) -> PreTrainedModel:
    from peft import prepare_model_for_kbit_training

    if find_adapter_folder(name) is not None:
        raise ValueError(
            f"{name} is an adapter: qlora starts from whole weights (nabla-trl export --merge writes them)"
        )
    model = load_model(
        AutoModelForCausalLM,
        name,
        dtype=dtype,
        device=str(config.device),
        model_options={"quantization_config": build_4bit_config(DTYPES[dtype], head_name="lm_head")},
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)


def build_4bit_config(compute_dtype: torch.dtype, *, head_name: str) -> BitsAndBytesConfig:
    """Return NF4 with double quantization (QLoRA, arXiv 2305.14314). The head is not quantized."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[head_name],
    )


def load_padded_tokenizer(name: str) -> Any:
    """Load a tokenizer with a padding token, which trainers need."""
    tokenizer = load_tokenizer(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def cast_trainable_to_float32(model: Any) -> None:
    """Turn trained weights into float32: TRL rounds adapters of 4-bit bases to bfloat16, which loses small steps."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def compute_training_flops(size: ModelSize, adapter_parameters: int, num_tokens: int, *, frozen: bool = True) -> float:
    """Return the FLOPs of forward and backward passes.

    Args:
        size: of the base.
        adapter_parameters: weights of the adapter, 0 without one.
        frozen: whether the base is not trained.
    """
    base = size.compute_forward_flops(0, num_tokens) + size.compute_backward_flops(0, num_tokens, frozen=frozen)
    return base + 3 * 2 * adapter_parameters * num_tokens


def save_model_atomically(trainer: Any, output_dir: Path) -> None:
    """Save the trainer's model and tokenizer, whole or not at all.

    Every process must call this, since weights that are sharded over processes are gathered.

    Raises:
        ValueError: the folder cannot be written.
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
        for name in ("training_args.bin", "README.md"):  # paths and hardware, a card without figures
            (scratch / name).unlink(missing_ok=True)
        make_base_path_absolute(scratch)
        shutil.rmtree(output_dir, ignore_errors=True)
        scratch.rename(output_dir)
    trainer.accelerator.wait_for_everyone()


def make_base_path_absolute(folder: Path) -> None:
    """Name the base of an adapter by its absolute path if it is a local folder, so that it loads from any directory.

    A folder without an adapter stays as it is.

    Raises:
        ValueError: the configuration of the adapter is not JSON.
        OSError: it cannot be written.
    """
    path = folder / ADAPTER_CONFIG_FILE
    if not path.exists():
        return
    config = read_json_file(path)
    base = config.get("base_model_name_or_path") or ""
    if isinstance(base, str) and base and not Path(base).is_absolute() and Path(base).is_dir():
        write_atomic(path, json.dumps(config | {"base_model_name_or_path": os.path.abspath(base)}, indent=2) + "\n")


def find_last_checkpoint(folder: Path) -> Path | None:
    """Return the latest complete checkpoint in a trainer's folder, or None.

    A trainer writes its state last, so a checkpoint without a readable state was cut off while it was written.
    """
    paths = {int(path.name[11:]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    complete = [step for step, path in paths.items() if _is_complete(path)]
    return paths[max(complete)] if complete else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return True
