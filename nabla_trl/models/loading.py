"""Load policies, causal LMs and tokenizers, merge LoRA adapters in memory, and map one vocabulary to another."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from nabla_trl.models.decoding import TransformersBackend
from nabla_trl.models.flops import measure_model_size
from nabla_trl.models.kv_cache import check_croppable_cache
from nabla_trl.models.options import PromptOptions
from nabla_trl.models.policy import Policy
from nabla_trl.models.prompts import check_prompt_options
from nabla_trl.utils.files import read_json_file
from nabla_trl.utils.formatting import format_error, format_load_error
from nabla_trl.utils.identity import is_same_model

ADAPTER_CONFIG_FILE = "adapter_config.json"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


# --- policies -------------------------------------------------------------------------------------------


def load_policy(
    name: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    prompt_options: PromptOptions | None = None,
) -> Policy:
    """Load a frozen policy from a hub id or a local folder.

    Args:
        name: a causal LM, or an adapter of one (see `load_causal_lm`).
        adapter: LoRA adapter to merge into the model in memory.

    Raises:
        ValueError: nothing can be loaded from `name`, weights are missing or have another shape, an unknown dtype or
            device, a cache that cannot be cropped, no eos token, an adapter that does not fit or changes nothing, or
            prompt options that the chat template does not support.
    """
    prompt_options = PromptOptions() if prompt_options is None else prompt_options
    tokenizer = load_tokenizer(name, revision)
    check_prompt_options(prompt_options, tokenizer, name)
    model = load_causal_lm(name, dtype=dtype, device=device, revision=revision)
    if adapter is not None:
        model = merge_adapter(model, adapter)
    policy = freeze_policy(model, tokenizer, name if adapter is None else f"{name}+{adapter}")
    return replace(policy, prompt_options=prompt_options)


def freeze_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Policy:
    """Return a policy of a model in memory. The model is put in eval mode and frozen."""
    check_croppable_cache(model)
    model.eval().requires_grad_(False)
    stop_ids = _get_stop_ids(model, tokenizer)
    num_rows = model.get_output_embeddings().weight.shape[0]
    forbidden_mask = torch.ones(num_rows, dtype=torch.bool)
    forbidden_mask[[index for index in tokenizer.get_vocab().values() if index < num_rows]] = False
    padding = tokenizer.pad_token_id
    if padding is not None and padding < num_rows and padding not in stop_ids:
        forbidden_mask[padding] = True
    return Policy(
        model,
        tokenizer,
        name,
        measure_model_size(model, "policy"),
        stop_ids,
        forbidden_mask.to(model.device),
        _has_plain_head(model),
        TransformersBackend(),
    )


@torch.no_grad()
def _has_plain_head(model: PreTrainedModel) -> bool:
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    hidden = model.base_model(input_ids=ids).last_hidden_state
    return torch.allclose(model.get_output_embeddings()(hidden), model(input_ids=ids).logits, atol=1e-3, rtol=1e-3)


def _get_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos_ids = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    stop_ids = frozenset(index for index in eos_ids if index is not None)
    if not stop_ids:
        raise ValueError(f"{model.name_or_path or 'the model'} has no eos token: responses could never end")
    return stop_ids


# --- models and tokenizers ------------------------------------------------------------------------------


def load_causal_lm(name: str, *, dtype: str, device: str | None, revision: str | None = None) -> PreTrainedModel:
    """Load a causal LM, or the base of an adapter (in a folder or on the hub) with the adapter merged in.

    Raises:
        ValueError: as `load_model` and `merge_adapter`, or an adapter of a classifier.
    """
    folder = find_adapter_folder(name, revision)
    if folder is None:
        return load_model(AutoModelForCausalLM, name, dtype=dtype, device=device, revision=revision)
    info = read_adapter_info(folder)
    if info.task_type == "SEQ_CLS":
        raise ValueError(f"{name} is an adapter of a reward model, not of a causal LM: it gives no likelihoods")
    base = load_causal_lm(info.base_model, dtype=dtype, device=device, revision=info.revision)
    model = merge_adapter(base, folder)
    model.name_or_path = name  # an adapter trained from it belongs to it, not to its base
    return model


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
    """Call `auto_class.from_pretrained`, and refuse files that leave weights newly initialized.

    Args:
        allowed_missing: a weight that may be missing, because the caller loads it.
        config_options: options of the model's config.

    Raises:
        ValueError: nothing can be loaded from `name`, weights are missing, or an unknown dtype or device.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    resolved_device = resolve_device(device)
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
    return model.to(resolved_device)


def resolve_device(device: str | None) -> str:
    """Return `device`, or the default device for None.

    Raises:
        ValueError: there is no such device.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {device!r}: {format_error(error)}") from error
    return device


def load_architecture(name: str, revision: str | None = None) -> str:
    """Return the class name in a model's config, "" where the config has none."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(format_load_error("a model config", name, error)) from error
    return (config.architectures or [""])[0]


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. An adapter without a tokenizer has that of its base."""
    source, source_revision = _find_tokenizer_source(name, revision)
    try:
        return AutoTokenizer.from_pretrained(source, revision=source_revision)
    except (OSError, ValueError) as error:
        raise ValueError(format_load_error("a tokenizer", name, error)) from error


def _find_tokenizer_source(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return where the tokenizer is, and its revision."""
    folder = find_adapter_folder(name, revision)
    if folder is None:
        return name, revision
    if Path(folder, "tokenizer_config.json").is_file():
        return folder, None
    info = read_adapter_info(folder)
    return _find_tokenizer_source(info.base_model, info.revision)


# --- adapters -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterInfo:
    """What the config of an adapter says.

    Attributes:
        task_type: PEFT's task type, "" where the config has none.
        base_model: the model that the adapter was trained from.
        revision: revision of that model. None: any.
    """

    task_type: str
    base_model: str
    revision: str | None


def is_adapter(name: str) -> bool:
    """Return whether `name` is a local folder with an adapter."""
    return Path(name, ADAPTER_CONFIG_FILE).is_file()


def find_adapter_folder(name: str, revision: str | None = None) -> str | None:
    """Return the folder of an adapter, or None if the model is not an adapter. One on the hub is downloaded.

    Raises:
        ValueError: an adapter on the hub that cannot be downloaded.
    """
    if Path(name).exists():
        return name if is_adapter(name) else None
    try:
        config_file = find_adapter_config_file(name, revision=revision)
    except OSError:  # no such model: loading it will say so
        return None
    try:
        return snapshot_download(name, revision=revision, ignore_patterns=["merged/*"]) if config_file else None
    except OSError as error:
        raise ValueError(format_load_error("an adapter", name, error)) from error


def read_adapter_info(folder: str) -> AdapterInfo:
    """Read what the config of an adapter says.

    Raises:
        ValueError: the config is not JSON, or does not name the base.
    """
    config = read_json_file(Path(folder, ADAPTER_CONFIG_FILE))
    base_model = config.get("base_model_name_or_path")
    if not base_model:
        raise ValueError(f"adapter {folder} does not name the model that it was made for")
    return AdapterInfo(config.get("task_type") or "", base_model, config.get("revision"))


def merge_adapter(model: PreTrainedModel, adapter: str, *, required_head: str | None = None) -> PreTrainedModel:
    """Merge a LoRA adapter into the weights, in their own dtype.

    Args:
        required_head: name of the score head's weight, random in `model`, that the adapter must hold ("score.weight").

    Raises:
        ValueError: not an adapter folder, or an adapter for another base, without effect, or without the head.
    """
    base = model.name_or_path
    if not is_adapter(adapter) and Path(adapter).exists():
        raise ValueError(f"{adapter} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
    _check_base_model(adapter, base)
    with _wrap_load_errors(adapter, base):
        has_head = required_head is None or _has_weight(adapter, required_head)
    if not has_head:
        raise ValueError(f"adapter {adapter} does not carry {required_head}: its score head would be random")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with _wrap_load_errors(adapter, base):
        merged, unmatched = _load_and_merge(model, adapter)
    if unmatched:
        raise ValueError(f"adapter {adapter} does not fit {base}: {unmatched[0]} is in one of them only")
    # A head always differs from a random one, so that it does not show whether the adapter learned anything.
    if all(torch.equal(before[name], weight) for name, weight in merged.named_parameters() if name != required_head):
        raise ValueError(f"adapter {adapter} changes no weight of {base}: it is inert")
    return merged


@contextmanager
def _wrap_load_errors(adapter: str, base: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot put adapter {adapter} on {base}: {format_error(error)}") from error


def _has_weight(adapter: str, name: str) -> bool:
    from peft import load_peft_weights

    return any(key.endswith(f".{name}") for key in load_peft_weights(adapter, device="cpu"))


def _load_and_merge(model: PreTrainedModel, adapter: str) -> tuple[PreTrainedModel, list[str]]:
    """Return the merged model, and the names of weights that only the model or only the adapter has."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # the caller raises an error
        wrapped = PeftModel.from_pretrained(model, adapter)
    result = wrapped.load_adapter(adapter, "default")  # again, for the keys that from_pretrained does not return
    return wrapped.merge_and_unload(), sorted([*result.missing_keys, *result.unexpected_keys])


def _check_base_model(adapter: str, base: str) -> None:
    """Refuse an adapter for another base. A hub id and a local copy cannot be told apart, and are accepted."""
    if not is_adapter(adapter):
        return
    expected = read_json_file(Path(adapter, ADAPTER_CONFIG_FILE)).get("base_model_name_or_path") or base
    if not is_same_model(base, expected) and Path(base).exists() == Path(expected).exists():
        raise ValueError(f"adapter {adapter} was made for {expected}, not for {base}")


# --- vocabularies ---------------------------------------------------------------------------------------


def map_vocabulary(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, *, num_source_rows: int, num_target_rows: int
) -> Tensor:
    """Return the target id of each source id, matched by token string, and −1 where the target has no such token.

    Only special and added tokens may be missing. A reward that lacks an ordinary token of the policy cannot read its
    responses.

    Args:
        num_source_rows: rows of the source model's output head. Rows beyond its vocabulary map to −1.
        num_target_rows: rows of the target model's embedding table.

    Returns:
        [num_source_rows] long.

    Raises:
        ValueError: ordinary tokens are missing. The first five are named.
    """
    target_ids = target.get_vocab()
    special = set(source.all_special_tokens) | set(source.get_added_vocab())
    vocab_map = torch.full((num_source_rows,), -1, dtype=torch.long)
    missing = []
    for token, source_id in sorted(source.get_vocab().items(), key=lambda item: item[1]):
        target_id = target_ids.get(token)
        if target_id is not None and target_id < num_target_rows and source_id < num_source_rows:
            vocab_map[source_id] = target_id
        elif token not in special and source_id < num_source_rows:
            missing.append(token)
    if missing:
        names = ", ".join(map(repr, missing[:5])) + (" …" if len(missing) > 5 else "")
        raise ValueError(
            f"the reward's vocabulary lacks {len(missing)} of the policy's tokens ({names}): "
            "gradients need a reward over the same token strings"
        )
    return vocab_map
