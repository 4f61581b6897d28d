"""kv: rows into a cache and back, a cache that grows in place, and the mask that all layers share."""

from __future__ import annotations

import pytest
import torch
import worlds
from transformers import DynamicCache

from nabla_trl.models import kv_cache


def rows(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, 4, length, 5, generator=generator) for length in lengths]


@pytest.mark.parametrize("grow", [False, True])
def test_rows_come_back_as_they_went_in(grow: bool) -> None:
    given = rows(3, 0, 7)
    cache, mask = kv_cache.stack_caches(given, growable=grow)
    assert mask.sum(1).tolist() == [3, 0, 7] and mask.shape == (3, 7) and bool(mask[:, -1].tolist() == [1, 0, 1])
    back = kv_cache.unstack_caches(cache, torch.tensor([2, 0]), [(0, 7), (4, 7)])
    assert torch.equal(back[0], given[2]) and torch.equal(back[1], given[0])
    assert torch.equal(kv_cache.unstack_caches(cache, torch.tensor([2]), [(1, 4)])[0], given[2][:, :, :, 1:4])


def test_a_row_taken_out_is_a_copy() -> None:
    cache, _ = kv_cache.stack_caches(rows(4), growable=True)
    [row] = kv_cache.unstack_caches(cache, torch.tensor([0]), [(0, 4)])
    before = row.clone()
    cache.layers[0].keys.zero_()
    assert torch.equal(row, before)


def test_growing_equals_concatenating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its spare slots, by one token and by several, and when rows leave; stored rows are never written to."""
    monkeypatch.setattr(kv_cache, "GROWTH_SLOTS", 3)
    given = rows(2, 5)
    stored = [row.clone() for row in given]
    growing, _ = kv_cache.stack_caches(given, growable=True)
    plain = DynamicCache()
    for layer, held in enumerate(growing.layers):
        plain.update(held.keys.clone(), held.values.clone(), layer)
    generator = torch.Generator().manual_seed(1)
    for step, count in enumerate((1, 1, 1, 1, 2, 1, 5)):
        for layer in range(3):
            fresh = torch.randn(2, growing.layers[0].keys.shape[0], 4, count, 5, generator=generator)
            for one, other in zip(growing.update(*fresh, layer), plain.update(*fresh, layer), strict=True):
                assert torch.equal(one, other)
        if step == 4:
            growing.batch_select_indices(torch.tensor([1]))
            plain.batch_select_indices(torch.tensor([1]))
    assert growing.get_seq_length() == plain.get_seq_length() == 5 + 12
    assert all(torch.equal(row, copy) for row, copy in zip(given, stored, strict=True))


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_the_shared_mask_is_transformers_own(architecture: str) -> None:
    """The same hidden states as from a mask of zeros and ones, with the prefix padded on the left."""
    model = worlds.tiny_model(architecture, dtype=torch.float64)
    prefixes, fed = [[1, 2, 3, 4], [5]], torch.tensor([[6, 7, 8], [9, 10, 11]])
    positions = torch.tensor([[4, 5, 6], [1, 2, 3]])
    with torch.no_grad():
        stored = kv_cache.prefill_sequences(model, prefixes)
        _, cached = kv_cache.stack_caches(stored)
        ones = torch.cat((cached, torch.ones_like(fed)), 1)
        made = kv_cache.build_attention_mask(cached, 3, torch.float64)
        shared, own = (
            model.base_model(
                input_ids=fed,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=kv_cache.stack_caches(stored)[0],
            ).last_hidden_state
            for mask in (made, ones)
        )
    assert torch.allclose(shared, own, rtol=0, atol=1e-12)
