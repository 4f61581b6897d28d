"""Load policies and causal LMs."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from nabla_trl.models.decoding import TransformersBackend
from nabla_trl.models.flops import measure_model_size
from nabla_trl.models.heads import OutputHead
from nabla_trl.models.loading.adapters import merge_adapter, resolve_adapters
from nabla_trl.models.loading.pretrained import load_model, trusting_remote_code
from nabla_trl.models.loading.quantization import fix_quantized_gradients
from nabla_trl.models.loading.tokenizers import load_tokenizer
from nabla_trl.models.options import PromptOptions
from nabla_trl.models.policy import Policy
from nabla_trl.models.prompts import check_prompt_options
from nabla_trl.states.probe import get_layout


def load_policy(
    name: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    prompt_options: PromptOptions | None = None,
    trust_remote_code: bool | None = None,
) -> Policy:
    """Load a frozen policy from a hub id or a local folder.

    Args:
        name: a causal LM, or an adapter of one (see `load_causal_lm`).
        adapter: LoRA adapter to merge into the model in memory.
        trust_remote_code: run code from the model's repository where transformers has none of its own. None: as set
            for the process, which by default runs none.

    Raises:
        ValueError: nothing can be loaded from `name`, weights are missing or have another shape, an unknown dtype or
            device, a model that cannot go on from a prefix, no eos token, an adapter that does not fit or changes
            nothing, or prompt options that the chat template does not support.
    """
    prompt_options = PromptOptions() if prompt_options is None else prompt_options
    with trusting_remote_code(trust_remote_code):
        tokenizer = load_tokenizer(name, revision)
        check_prompt_options(prompt_options, tokenizer, name)
        model = load_causal_lm(name, dtype=dtype, device=device, revision=revision)
    if adapter is not None:
        model = merge_adapter(model, adapter)
    policy = freeze_policy(model, tokenizer, name if adapter is None else f"{name}+{adapter}")
    return replace(policy, prompt_options=prompt_options)


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
