"""Which arrays a model keeps of a prefix, and how its forward takes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from nabla_trl.states.releases import DummyLayer
from nabla_trl.states.writers import StateWriter

PER_TOKEN_ARRAYS = frozenset({"keys", "values", "indexer_keys"})  # the others are whole states


@dataclass(frozen=True)
class ArrayGroup:
    """Arrays of equal shape, which are stored as one tensor.

    Attributes:
        arrays: layer index and name of each.
        shape: (heads, width) of an entry per token, or the shape of a recurrent state.
    """

    arrays: tuple[tuple[int, str], ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class StateLayout:
    """What a model keeps of a prefix, and how its forward takes it (found out by `get_layout`).

    Attributes:
        layer_types: per layer the class that holds its state, and how many recurrent states it has.
        token_groups: arrays with an entry per token.
        fixed_groups: states of recurrent layers.
        window: tokens that a sliding-window layer attends to, its own included. None: no layer has a window.
        chunk: length of the chunks of chunked attention. None: no layer has chunks.
        mask_style: "one" mask for all layers, one "by kind" of layer, or "padding" (ones and zeros) for models that
            compute position biases from it.
        num_sharing_layers: layers that use the keys and values of another one.
        cache_argument, takes_positions: arguments of the model's forward.
    """

    layer_types: tuple[tuple[type, int], ...]
    token_groups: tuple[ArrayGroup, ...]
    fixed_groups: tuple[ArrayGroup, ...]
    window: int | None
    chunk: int | None
    mask_style: str
    cache_argument: str
    takes_positions: bool
    dtype: torch.dtype
    num_sharing_layers: int = 0

    @property
    def num_attention_layers(self) -> int:
        """Return how many layers attend to earlier tokens, with own or shared keys and values."""
        return (
            sum(issubclass(layer_type, DynamicLayer) for layer_type, _ in self.layer_types) + self.num_sharing_layers
        )

    @property
    def state_size(self) -> int:
        """Return how many numbers the recurrent states of all layers have, without those of convolutions."""
        return sum(
            math.prod(group.shape)
            for group in self.fixed_groups
            for _, name in group.arrays
            if name.startswith("recurrent_states")
        )

    @property
    def is_recurrent(self) -> bool:
        """Tell whether a layer's state cannot be cut at any token."""
        return bool(self.fixed_groups)

    def make_cache(self, writer: StateWriter, arrays: Mapping[int, dict[str, Tensor]]) -> Cache:
        """Return a cache whose layers hold these arrays (by layer, then by name)."""
        layers: list[Any] = []
        for index, (layer_type, num_states) in enumerate(self.layer_types):
            if layer_type is DummyLayer:
                layers.append(DummyLayer())
            else:
                layers.append(layer_type(arrays.get(index, {}), writer, num_states))
        return Cache(layers=layers)

    def run(self, module: Any, cache: Cache, attention_mask: Any, position_ids: Tensor, **inputs: Any) -> Any:
        """Return the output of the model, or of its part below the head, for new tokens after a cache."""
        options = {self.cache_argument: cache, "attention_mask": attention_mask, "use_cache": True, **inputs}
        if self.takes_positions:
            options["position_ids"] = position_ids
        return module(**options)


def find_backbone(model: PreTrainedModel) -> nn.Module:
    """Return the module that maps input ids or embeddings to last hidden states.

    It is `model.base_model`, except where that is the whole model (Llama 4).

    Raises:
        ValueError: the model has no such part.
    """
    if model.base_model is not model:
        return model.base_model
    for child in model.children():
        if isinstance(child, PreTrainedModel):
            return child
    raise ValueError(f"{type(model).__name__} has no part that computes hidden states: load a causal LM")
