"""The part of a model that computes hidden states."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


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
