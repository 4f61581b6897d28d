"""Recurrent and convolutional layers: a state of fixed size, which cannot be cut.

A prefix keeps copies of the state after some of its tokens. A branch goes on from the latest copy before it and reads
the tokens between again. Padding must never enter such a state. Rows are therefore read without padding on the left,
and states are taken only where no padding was read.

The layers of transformers write into their tensors, which autograd may have saved. These make new ones, unless they
write into the slots of a decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from nabla_trl.states.attention import AttentionLayer
from nabla_trl.states.writers import StateWriter


class _States(dict[int, Tensor | None]):
    """The states of one kind by their number in the layer, read through the writer."""

    def __init__(self, layer: RecurrentLayer, kind: str):
        super().__init__()
        self.layer, self.kind = layer, kind

    def __getitem__(self, index: int) -> Tensor | None:
        return self.layer.writer.read(self.layer.arrays, f"{self.kind}.{index}")


class RecurrentLayer(LinearAttentionLayer):
    """Convolution states [B, channels, kernel] and recurrent states [B, ...], several of each in some models.

    Args:
        arrays: "conv_states.0", "recurrent_states.0" and so on. Empty: no token was read.
        writer: where states are written.
        number_of_states: states of each kind.
    """

    def __init__(self, arrays: dict[str, Tensor], writer: StateWriter, number_of_states: int = 1):
        super().__init__(number_of_states=number_of_states)
        self._set_up(arrays, writer)

    def _set_up(self, arrays: dict[str, Tensor], writer: StateWriter) -> None:
        self.arrays, self.writer = arrays, writer
        self.conv_states, self.recurrent_states = _States(self, "conv_states"), _States(self, "recurrent_states")
        self.has_previous_state = dict.fromkeys(range(self.number_of_states), writer.continues)

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: Any
    ) -> Tensor:
        before = self.conv_states[state_idx] if self.has_previous_state[state_idx] else None
        if before is not None:
            kernel_size = before.shape[-1]
            states = torch.cat((before, conv_states), dim=-1)
        else:
            kernel_size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
            states = torch.nn.functional.pad(conv_states, (max(0, kernel_size - conv_states.shape[-1]), 0))
        self.writer.replace(self.arrays, f"conv_states.{state_idx}", states[..., -kernel_size:])
        self.has_previous_state[state_idx] = True
        return states

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return self.writer.replace(self.arrays, f"recurrent_states.{state_idx}", recurrent_states)


class HybridLayer(RecurrentLayer, AttentionLayer, LinearAttentionAndFullAttentionLayer):
    """A layer with attention and a recurrent state side by side."""

    def __init__(self, arrays: dict[str, Tensor], writer: StateWriter, number_of_states: int = 1):
        LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states)
        self._set_up(arrays, writer)
        self.is_initialized = True
