"""Masks: one for each kind of layer, in the form that the model takes."""

from __future__ import annotations

from dataclasses import replace

import torch
import worlds

from nabla_trl.states.masks import build_masks, find_hidden_keys
from nabla_trl.states.probe import get_layout

LAYOUT = replace(get_layout(worlds.tiny_model()), window=2, chunk=3, mask_style="by kind")


def test_windows_and_chunks_count_positions_not_places() -> None:
    """A cached token at position 0 behind two of padding, and new tokens at positions 1, 2 and 3."""
    hidden = find_hidden_keys(torch.tensor([[0, 0, 1]]), 3)
    positions = torch.arange(-2, 4)[None]
    masks = build_masks(LAYOUT, hidden, positions[:, 3:], positions, torch.float32)
    visible = {kind: None if mask is None else (mask[0, 0] == 0).int().tolist() for kind, mask in masks.items()}
    assert visible["full_attention"] == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert visible["sliding_attention"] == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert visible["chunked_attention"] == [[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert visible["linear_attention"] is None and masks["full_attention"].shape == (1, 1, 3, 6)


def test_a_model_with_position_biases_gets_ones_and_zeros() -> None:
    hidden = find_hidden_keys(torch.tensor([[0, 1], [1, 1]]), 2)
    positions = torch.arange(4).expand(2, -1)
    mask = build_masks(replace(LAYOUT, mask_style="padding"), hidden, positions[:, 2:], positions, torch.float32)
    assert mask.tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_a_window_in_the_config_of_a_model_that_has_none() -> None:
    """transformers' caches would cut such a model's keys and values. Its own forward attends to all of them."""
    model = worlds.tiny_model()
    model.config.sliding_window = 2
    layout = get_layout(model)
    assert layout.window is None and layout.chunk is None
