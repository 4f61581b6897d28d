"""Attention masks: one for each kind of layer, from the positions of queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nabla_trl.states.layout import StateLayout

_FULL_KINDS = ("full_attention", "indexed_attention", "attention", "minimax_m3_sparse")
_SLIDING_KINDS = ("sliding_attention", "hybrid_sliding")
_RECURRENT_KINDS = ("linear_attention", "conv", "mamba", "moe", "mlp")


def build_masks(
    layout: StateLayout, hidden: Tensor, query_positions: Tensor, key_positions: Tensor, dtype: torch.dtype
) -> Any:
    """Return the attention mask of a forward in the form that the model takes.

    A mask says what to add to the attention scores: 0, or the lowest number where a token must not attend. It is made
    once for all layers of a kind. Of a mask of zeros and ones, every layer would make one of its own, and keep it
    under autograd.

    Args:
        hidden: [B, R, K] bool, keys that no layer may attend to: padding and later tokens.
        query_positions: [B, R] position of each new token in its sequence.
        key_positions: [B, K] position of each key. That of padding does not matter.

    Returns:
        [B, 1, R, K], or a dict of such masks by kind of layer, or [B, K] ones and zeros.
    """
    if layout.mask_style == "padding":
        return (~hidden[:, -1]).long()
    full = _to_mask(hidden, dtype)
    if layout.mask_style == "one" and layout.window is None and layout.chunk is None:
        return full
    queries, keys = query_positions[:, :, None], key_positions[:, None]
    sliding = chunked = full
    if layout.window is not None:
        sliding = _to_mask(hidden | (queries - keys >= layout.window), dtype)
    if layout.chunk is not None:
        chunked = _to_mask(hidden | (queries // layout.chunk != keys // layout.chunk), dtype)
    if layout.mask_style == "one":  # all layers are of the same kind (see `get_layout`)
        return sliding if layout.window is not None else chunked
    # Recurrent layers read no padding here, so they need no mask.
    return (
        dict.fromkeys(_FULL_KINDS, full)
        | dict.fromkeys(_SLIDING_KINDS, sliding)
        | {"chunked_attention": chunked}
        | dict.fromkeys(_RECURRENT_KINDS)
    )


def _to_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


def find_hidden_keys(cached_mask: Tensor, num_new: int) -> Tensor:
    """Return which keys new tokens must not attend to: padding of the cache, and later tokens.

    New tokens are padded on the right, where no real token attends.

    Args:
        cached_mask: [B, C] (1 = a real token).

    Returns:
        [B, num_new, C + num_new] bool.
    """
    is_padding = (cached_mask == 0)[:, None].expand(-1, num_new, -1)
    is_later = torch.ones(num_new, num_new, dtype=torch.bool, device=cached_mask.device).triu(1)
    return torch.cat((is_padding, is_later.expand(len(cached_mask), -1, -1)), dim=-1)
