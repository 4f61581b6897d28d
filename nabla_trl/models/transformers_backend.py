"""Generation in this process, by continuous decoding (`nabla_trl.models.decoding`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from nabla_trl.models import kv_cache
from nabla_trl.models.decoding import SlotDecoder
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy, get_context_length


class TransformersBackend:
    """Generates with `policy.model` itself (see `GenerationBackend`)."""

    returns_caches: ClassVar[bool] = True
    supports_should_stop: ClassVar[bool] = True

    def get_context_length(self, policy: Policy) -> int:
        return get_context_length(policy.model)

    def get_metadata(self) -> dict[str, str]:
        return {}

    def prefill(self, policy: Policy, sequences: Sequence[list[int]]) -> list[Tensor]:
        return kv_cache.prefill_sequences(policy.model, sequences)

    def open_session(self, policy: Policy, sampling: Sampling, **options: Any) -> SlotDecoder:
        return SlotDecoder(policy, sampling, **options)
