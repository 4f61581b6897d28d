"""What a model reads in place of token ids: input embeddings, and in some models an embedding per layer beside them.

Gemma 3n and Gemma 4 look every token up in two tables. Both are joined here to one vector E_v per token, so that a
relaxed token Σ_v Y[v]·E_v mixes both, and the gradient by the vector goes through both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nabla_trl.states.layout import find_backbone


def embed_tokens(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the vectors E [..., D] of this model's ids. Its own modules scale them where the model does."""
    embeds = model.get_input_embeddings()(ids).detach()
    if not _get_layer_width(model):
        return embeds
    by_layer = _get_text_model(model).get_per_layer_inputs(ids).detach()  # [..., layers, width]
    return torch.cat((embeds, by_layer.flatten(-2).to(embeds)), dim=-1)


def split_embeddings(model: PreTrainedModel, embeds: Tensor) -> dict[str, Tensor]:
    """Return the arguments of the model's forward that hold these vectors [B, R, D]."""
    width = _get_layer_width(model)
    if not width:
        return {"inputs_embeds": embeds}
    hidden_size = model.config.get_text_config().hidden_size
    by_layer = embeds[..., hidden_size:].unflatten(-1, (-1, width))
    return {"inputs_embeds": embeds[..., :hidden_size], "per_layer_inputs": by_layer}


def _get_layer_width(model: PreTrainedModel) -> int:
    """Return the width of a token's embedding per layer, 0 where the model has none."""
    has_table = hasattr(_get_text_model(model), "get_per_layer_inputs")
    return getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0) or 0 if has_table else 0


def _get_text_model(model: PreTrainedModel) -> Any:
    backbone = find_backbone(model)
    return getattr(backbone, "language_model", backbone)
