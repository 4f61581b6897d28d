"""Key/value caches as plain tensors per sequence, so that sequences can share, crop and re-batch prefixes.

A *row* is the cache of one sequence: a tensor [layers, 2, heads, length, head_dim] without padding. Every model call
stacks rows into a fresh `DynamicCache` (padded on the left), so that a forward, which extends the cache, never changes
a stored row. Keys are stored after the position encoding, with the positions of their own sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from nabla_trl.models.heads import find_backbone

GROWTH_SLOTS = 64  # empty slots that a growing cache allocates at a time


def check_croppable_cache(model: PreTrainedModel) -> None:
    """Refuse models whose cache cannot be cropped at any position.

    Raises:
        ValueError: sliding-window, linear-attention or other special cache layers.
    """
    layers = DynamicCache(config=model.config).layers
    special = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if special:
        raise ValueError(
            f"{model.config.model_type} keeps {', '.join(special)} caches, which cannot be cut at an arbitrary "
            "token: branching needs full attention in every layer"
        )


class GrowingCacheLayer(DynamicLayer):
    """A layer with empty slots: a token is written into the next one, where `DynamicLayer` copies the whole cache.

    For decoding only. Under autograd, what a graph has saved must not be overwritten.

    Args:
        slots: [2, batch, heads, slots, head_dim] keys and values.
        length: how many slots are filled.
    """

    def __init__(self, slots: Tensor, length: int):
        super().__init__()
        self.lazy_initialization(slots, slots)
        self._set_slots(slots, length)

    def _set_slots(self, slots: Tensor, length: int) -> None:
        self.slots = slots
        self.keys, self.values = slots[:, :, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        begin, slots = self.keys.shape[2], self.slots
        end = begin + key_states.shape[2]
        if end > slots.shape[3]:
            slots = torch.nn.functional.pad(slots, (0, 0, 0, end + GROWTH_SLOTS - slots.shape[3]))
        slots[0, :, :, begin:end], slots[1, :, :, begin:end] = key_states, value_states
        self._set_slots(slots, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._set_slots(self.slots[:, indices], self.keys.shape[2])


def stack_caches(caches: Sequence[Tensor], *, growable: bool = False) -> tuple[Cache, Tensor]:
    """Stack rows into one left-padded cache.

    Args:
        caches: rows [layers, 2, heads, length_i, head_dim].
        growable: allocate slots for further tokens (see `GrowingCacheLayer`).

    Returns:
        the cache (batch, longest) and its mask [batch, longest] (1 = a real token).
    """
    lengths = [row.shape[3] for row in caches]
    longest, device = max(lengths), caches[0].device
    if longest == 0:
        return DynamicCache(), torch.zeros(len(caches), 0, dtype=torch.long, device=device)
    num_layers, two, heads, _, dim = caches[lengths.index(longest)].shape
    batch = caches[0].new_zeros(num_layers, two, len(caches), heads, longest + GROWTH_SLOTS * growable, dim)
    for index, (row, length) in enumerate(zip(caches, lengths, strict=True)):
        if length:
            batch[:, :, index, :, longest - length : longest] = row
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    layers = [GrowingCacheLayer(layer, longest) if growable else _make_layer(*layer) for layer in batch]
    return Cache(layers=layers), mask.long().to(device)


def _make_layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    """Return a layer that holds these very tensors. `DynamicLayer.update` would copy them."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def unstack_caches(cache: Cache, row_indices: Tensor, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Copy batch rows out of a cache: row `row_indices[i]` from slot `spans[i][0]` up to `spans[i][1]`."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [
        torch.stack([tensor[row, :, begin:end] for tensor in tensors]).unflatten(0, (-1, 2))
        for row, (begin, end) in zip(row_indices.tolist(), spans, strict=True)
    ]


def build_attention_mask(cached_mask: Tensor, num_new: int, dtype: torch.dtype) -> Tensor:
    """Return what to add to the attention scores of new tokens over cached ones and themselves.

    It is 0, or the lowest number where a token must not attend. It is made once for all layers: of a mask of zeros and
    ones, every layer would make one of its own, and keep it under autograd. New tokens are padded on the right, where
    no real token attends.

    Args:
        cached_mask: [B, C] (1 = a real token).

    Returns:
        [B, 1, num_new, C + num_new].
    """
    device = cached_mask.device
    is_padding = (cached_mask == 0)[:, None, None].expand(-1, 1, num_new, -1)
    is_later = torch.ones(num_new, num_new, dtype=torch.bool, device=device).triu(1)
    hidden = torch.cat((is_padding, is_later.expand(len(cached_mask), 1, -1, -1)), dim=-1)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)


def pad_sequences(sequences: Sequence[Sequence[int]], device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """Pad ids with 0 on one side: return ids [batch, longest] and their mask [batch, longest] (1 = a real token)."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, sequence in enumerate(sequences):
        begin = longest - len(sequence) if left else 0
        ids[index, begin : begin + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[index, begin : begin + len(sequence)] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def prefill_sequences(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the rows of whole sequences (each may be empty), by one forward without the output head."""
    nonempty = [index for index, sequence in enumerate(sequences) if len(sequence)]
    rows = [make_empty_cache(model)] * len(sequences)
    if not nonempty:
        return rows
    ids, mask = pad_sequences([sequences[index] for index in nonempty], model.device, left=True)
    cache = DynamicCache()
    find_backbone(model)(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
    )
    spans = [(begin, ids.shape[1]) for begin in (mask == 0).sum(1).tolist()]
    for index, row in zip(nonempty, unstack_caches(cache, torch.arange(len(nonempty)), spans), strict=True):
        rows[index] = row
    return rows


def make_empty_cache(model: PreTrainedModel) -> Tensor:
    """Return the row of an empty prefix. Its head count and width do not matter to `stack_caches`."""
    config = model.config.get_text_config()
    heads = config.to_dict().get("num_key_value_heads") or config.num_attention_heads
    dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return torch.zeros(config.num_hidden_layers, 2, heads, 0, dim, dtype=model.dtype, device=model.device)
