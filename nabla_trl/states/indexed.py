"""Indexed attention (DeepSeek V3.2, GLM-5): each query attends to the tokens that a small index selects for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nabla_trl.states.attention import AttentionLayer
from nabla_trl.states.releases import DynamicIndexedLayer
from nabla_trl.states.writers import StateWriter


class IndexedLayer(AttentionLayer, DynamicIndexedLayer):
    """Keys, values and the index's own keys, which have one head: [B, length, width] for the model."""

    def __init__(self, arrays: dict[str, Tensor], writer: StateWriter, number_of_states: int = 0):
        DynamicIndexedLayer.__init__(self)
        AttentionLayer.__init__(self, arrays, writer)

    def update_indexer(self, indexer_key_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.writer.append(self.arrays, "indexer_keys", indexer_key_states[:, None]).squeeze(1)
