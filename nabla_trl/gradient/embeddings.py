"""What a model reads in place of token ids: input embeddings, and in some models an embedding per layer beside them.

Gemma 3n and Gemma 4 look every token up in two tables. Both are joined here to one vector E_v per token, so that a
relaxed token Σ_v Y[v]·E_v mixes both, and the gradient by the vector goes through both.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nabla_trl.states.layout import find_backbone
from nabla_trl.states.probe import MAX_ERRORS

_NUM_TEST_TOKENS = 4
_scales: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()


def embed_tokens(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the vectors E [..., D] of this model's ids, scaled as the model scales them."""
    embeds = model.get_input_embeddings()(ids).detach() * find_embedding_scale(model)
    if not _get_layer_width(model):
        return embeds
    by_layer = _get_text_model(model).get_per_layer_inputs(ids).detach()  # [..., layers, width]
    return torch.cat((embeds, by_layer.flatten(-2).to(embeds)), dim=-1)


def find_embedding_scale(model: PreTrainedModel) -> float:
    """Return what a model multiplies the vectors of its table by when it reads ids, but not when it reads vectors.

    It is 1 for most models. Falcon-H1 has an `embedding_multiplier` for ids alone, Granite has one for both.

    Raises:
        ValueError: the model does not read vectors as it reads ids.
    """
    if model not in _scales:
        _scales[model] = _try_embedding_scales(model)
    return _scales[model]


@torch.no_grad()
def _try_embedding_scales(model: PreTrainedModel) -> float:
    backbone = find_backbone(model)
    in_training = [module for module in model.modules() if module.training]
    model.eval()  # without dropout
    ids = torch.arange(1, 1 + _NUM_TEST_TOKENS, device=model.device)[None] % len(model.get_input_embeddings().weight)
    expected = backbone(input_ids=ids).last_hidden_state.float()
    errors = []
    for scale in (1.0, getattr(backbone, "embedding_multiplier", None)):
        if scale is None:
            continue
        _scales[model] = scale
        hidden = backbone(**split_embeddings(model, embed_tokens(model, ids))).last_hidden_state.float()
        errors.append(float(((hidden - expected).norm(dim=-1) / expected.norm(dim=-1)).median()))
        if errors[-1] <= MAX_ERRORS.get(model.dtype, 0.2) or not expected.isfinite().all():  # of NaN, others will tell
            break
    else:
        scale = None
    del _scales[model]
    for module in in_training:
        module.training = True
    if scale is None:
        raise ValueError(
            f"{model.config.model_type} does not read the vectors of tokens as it reads their ids: hidden states "
            f"differ by {min(errors):.0%}"
        )
    return scale


def split_embeddings(model: PreTrainedModel, embeds: Tensor) -> dict[str, Tensor]:
    """Return the arguments of the model's forward that hold copies of these vectors [B, R, D].

    They are copies because some models write into their inputs (CTRL), and autograd forbids that for a leaf.
    """
    embeds = embeds.clone()
    width = _get_layer_width(model)
    if not width:
        return {"inputs_embeds": embeds}
    hidden_size = model.config.get_text_config().hidden_size
    by_layer = embeds[..., hidden_size:].unflatten(-1, (-1, width))
    return {"inputs_embeds": embeds[..., :hidden_size], "per_layer_inputs": by_layer}


def has_embeddings_per_layer(model: PreTrainedModel) -> bool:
    """Tell whether the model reads an embedding of every token in each layer (Gemma 3n, Gemma 4)."""
    return _get_layer_width(model) > 0


def _get_layer_width(model: PreTrainedModel) -> int:
    """Return the width of a token's embedding per layer, 0 where the model has none."""
    has_table = hasattr(_get_text_model(model), "get_per_layer_inputs")
    return getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0) or 0 if has_table else 0


def _get_text_model(model: PreTrainedModel) -> Any:
    backbone = find_backbone(model)
    return getattr(backbone, "language_model", backbone)
