"""Attention layers: keys and values of all tokens.

Layers with a sliding window or chunks keep all of them too, because a branch may begin anywhere. Their masks hide what
a token must not see (masks.py). Keys and values may have different widths, and may be compressed (multi-head latent
attention). Layers that use the keys and values of another layer keep none.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from nabla_trl.states.releases import DynamicIndexedLayer
from nabla_trl.states.writers import StateWriter


class AttentionLayer(DynamicLayer):
    """Keys and values [B, heads, length, width].

    Args:
        arrays: "keys" and "values" of earlier tokens. Empty: there are none.
        writer: where new tokens are written.
    """

    def __init__(self, arrays: dict[str, Tensor], writer: StateWriter, number_of_states: int = 0):
        super().__init__()
        self.arrays, self.writer = arrays, writer
        self.is_initialized = True  # transformers would allocate

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys = self.writer.append(self.arrays, "keys", key_states)
        return keys, self.writer.append(self.arrays, "values", value_states)

    def get_seq_length(self) -> int:
        return self.writer.get_length(self.arrays)


class IndexedLayer(AttentionLayer, DynamicIndexedLayer):
    """Keys and values, and the keys of an index with one head: [B, length, width] for the model.

    In indexed attention (DeepSeek V3.2, GLM-5) each query attends to the tokens that a small index selects for it.
    """

    def __init__(self, arrays: dict[str, Tensor], writer: StateWriter, number_of_states: int = 0):
        DynamicIndexedLayer.__init__(self)
        AttentionLayer.__init__(self, arrays, writer)

    def update_indexer(self, indexer_key_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.writer.append(self.arrays, "indexer_keys", indexer_key_states[:, None]).squeeze(1)
