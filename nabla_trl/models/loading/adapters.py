"""Find LoRA adapters, read what they were made for, and merge them in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from nabla_trl.utils.files import read_json_file
from nabla_trl.utils.formatting import format_error, format_load_error
from nabla_trl.utils.identity import is_same_model

ADAPTER_CONFIG_FILE = "adapter_config.json"


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
