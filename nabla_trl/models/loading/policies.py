"""Load policies and causal LMs."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from nabla_trl.models.decoding import TransformersBackend
from nabla_trl.models.flops import measure_model_size
from nabla_trl.models.heads import OutputHead
from nabla_trl.models.loading.adapters import merge_adapter, resolve_adapters
from nabla_trl.models.loading.in_memory import (
    check_stays_as_loaded,
    find_tokenizer,
    get_saved_folder_name,
    name_model,
    unwrap_model,
)
from nabla_trl.models.loading.pretrained import get_device_name, get_dtype_name, load_model, trusting_remote_code
from nabla_trl.models.loading.quantization import fix_quantized_gradients
from nabla_trl.models.options import PromptOptions
from nabla_trl.models.policy import Policy
from nabla_trl.models.prompts import check_prompt_options
from nabla_trl.states.probe import get_layout


def load_policy(
    name_or_model: str | Path | PreTrainedModel | Policy | Any,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    prompt_options: PromptOptions | None = None,
    trust_remote_code: bool | None = None,
) -> Policy:
    """Load a frozen policy from a hub id, a local folder, or a model in memory.

    Args:
        name_or_model: the hub id or folder of a causal LM or of an adapter of one (see `load_causal_lm`). Or a model
            of transformers or PEFT in memory, which is put in eval mode and frozen. Or a policy, which is returned.
        tokenizer: tokenizer of a model in memory, or its name. None: that of the model's name. Of a model that is
            loaded by name: another tokenizer than its own.
        dtype: data type of the weights. None: bfloat16 on a GPU that has it, else float32, and for a model in memory
            its own.
        device: None: a GPU if there is one, and for a model in memory where it is.
        adapter: LoRA adapter to merge into the model in memory. A model that the caller has loaded is copied before.
        trust_remote_code: run code from the model's repository where transformers has none of its own. None: as set
            for the process, which by default runs none.

    Returns:
        The policy. The name of one in memory holds a hash of its weights.

    Raises:
        ValueError: nothing can be loaded from the name, weights are missing or have another shape, an unknown dtype or
            device, a model that cannot go on from a prefix, no eos token, an adapter that does not fit or changes
            nothing, or prompt options that the chat template does not support.
    """
    options = PromptOptions() if prompt_options is None else prompt_options
    if isinstance(name_or_model, Policy):
        given = {"tokenizer": tokenizer, "dtype": dtype, "device": device, "adapter": adapter, "revision": revision}
        if names := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{name_or_model.name} is loaded already, so {', '.join(names)} cannot be set any more")
        return name_or_model if prompt_options is None else replace(name_or_model, prompt_options=options)
    if isinstance(name_or_model, str | Path):
        name = str(name_or_model)
        with trusting_remote_code(trust_remote_code):
            own_tokenizer = find_tokenizer(tokenizer, name, revision)
            check_prompt_options(options, own_tokenizer, name)
            model = load_causal_lm(
                name, dtype=get_dtype_name(dtype, device), device=get_device_name(device), revision=revision
            )
    else:
        model = unwrap_model(name_or_model)
        check_stays_as_loaded(model, dtype=dtype, device=device)
        own_tokenizer, name = find_tokenizer(tokenizer, model.name_or_path), name_model(model)
        check_prompt_options(options, own_tokenizer, name)
        model = model if adapter is None else deepcopy(model)
    if adapter is not None:
        saved_folder = "" if isinstance(name_or_model, str | Path) else get_saved_folder_name(model)
        model = merge_adapter(model, adapter, saved_folder=saved_folder)
    policy = freeze_policy(model, own_tokenizer, name if adapter is None else f"{name}+{adapter}")
    return replace(policy, prompt_options=options)


def freeze_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Policy:
    """Return a policy of a model in memory. The model is put in eval mode and frozen."""
    model.eval().requires_grad_(False)
    fix_quantized_gradients(model, name)  # of one that was not loaded here
    get_layout(model)
    stop_ids = _get_stop_ids(model, tokenizer)
    head = OutputHead(model)
    num_rows = head.num_rows
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
        head,
        TransformersBackend(),
    )


def _get_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos_ids = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    stop_ids = frozenset(index for index in eos_ids if index is not None)
    if not stop_ids:
        raise ValueError(f"{model.name_or_path or 'the model'} has no eos token: responses could never end")
    return stop_ids


def load_causal_lm(
    name: str, *, dtype: str, device: str | None, revision: str | None = None, sharded: bool = False
) -> PreTrainedModel:
    """Load a causal LM, or the base of an adapter (in a folder or on the hub) with the adapter merged in.

    Args:
        sharded: as for `load_model`. An adapter is merged into whole weights.

    Raises:
        ValueError: as `load_model` and `merge_adapter`, or an adapter of a classifier.
    """
    chain = resolve_adapters(name, revision)
    if any(info.task_type == "SEQ_CLS" for _, _, info in chain.adapters):
        raise ValueError(f"{name} is an adapter of a reward model, not of a causal LM: it gives no likelihoods")
    model = load_model(
        AutoModelForCausalLM,
        chain.base_model,
        dtype=dtype,
        device=device,
        revision=chain.revision,
        sharded=sharded and not chain.adapters,
    )
    for adapter_name, folder, _ in reversed(chain.adapters):
        model = merge_adapter(model, folder)
        model.name_or_path = adapter_name  # an adapter trained from it belongs to it, not to its base
    return model
