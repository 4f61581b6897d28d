"""States of the sequences that a decoder works on: buffers of fixed size with a slot for each sequence.

Arrays with an entry per token lie in [arrays, slots, heads, capacity, width], with a write position per slot. States
of recurrent layers lie in [arrays, slots, *shape]. Buffers stay where they are until they must grow, so a CUDA graph
can hold a step.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from nabla_trl.states.layout import StateLayout
from nabla_trl.states.masks import build_masks
from nabla_trl.states.prefix import PrefixState
from nabla_trl.states.writers import SlotWriter


class SlotStore:
    """Slots for the states of sequences of one model.

    Attributes:
        num_slots, capacity: slots, and entries that each of them holds.
        writer: where the layers write in the current step.
        cache: what the model's forward takes.
    """

    def __init__(self, layout: StateLayout, device: torch.device):
        self.layout, self.device = layout, device
        self.num_slots = self.capacity = 0
        self.slots = torch.zeros(0, dtype=torch.long, device=device)
        self.writer = SlotWriter(device)
        self.tokens: list[Tensor] = []
        self.fixed: list[Tensor] = []
        self.cache = layout.make_cache(self.writer, {})

    @property
    def buffers(self) -> list[Tensor]:
        return [*self.tokens, *self.fixed]

    def reserve(self, num_slots: int, capacity: int) -> bool:
        """Make the buffers large enough, and return whether they have moved. What they hold stays."""
        if num_slots <= self.num_slots and capacity <= self.capacity:
            return False
        num_slots, capacity = max(num_slots, self.num_slots), max(capacity, self.capacity)
        tokens, fixed = [], []
        for group in self.layout.token_groups:
            heads, width = group.shape
            token_shape = (len(group.arrays), num_slots, heads, capacity, width)
            tokens.append(torch.zeros(token_shape, dtype=group.dtype, device=self.device))
        for group in self.layout.fixed_groups:
            fixed_shape = (len(group.arrays), num_slots, *group.shape)
            fixed.append(torch.zeros(fixed_shape, dtype=group.dtype, device=self.device))
        if self.num_slots:
            for new, old in zip(tokens, self.tokens, strict=True):
                new[:, : self.num_slots, :, : self.capacity] = old
            for new, old in zip(fixed, self.fixed, strict=True):
                new[:, : self.num_slots] = old
        self.tokens, self.fixed, self.num_slots, self.capacity = tokens, fixed, num_slots, capacity
        self.slots = torch.arange(num_slots, device=self.device)
        arrays: dict[int, dict[str, Tensor]] = defaultdict(dict)
        groups = (*self.layout.token_groups, *self.layout.fixed_groups)
        for group, buffer in zip(groups, self.buffers, strict=True):
            for (layer, name), array in zip(group.arrays, buffer, strict=True):
                arrays[layer][name] = array
        self.cache = self.layout.make_cache(self.writer, arrays)
        return True

    def run_step(self, module: Any, tokens: Tensor, positions: Tensor, width: int, max_position: int = 2**62) -> Any:
        """Return the output of a model, or of its part below the head, for one new token in each of the first slots.

        Args:
            tokens: [B, 1].
            positions: [B] where each slot's token goes.
            width: entries of the slots that this step attends to.
            max_position: the model knows no later position.
        """
        positions = positions.clamp(max=self.capacity - 1)
        self.writer.slots, self.writer.positions, self.writer.width = self.slots[: len(tokens)], positions, width
        keys = torch.arange(width, device=positions.device)
        hidden = keys > positions[:, None]
        masks = build_masks(self.layout, hidden[:, None], positions[:, None], keys[None], self.layout.dtype)
        return self.layout.run(module, self.cache, masks, positions.clamp(max=max_position)[:, None], input_ids=tokens)

    def write(self, slot: int, state: PrefixState) -> None:
        """Copy the state of a prefix that the model can go on from into a slot."""
        if state.length:
            for buffer, tensor in zip(self.tokens, state.tokens, strict=True):
                buffer[:, slot, :, : state.length] = tensor
        if self.fixed:
            fixed = state.get_fixed()
            for number, buffer in enumerate(self.fixed):
                if fixed is None:
                    buffer[:, slot].zero_()
                else:
                    buffer[:, slot] = fixed[number]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a slot whose sequence has `length` tokens to another slot."""
        for buffer in self.tokens:
            buffer[:, target, :, :length] = buffer[:, source, :, :length]
        for buffer in self.fixed:
            buffer[:, target] = buffer[:, source]

    def copy_tokens(self, slot: int, length: int) -> tuple[Tensor, ...]:
        """Return copies of the first `length` entries of a slot."""
        return tuple(buffer[:, slot, :, :length].clone() for buffer in self.tokens)

    def copy_fixed(self, slot: int) -> tuple[Tensor, ...]:
        """Return copies of the recurrent states of a slot."""
        return tuple(buffer[:, slot].clone() for buffer in self.fixed)
