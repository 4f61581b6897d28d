"""Find LoRA adapters, read what they were made for, and put them on their base in memory."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from nabla_trl.models.loading.quantization import is_quantized
from nabla_trl.utils.files import read_json_file
from nabla_trl.utils.formatting import format_error, format_load_error
from nabla_trl.utils.identity import is_same_model

ADAPTER_CONFIG_FILE = "adapter_config.json"
# Largest change of a logit by merging, relative to the largest logit (at least 1). Half precision rounds a sum of
# weights more coarsely than a sum of products.
MERGE_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}
_NUM_TEST_TOKENS = 8


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
    if not isinstance(base_model, str) or not base_model:
        raise ValueError(f"adapter {folder} does not name the model that it was made for")
    task_type, revision = config.get("task_type") or "", config.get("revision")
    if not isinstance(task_type, str) or not isinstance(revision, str | None):
        raise ValueError(f"adapter {folder}: task_type and revision must be texts")
    return AdapterInfo(task_type, base_model, revision)


@dataclass(frozen=True)
class AdapterChain:
    """The adapters that a name stands for, the last-trained one first, and the whole model below them.

    Attributes:
        adapters: name, folder and info of each.
        base_model, revision: of the whole model.
    """

    adapters: tuple[tuple[str, str, AdapterInfo], ...]
    base_model: str
    revision: str | None


def resolve_adapters(name: str, revision: str | None = None) -> AdapterChain:
    """Follow a name to a whole model. An adapter may have been trained on another adapter.

    Raises:
        ValueError: adapters that lead back to themselves, or one that does not name its base.
    """
    adapters: list[tuple[str, str, AdapterInfo]] = []
    seen: set[Path] = set()
    while (folder := find_adapter_folder(name, revision)) is not None:
        if Path(folder).resolve() in seen:
            raise ValueError(
                f"adapter {folder} leads back to itself: its base_model_name_or_path names no whole model"
            )
        seen.add(Path(folder).resolve())
        info = read_adapter_info(folder)
        adapters.append((name, folder, info))
        name, revision = info.base_model, info.revision
    return AdapterChain(tuple(adapters), name, revision)


def merge_adapter(
    model: PreTrainedModel, adapter: str, *, required_head: str | None = None, saved_folder: str = ""
) -> PreTrainedModel:
    """Merge a LoRA adapter into the weights, in their own dtype, so that the logits are those of the trained model.

    A weight that serves as embedding and as head is split first if the adapter changes it. On a quantized base the
    adapter stays beside the weights, because merging would round it to a few bits.

    Args:
        required_head: name of the score head's weight, random in `model`, that the adapter must hold ("score.weight").
        saved_folder: name of the folder that a training of this model in memory has written it to. The base of an
            adapter may be such a folder.

    Raises:
        ValueError: not an adapter folder, or an adapter for another base, without effect, without the head, or of a
            kind that cannot be merged.
    """
    base = model.name_or_path or type(model).__name__
    if not is_adapter(adapter) and Path(adapter).exists():
        raise ValueError(f"{adapter} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
    _check_base_model(adapter, model, saved_folder)
    with _wrap_load_errors(adapter, base):
        has_head = required_head is None or _has_weight(adapter, required_head)
    if not has_head:
        raise ValueError(f"adapter {adapter} does not carry {required_head}: its score head would be random")
    if has_adapter_beside(model):
        raise ValueError(f"adapter {adapter} cannot be put on {base}, an adapter beside quantized weights")
    model.eval()
    before, base_logits = _copy_weights(model), _compute_logits(model)
    with _wrap_load_errors(adapter, base):
        wrapped, unmatched = _load_adapter(model, adapter)
    if unmatched:
        raise ValueError(f"adapter {adapter} does not fit {base}: {unmatched[0]} is in one of them only")
    with _wrap_load_errors(adapter, base):
        trained_logits = _compute_logits(wrapped)
        merged = wrapped.get_base_model() if is_quantized(model) else _merge(wrapped)
    # A head always differs from a random one, so that it does not show whether the adapter learned anything.
    weights = {
        name: weight
        for name, weight in merged.named_parameters(remove_duplicate=False)
        if name in before and name != required_head
    }
    if all(torch.equal(before[name], weight) for name, weight in weights.items()) and (
        not is_quantized(model) or torch.equal(base_logits, trained_logits)
    ):
        raise ValueError(f"adapter {adapter} changes no weight of {base}: it is inert")
    _check_merged_logits(trained_logits, _compute_logits(merged), MERGE_TOLERANCE[merged.dtype], adapter, base)
    return merged


def has_adapter_beside(model: PreTrainedModel) -> bool:
    """Return whether an adapter stands beside the weights of a model, unmerged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _copy_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a copy of every weight, by all names that it has."""
    copies: dict[int, Tensor] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {
        name: copies[id(weight)] if id(weight) in copies else copies.setdefault(id(weight), weight.clone())
        for name, weight in names
    }


@contextmanager
def _wrap_load_errors(adapter: str, base: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever files by others may raise
        raise ValueError(f"cannot put adapter {adapter} on {base}: {format_error(error)}") from error


def _has_weight(adapter: str, name: str) -> bool:
    from peft import load_peft_weights

    return any(key.endswith(f".{name}") for key in load_peft_weights(adapter, device="cpu"))


def _load_adapter(model: PreTrainedModel, adapter: str) -> tuple[Any, list[str]]:
    """Return the PEFT model, and the names of weights that only the model or only the adapter has."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")  # the caller raises an error
        warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")  # see `_merge`
        wrapped = PeftModel.from_pretrained(model, adapter).eval()
    result = wrapped.load_adapter(adapter, "default")  # again, for the keys that from_pretrained does not return
    return wrapped, sorted([*result.missing_keys, *result.unexpected_keys])


def _merge(wrapped: Any) -> PreTrainedModel:
    _untie_adapted_weights(wrapped)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")  # no longer tied
        model = wrapped.merge_and_unload()
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    text_config = model.config.get_text_config()
    if (
        getattr(text_config, "tie_word_embeddings", False)
        and head is not None
        and head.weight is not embeddings.weight
    ):
        for config in (model.config, text_config):
            config.tie_word_embeddings = False  # or saving and loading would tie them again
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model


def _untie_adapted_weights(wrapped: nn.Module) -> None:
    """Give every module a weight of its own where an adapter changes one that several modules share.

    A trained adapter changes what one of the modules computes. Merged into the shared weight, it would change all.
    """
    owners: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    for path, module in wrapped.named_modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(weight)].append((path, module, name))
    for modules in owners.values():
        is_adapted = any(path.endswith((".base_layer", ".original_module")) for path, _, _ in modules)
        for _, module, name in modules[1:] if is_adapted else []:
            weight = getattr(module, name)
            setattr(module, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))


@torch.no_grad()
def _compute_logits(model: Any) -> Tensor:
    """Return logits of a few tokens from the middle of the vocabulary.

    The first and the last rows often belong to special tokens that no text has trained. Their logits in bfloat16 are
    mostly rounding, which a merge changes.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = (rows // 2 + torch.arange(_NUM_TEST_TOKENS, device=model.device)) % rows
    return model(input_ids=tokens[None]).logits.float()


def _check_merged_logits(trained: Tensor, merged: Tensor, share: float, adapter: str, base: str) -> None:
    """Refuse a merge that computes something else than the trained model."""
    tolerance = share * max(1.0, float(trained.nan_to_num().abs().max()))
    if not torch.allclose(trained, merged, rtol=share, atol=tolerance, equal_nan=True):
        difference = float((trained - merged).abs().max())
        raise ValueError(
            f"adapter {adapter} cannot be merged into {base}: its logits change by up to {difference:.2g}"
        )


def _check_base_model(adapter: str, model: PreTrainedModel, saved_folder: str) -> None:
    """Refuse an adapter for another base. A hub id and a local copy cannot be told apart, and are accepted."""
    base = model.name_or_path
    if not is_adapter(adapter) or not base:  # a model that was made in memory has no name
        return
    expected = read_json_file(Path(adapter, ADAPTER_CONFIG_FILE)).get("base_model_name_or_path") or base
    if is_same_model(base, expected) or Path(base).exists() != Path(expected).exists():
        return
    if Path(expected).name != saved_folder:
        raise ValueError(f"adapter {adapter} was made for {expected}, not for {base}")
