"""Models that the caller has loaded: take PEFT's wrapper off, find their tokenizer, and name them by their weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from nabla_trl.models.loading.tokenizers import load_tokenizer

_NUM_SAMPLED_VALUES = 4096  # of each weight
_IN_MEMORY = " (in memory, "


def unwrap_model(model: Any) -> PreTrainedModel:
    """Return the model of transformers inside a model of PEFT, with its active adapter beside the weights.

    A `PreTrainedModel` is returned as it is. The adapter is not merged, so the caller can train the model further.

    Raises:
        ValueError: not a model of transformers, an adapter that is no part of the model's layers (prompt tuning), or
            one that changes the embeddings or the head of a causal LM.
    """
    if isinstance(model, PreTrainedModel):
        return model
    if not (isinstance(model, nn.Module) and hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        raise ValueError(
            f"expected a model of transformers or PEFT, or the name of one, not {type(model).__name__}. A model that "
            "a trainer has wrapped is taken off by trainer.accelerator.unwrap_model(model)"
        )
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError("an adapter of virtual tokens (prompt or prefix tuning) cannot be searched with: use LoRA")
    base = model.get_base_model()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, part in (("embeddings", base.get_input_embeddings()), ("head", base.get_output_embeddings())):
        if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise ValueError(
                f"the adapter changes the {name} of the model, which a search reads directly: merge it first "
                "(model.merge_and_unload())"
            )
    return base


def find_tokenizer(tokenizer: Any, name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return a tokenizer that is given (an object, a processor that holds one, or a name), or that of a model's name.

    Args:
        name: name of the model. Empty: it has none.

    Raises:
        ValueError: there is none, or another object.
    """
    if isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer.tokenizer
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise ValueError(f"expected a tokenizer of transformers or the name of one, not {type(tokenizer).__name__}")
    if not (tokenizer or name):
        raise ValueError(
            "the model in memory has no name by which its tokenizer could be found: give the tokenizer, too "
            "(tokenizer of a policy, reward_tokenizer of a reward), as in load_policy(model, tokenizer)"
        )
    return load_tokenizer(name, revision) if tokenizer is None else load_tokenizer(tokenizer)


def check_stays_as_loaded(model: PreTrainedModel, *, dtype: Any, device: Any) -> None:
    """Refuse options of loading that differ from what a model in memory has."""
    if dtype is not None and str(dtype).removeprefix("torch.") != describe_dtype(model):
        raise ValueError(
            f"the model in memory is in {describe_dtype(model)}: leave out dtype, or convert the model before "
            f"(model.to(torch.{str(dtype).removeprefix('torch.')}))"
        )
    wanted = None if device is None else torch.device(device)
    if wanted is not None and (wanted.type != model.device.type or wanted.index not in (None, model.device.index)):
        raise ValueError(f"the model in memory is on {model.device}: leave out device, or move the model before")


def name_model(model: PreTrainedModel) -> str:
    """Return a name for a model in memory, with a hash of its weights: they may be others than those of its files."""
    return f"{model.name_or_path or type(model).__name__}{_IN_MEMORY}{_hash_model(model)})"


def get_saved_folder_name(model: PreTrainedModel) -> str:
    """Return the name of the folder that holds a model in memory once a training has written it to its run."""
    return f"policy-{_hash_model(model)}"


def is_name_in_memory(name: str) -> bool:
    """Return whether a name is that of a model in memory (see `name_model`), so that no files hold the weights."""
    return _IN_MEMORY in name


def get_loaded_name(name: str) -> str:
    """Return the name of the files that a policy in memory or with an adapter was loaded from, if it was."""
    return name.partition(_IN_MEMORY)[0] if _IN_MEMORY in name else name.partition("+")[0]


def describe_dtype(model: PreTrainedModel) -> str:
    """Return the data type of a model's weights, such as "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


@torch.no_grad()
def _hash_model(model: PreTrainedModel) -> str:
    """Return a hash of evenly spaced values of every weight, which is the same on every device."""
    digest = hashlib.sha256()
    adapters = getattr(model, "active_adapters", None)
    if isinstance(adapters, list):
        digest.update(repr(adapters).encode())
    for name, weight in sorted(model.named_parameters(), key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(_sample_bytes(weight))
    return digest.hexdigest()[:12]


def _sample_bytes(weight: Tensor) -> bytes:
    if weight.is_meta:
        raise ValueError("the model has weights without values (device meta): load it first")
    values = weight.detach().reshape(-1)
    values = values[:: max(1, len(values) // _NUM_SAMPLED_VALUES)].contiguous().cpu()
    return values.view(torch.uint8).numpy().tobytes()
