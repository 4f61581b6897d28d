"""Load policies, causal LMs and tokenizers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nabla_trl.models.adapters import find_adapter_folder, find_tokenizer_source, merge_adapter, read_adapter_info
from nabla_trl.models.flops import measure_model_size
from nabla_trl.models.kv_cache import check_croppable_cache
from nabla_trl.models.options import PromptOptions
from nabla_trl.models.prompts import (
    check_prompt_options,
)
from nabla_trl.utils.formatting import format_error, format_load_error

if TYPE_CHECKING:
    pass
from nabla_trl.models.policy import Policy

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; of an adapter its own, or its base's where it has none."""
    home, version = find_tokenizer_source(name, revision)
    try:
        return AutoTokenizer.from_pretrained(home, revision=version)
    except (OSError, ValueError) as error:
        raise ValueError(format_load_error("a tokenizer", name, error)) from error


def load_policy(
    name: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    prompt_options: PromptOptions | None = None,
) -> Policy:
    """Load a frozen policy from a hub id or a local folder, with an optional LoRA adapter merged in memory.

    It may itself be an adapter (`load_causal`).

    Raises:
        ValueError: nothing loadable at `name`, weights missing from the file or of another shape, no such dtype
            or device, a cache that cannot be cut, no eos token, an adapter that does not fit or changes nothing,
            prompt options that the chat template cannot heed.
    """
    prompt_options = PromptOptions() if prompt_options is None else prompt_options
    tokenizer = load_tokenizer(name, revision)
    check_prompt_options(prompt_options, tokenizer, name)
    model = load_causal_lm(name, dtype=dtype, device=device, revision=revision)
    if adapter is not None:
        model = merge_adapter(model, adapter)
    policy = freeze_policy(model, tokenizer, name if adapter is None else f"{name}+{adapter}")
    return replace(policy, prompt_options=prompt_options)


def load_causal_lm(name: str, *, dtype: str, device: str | None, revision: str | None = None) -> PreTrainedModel:
    """A causal LM; of an adapter, in a folder or on the hub, its base with the adapter merged in, under its own name.

    Raises:
        ValueError: as `load_model` and `merge_adapter`, or an adapter of a classifier.
    """
    folder = find_adapter_folder(name, revision)
    if folder is None:
        return load_model(AutoModelForCausalLM, name, dtype=dtype, device=device, revision=revision)
    note = read_adapter_info(folder)
    if note.task_type == "SEQ_CLS":
        raise ValueError(f"{name} is an adapter of a reward model, not of a causal LM: it gives no likelihoods")
    model = merge_adapter(load_causal_lm(note.base_model, dtype=dtype, device=device, revision=note.revision), folder)
    model.name_or_path = name  # what is trained from it belongs to it, and not to its base
    return model


def freeze_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Policy:
    """Wrap a model that is already in memory; the model is put in eval mode and frozen."""
    check_croppable_cache(model)
    model.eval().requires_grad_(False)
    stops = get_stop_ids(model, tokenizer)
    rows = model.get_output_embeddings().weight.shape[0]
    forbidden = torch.ones(rows, dtype=torch.bool)
    known = [index for index in tokenizer.get_vocab().values() if index < rows]
    forbidden[known] = False
    padding = tokenizer.pad_token_id
    if padding is not None and padding < rows and padding not in stops:
        forbidden[padding] = True
    size = measure_model_size(model, "policy")
    return Policy(model, tokenizer, name, size, stops, forbidden.to(model.device), has_plain_head(model))


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    hidden = model.base_model(input_ids=ids).last_hidden_state
    return torch.allclose(model.get_output_embeddings()(hidden), model(input_ids=ids).logits, atol=1e-3, rtol=1e-3)


def get_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    stops = frozenset(index for index in [*listed, tokenizer.eos_token_id] if index is not None)
    if not stops:
        raise ValueError(f"{model.name_or_path or 'the model'} has no eos token: responses could never end")
    return stops


def load_model(
    auto_class: Any,
    name: str,
    *,
    dtype: str,
    device: str | None,
    revision: str | None = None,
    allowed_missing: str | None = None,
    **config_options: Any,
) -> PreTrainedModel:
    """`auto.from_pretrained`, refusing files that leave weights newly initialised.

    Args:
        supplied: a weight that may be missing, since the caller brings it.
        options: of the model's config.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    where = resolve_device(device)
    try:
        model, info = auto_class.from_pretrained(
            name, dtype=DTYPES[dtype], revision=revision, output_loading_info=True, **config_options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(format_load_error("a model", name, error)) from error
    missing = sorted({*info["missing_keys"]} - {allowed_missing})
    if missing:
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}: "
            f"they would be random. Is it a {auto_class.__name__.removeprefix('AutoModelFor')} model?"
        )
    return model.to(where)


def resolve_device(device: str | None) -> str:
    """`device`, or the default one; ValueError where there is none of that name."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {device!r}: {format_error(error)}") from error
    return device


def load_architecture(name: str, revision: str | None = None) -> str:
    """The class name in a model's config ("" where the config names none)."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(format_load_error("a model config", name, error)) from error
    return (config.architectures or [""])[0]
