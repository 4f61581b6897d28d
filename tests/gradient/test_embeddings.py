"""Vectors of tokens: a model reads them as it reads ids, or it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import worlds
from torch import nn

from nabla_trl.gradient.embeddings import embed_tokens, find_embedding_scale, split_embeddings
from nabla_trl.gradient.likelihood import policy_likelihood
from nabla_trl.states.layout import find_backbone


def scale_vectors(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Halve the vectors that a backbone is given, as if it scaled the rows of its table alone."""
    if kwargs.get("inputs_embeds") is not None:
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"] * 0.5
    return args, kwargs


def test_a_scale_of_ids_alone_is_applied_and_an_unknown_one_refused() -> None:
    policy = worlds.tiny_policy()
    backbone = find_backbone(policy.model)
    backbone.register_forward_pre_hook(scale_vectors, with_kwargs=True)
    with pytest.raises(ValueError, match="does not read the vectors of tokens as it reads their ids"):
        policy_likelihood(policy)
    policy = worlds.tiny_policy()
    backbone = find_backbone(policy.model)
    backbone.register_forward_pre_hook(scale_vectors, with_kwargs=True)
    backbone.embedding_multiplier = 2.0
    policy_likelihood(policy)
    assert find_embedding_scale(policy.model) == 2.0
    ids = torch.tensor([[3, 4, 5]])
    hidden = backbone(**split_embeddings(policy.model, embed_tokens(policy.model, ids))).last_hidden_state
    torch.testing.assert_close(hidden, backbone(input_ids=ids).last_hidden_state)


def test_the_probe_leaves_a_model_in_training_as_it_is() -> None:
    model = worlds.tiny_model().train()
    model.lm_head.eval()
    assert find_embedding_scale(model) == 1.0
    assert model.training and model.model.layers[0].training and not model.lm_head.training


def test_a_model_may_write_into_its_vectors() -> None:
    model = worlds.tiny_model()
    vectors = embed_tokens(model, torch.tensor([[3, 4, 5]])).requires_grad_(True)
    with torch.enable_grad():
        given = split_embeddings(model, vectors)["inputs_embeds"]
        given *= 2.0
        (gradient,) = torch.autograd.grad(given.sum(), vectors)
    assert (gradient == 2).all()
