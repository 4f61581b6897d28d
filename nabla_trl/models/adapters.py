"""LoRA adapters: what one was made for, and merging it into a model in memory."""

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
    """What an adapter folder says of itself: PEFT's task type ("" where it names none), the model it belongs to and
    which version of that (None: any)."""

    task_type: str
    base_model: str
    revision: str | None


def is_adapter(name: str) -> bool:
    """`name` is a folder here that holds an adapter."""
    return Path(name, ADAPTER_CONFIG_FILE).is_file()


def find_adapter_folder(name: str, revision: str | None = None) -> str | None:
    """The folder of an adapter: `name` itself, or the local copy of an adapter on the hub; None for any other model.

    Raises:
        ValueError: an adapter on the hub that cannot be copied.
    """
    if Path(name).exists():
        return name if is_adapter(name) else None
    try:
        found = find_adapter_config_file(name, revision=revision)
    except OSError:  # no such model: loading it will tell
        return None
    try:
        return snapshot_download(name, revision=revision, ignore_patterns=["merged/*"]) if found else None
    except OSError as error:
        raise ValueError(format_load_error("an adapter", name, error)) from error


def read_adapter_info(folder: str) -> AdapterInfo:
    """The task and base of an adapter folder.

    Raises:
        ValueError: its adapter_config.json is not JSON, or names no base.
    """
    note = read_json_file(Path(folder, ADAPTER_CONFIG_FILE))
    base = note.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"adapter {folder} does not name the model that it was made for")
    return AdapterInfo(note.get("task_type") or "", base, note.get("revision"))


def find_tokenizer_source(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """Where the tokenizer of a model lies, and in which version; of an adapter without one it is its base's."""
    folder = find_adapter_folder(name, revision)
    if folder is None:
        return name, revision
    if Path(folder, "tokenizer_config.json").is_file():
        return folder, None
    note = read_adapter_info(folder)
    return find_tokenizer_source(note.base_model, note.revision)


def merge_adapter(model: PreTrainedModel, adapter: str, *, required_head: str | None = None) -> PreTrainedModel:
    """Merge a LoRA adapter into the weights (in their own dtype).

    Args:
        head: the weight of a score head, random in the model, that the adapter must bring whole ("score.weight").

    Raises:
        ValueError: not an adapter folder, made for another base, without effect, or without the head.
    """
    if not is_adapter(adapter) and Path(adapter).exists():
        raise ValueError(f"{adapter} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
    _check_base(adapter, model.name_or_path)
    with _wrap_load_errors(adapter, model.name_or_path):
        carried = required_head is None or _has_weight(adapter, required_head)
    if not carried:
        raise ValueError(f"adapter {adapter} does not carry {required_head}: its score head would be random")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with _wrap_load_errors(adapter, model.name_or_path):
        merged, odd = _load_and_merge(model, adapter)
    if odd:
        raise ValueError(f"adapter {adapter} does not fit {model.name_or_path}: {odd[0]} is in one of them only")
    # A head differs from a random one whatever happened: it says nothing about what the adapter learned.
    if all(torch.equal(before[name], weight) for name, weight in merged.named_parameters() if name != required_head):
        raise ValueError(f"adapter {adapter} changes no weight of {model.name_or_path}: it is inert")
    return merged


@contextmanager
def _wrap_load_errors(adapter: str, base: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"cannot put adapter {adapter} on {base}: {format_error(error)}") from error


def _has_weight(adapter: str, head: str) -> bool:
    from peft import load_peft_weights

    return any(name.endswith(f".{head}") for name in load_peft_weights(adapter, device="cpu"))


def _load_and_merge(model: PreTrainedModel, adapter: str) -> tuple[PreTrainedModel, list[str]]:
    """The merged model, and the names of weights that only the model or only the adapter has."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused by the caller
        wrapped = PeftModel.from_pretrained(model, adapter)
    loaded = wrapped.load_adapter(adapter, "default")  # again, for what from_pretrained does not tell
    return wrapped.merge_and_unload(), sorted([*loaded.missing_keys, *loaded.unexpected_keys])


def _check_base(adapter: str, base: str) -> None:
    """Refuse an adapter that was made for another base; a hub id and a local copy cannot be told apart here."""
    if not is_adapter(adapter):
        return
    meant = read_json_file(Path(adapter, ADAPTER_CONFIG_FILE)).get("base_model_name_or_path") or base
    if not is_same_model(base, meant) and Path(base).exists() == Path(meant).exists():
        raise ValueError(f"adapter {adapter} was made for {meant}, not for {base}")
