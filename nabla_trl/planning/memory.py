"""Estimate the memory of training and sampling from a model's config alone. No weights are loaded.

Models are built on torch's meta device, where tensors have shapes and no data. Static memory is counted from their
parameters. Activations are what autograd saves in one forward pass, per token of a batch.

Per process, W is the number of processes and P the parameters of the policy:

    full weights, fp32      4P weights + 4P gradients + 8P of Adam, over W where they are sharded
    LoRA                    P of the frozen base in its dtype, over W where it is sharded, + 16 per adapter weight
    data parallelism        + a second copy of the gradients (the buckets of DistributedDataParallel)
    sharding                + the largest layer, gathered twice, and its gradients
    reference               + a copy of the policy for full weights (dpo, rloo, grpo). LoRA turns the adapter off
    frozen models           policy and reward, whole on each process, where responses are scored
    activations             what autograd saves per token, + logits and their gradients in float32
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from nabla_trl.models.flops import ModelSize, measure_model_size
from nabla_trl.models.loading import DTYPES, find_adapter_folder, read_adapter_info
from nabla_trl.models.loading.pretrained import call_from_pretrained
from nabla_trl.training.offline import GROUP_METHODS, ONLINE_METHODS
from nabla_trl.training.peft import LoraArguments, build_lora_config
from nabla_trl.utils.formatting import format_load_error

SHARDINGS = ("ddp", "fsdp2", "zero3")
# Tokens of the forward pass that is measured. No size of a model should equal it (see `measure_saved_bytes`).
_PROBE_TOKENS = 61


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on.

    Attributes:
        num_params: distinct parameters, tied ones once.
        adapter_params: of a LoRA adapter, 0 without one.
        largest_layer: parameters of the largest block that is gathered at once.
        vocab_size: rows of the output head.
        saved_bytes: what autograd saves in a forward pass without the head, in bytes per token.
        layer_input_bytes: input of one layer, in bytes per token.
        kv_bytes: keys and values in bytes per token.
    """

    size: ModelSize
    num_params: int
    adapter_params: int
    largest_layer: int
    vocab_size: int
    num_layers: int
    saved_bytes: float
    layer_input_bytes: float
    kv_bytes: float


def build_empty_model(name: str, *, dtype: str, is_classifier: bool = False) -> PreTrainedModel:
    """Build a model from its config on the meta device. An adapter has the shape of its base.

    Raises:
        ValueError: no config can be read from `name`.
    """
    folder = find_adapter_folder(name)
    if folder is not None:
        return build_empty_model(read_adapter_info(folder).base_model, dtype=dtype, is_classifier=is_classifier)
    auto_class: Any = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    options = {"num_labels": 1} if is_classifier else {}
    config = call_from_pretrained(AutoConfig, "a model config", name, **options)
    try:
        with torch.device("meta"):
            return auto_class.from_config(config, dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(format_load_error("a model config", name, error)) from error


def measure_shape(name: str, *, tuning: str, dtype: str, lora: LoraArguments) -> ModelShape:
    """Measure a policy as it is trained.

    Args:
        dtype: of the computation. Weights that are trained themselves are float32.
    """
    model = build_empty_model(name, dtype=dtype)
    size, num_params = measure_model_size(model, "policy"), count_params(model)
    layers = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), nn.ModuleList())
    largest = max([count_params(layer) for layer in layers] + [model.get_input_embeddings().weight.numel()])
    config = model.config.get_text_config()
    num_heads = getattr(config, "num_attention_heads", 0)  # none where all layers are recurrent
    heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(num_heads, 1)
    adapter_params = 0
    if tuning != "full":
        from peft import get_peft_model

        adapter = build_lora_config(lora, "CAUSAL_LM")
        with torch.device("meta"):
            try:
                trained: Any = get_peft_model(model, adapter)
            except ValueError:  # PEFT refuses these modules of Mamba layers, so a training has to leave them out
                adapter.exclude_modules = ["out_proj", "conv1d"]
                trained = get_peft_model(build_empty_model(name, dtype=dtype), adapter)
        adapter_params = sum(weight.numel() for weight in trained.parameters() if weight.requires_grad)
        trained = trained.get_base_model()
    else:
        trained = model
    try:
        saved_bytes = measure_saved_bytes(trained)
    except RuntimeError:  # PEFT's adapters of expert weights do not run on the meta device: as much as full weights
        saved_bytes = measure_saved_bytes(build_empty_model(name, dtype=dtype))
    item_size = DTYPES[dtype].itemsize
    return ModelShape(
        size=size,
        num_params=num_params,
        adapter_params=adapter_params,
        largest_layer=largest,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        num_layers=config.num_hidden_layers,
        saved_bytes=saved_bytes,
        layer_input_bytes=config.hidden_size * item_size,
        kv_bytes=2 * config.num_hidden_layers * heads * head_dim * item_size,
    )


def count_params(model: nn.Module) -> int:
    """Return the number of distinct parameters."""
    return sum(weight.numel() for weight in model.parameters())


def measure_saved_bytes(model: Any) -> float:
    """Return what autograd saves in the forward pass of a model without its head, in bytes per token.

    Matrices of tokens by tokens are left out: kernels of attention do not keep them, but the meta device has no
    such kernel.
    """
    storages: dict[int, int] = {}
    kept: list[Tensor] = []
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if saved.shape[-2:] != (_PROBE_TOKENS, _PROBE_TOKENS) and storage._cdata not in weights:
            storages[storage._cdata] = storage.nbytes()
            kept.append(saved)  # so that no other storage gets its address
        return saved

    model.train()
    ids = torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, _PROBE_TOKENS, _PROBE_TOKENS, dtype=model.dtype, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        try:
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        except ValueError:  # position biases are computed from a mask of ones and zeros, before the first layer
            model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(storages.values()) / _PROBE_TOKENS


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per process, by what takes them. Activations are of a batch."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    reference: float
    frozen: float
    activations: float
    kv_cache: float

    def get_total(self) -> float:
        """Return the bytes of one process. Sampling and the optimizer steps do not happen at once."""
        static = self.weights + self.gradients + self.optimizer + self.gathered + self.reference + self.frozen
        return static + max(self.activations, self.kv_cache)


def plan_memory(
    shape: ModelShape,
    *,
    method: str,
    tuning: str,
    dtype: str,
    sharding: str,
    num_processes: int,
    batch_size: int,
    num_tokens: int,
    activation_checkpointing: bool,
    frozen_params: int,
) -> MemoryPlan:
    """Estimate the bytes of one process in training.

    Args:
        method: of training, such as "sft" or "rloo".
        sharding: "ddp", "fsdp2" or "zero3".
        batch_size: responses per process and forward pass. dpo has two sequences for each.
        num_tokens: of a prompt with its response.
        frozen_params: parameters of the frozen policy and the reward, where they stay in memory.
    """
    is_online = method in ONLINE_METHODS
    item_size = DTYPES[dtype].itemsize
    shards = 1 if sharding == "ddp" else num_processes
    full = tuning == "full"
    trained = shape.num_params if full else shape.adapter_params
    base_bytes = shape.num_params * (4 if full else 0.55 if tuning == "qlora" else item_size)
    tokens = num_tokens * batch_size * (2 if method == "dpo" else 1)
    layers = shape.layer_input_bytes * shape.num_layers + shape.saved_bytes / max(shape.num_layers, 1)
    saved = min(layers, shape.saved_bytes) if activation_checkpointing else shape.saved_bytes
    # Logits in the dtype of the computation, and in float32 with their gradients.
    logits = shape.vocab_size * (item_size + 8)
    return MemoryPlan(
        weights=(base_bytes + (0 if full else 4 * trained)) / shards,
        gradients=4 * trained / shards * (2 if sharding == "ddp" and num_processes > 1 else 1),
        optimizer=8 * trained / shards,
        gathered=0 if shards == 1 else shape.largest_layer * (2 * item_size + (4 if full else 0)),
        reference=base_bytes / shards if full and method in ("dpo", *GROUP_METHODS) else 0.0,
        frozen=float(frozen_params * item_size),
        activations=tokens * (saved + logits),
        kv_cache=shape.kv_bytes * num_tokens * batch_size if is_online else 0.0,
    )
