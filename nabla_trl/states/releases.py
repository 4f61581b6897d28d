"""Cache layers of transformers that older releases lack. There they are classes that no model uses."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer


def _get_layer(name: str, base: type) -> Any:
    return getattr(cache_utils, name, None) or type(name, (base,), {})


DummyLayer = _get_layer("DummyLayer", object)
DynamicIndexedLayer = _get_layer("DynamicIndexedLayer", DynamicLayer)
LinearAttentionAndSlidingWindowAttentionLayer = _get_layer(
    "LinearAttentionAndSlidingWindowAttentionLayer", LinearAttentionAndFullAttentionLayer
)
# Before 5.15, recurrent layers of transformers have another interface.
RECURRENT_LAYERS_RELEASE = "5.15"
supports_recurrent_layers = "number_of_states" in inspect.signature(LinearAttentionLayer.__init__).parameters
