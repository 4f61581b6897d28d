"""Key/value caches as plain per-sequence tensors, so that sequences can share, crop and re-batch prefixes.

A *row* is one sequence's cache: a tensor [layers, 2, heads, length, head_dim] without padding. Rows are
stacked into a fresh `DynamicCache` (left-padded) for every model call, so a forward that grows the cache
never changes a stored row. Keys are stored after the position encoding, with each sequence's own positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer


def check_cacheable(model: PreTrainedModel) -> None:
    """Refuse models whose cache cannot be cropped at any position.

    Raises:
        ValueError: for sliding-window, linear-attention or other special cache layers.
    """
    layers = DynamicCache(config=model.config).layers
    special = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if special:
        raise ValueError(
            f"{model.config.model_type} keeps {', '.join(special)} caches, which cannot be cut at an arbitrary "
            "token: branching needs full attention in every layer"
        )


def stack(rows: Sequence[Tensor]) -> tuple[DynamicCache, Tensor]:
    """Batch rows into one left-padded cache.

    Args:
        rows: tensors [layers, 2, heads, length_i, head_dim].

    Returns:
        the cache (batch, longest) and its mask [batch, longest] (1 = a real token).
    """
    longest = max(row.shape[3] for row in rows)
    device = rows[0].device
    cache = DynamicCache()
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    if longest == 0:
        return cache, mask
    layers, two, heads, _, dim = max(rows, key=lambda row: row.shape[3]).shape
    batch = rows[0].new_zeros(layers, two, len(rows), heads, longest, dim)
    for index, row in enumerate(rows):
        length = row.shape[3]
        if length:
            batch[:, :, index, :, longest - length :] = row
            mask[index, longest - length :] = 1
    for layer in range(layers):
        cache.update(batch[layer, 0], batch[layer, 1], layer)
    return cache, mask


def unstack(cache: DynamicCache, rows: Tensor, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Copy the batch rows `rows` [n] out of a cache, row i from slot `spans[i][0]` up to `spans[i][1]`."""
    taken = torch.stack([torch.stack((layer.keys[rows], layer.values[rows])) for layer in cache.layers])
    return [taken[:, :, index, :, begin:end].clone() for index, (begin, end) in enumerate(spans)]


def pad(sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Pad ids with 0 on one side: ids [batch, longest] and mask [batch, longest] (1 = a real token)."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, sequence in enumerate(sequences):
        begin = longest - len(sequence) if left else 0
        ids[index, begin : begin + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[index, begin : begin + len(sequence)] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def prefill(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Rows of whole sequences (each may be empty), in one forward without the output head."""
    filled = [index for index, sequence in enumerate(sequences) if len(sequence)]
    rows = [empty_row(model)] * len(sequences)
    if not filled:
        return rows
    ids, mask = pad([sequences[index] for index in filled], model.device, left=True)
    cache = DynamicCache()
    model.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    spans = [(begin, ids.shape[1]) for begin in (mask == 0).sum(1).tolist()]
    for index, row in zip(filled, unstack(cache, torch.arange(len(filled)), spans), strict=True):
        rows[index] = row
    return rows


def empty_row(model: PreTrainedModel) -> Tensor:
    """The row of an empty prefix; its head count and width do not matter to `stack`."""
    config = model.config.get_text_config()
    heads = config.to_dict().get("num_key_value_heads") or config.num_attention_heads
    dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return torch.zeros(config.num_hidden_layers, 2, heads, 0, dim, dtype=model.dtype, device=model.device)
