"""Where the arrays of a layer are written: behind those of a batch, or into the slots of a decoder.

A layer names its arrays ("keys", "conv_states.0"). Arrays of one kind hold an entry per token, [B, heads, length,
width], and a forward appends to them. Arrays of the other kind are the whole state of a recurrent layer, [B, ...], and
a forward replaces them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class StateWriter(ABC):
    """Reads and writes the arrays of a layer for the rows of a forward.

    Attributes:
        continues: the rows have read tokens before, so recurrent layers go on from their states.
    """

    continues: bool

    @abstractmethod
    def append(self, arrays: dict[str, Tensor], name: str, new: Tensor) -> Tensor:
        """Append the entries [B, heads, n, width] of new tokens, and return those of all tokens."""

    @abstractmethod
    def replace(self, arrays: dict[str, Tensor], name: str, new: Tensor) -> Tensor:
        """Replace the state of all rows, and return it."""

    @abstractmethod
    def read(self, arrays: dict[str, Tensor], name: str) -> Tensor | None:
        """Return the state of all rows, and None before the first one."""

    @abstractmethod
    def get_length(self, arrays: dict[str, Tensor]) -> int:
        """Return how many entries a row has before the forward."""


class BatchWriter(StateWriter):
    """Makes new tensors, so that autograd can go through them and stored states stay as they are."""

    def __init__(self, continues: bool):
        self.continues = continues

    def append(self, arrays: dict[str, Tensor], name: str, new: Tensor) -> Tensor:
        arrays[name] = torch.cat((arrays[name], new), dim=2) if name in arrays else new
        return arrays[name]

    def replace(self, arrays: dict[str, Tensor], name: str, new: Tensor) -> Tensor:
        arrays[name] = new
        return new

    def read(self, arrays: dict[str, Tensor], name: str) -> Tensor | None:
        return arrays.get(name)

    def get_length(self, arrays: dict[str, Tensor]) -> int:
        return next((array.shape[2] for name, array in arrays.items() if name == "keys"), 0)


class SlotWriter(StateWriter):
    """Writes one token per slot at the slot's own position. Addresses and shapes stay as they are.

    Attributes:
        slots: [B] the slots of this step, which are the first ones.
        positions: [B] where each slot's token goes.
        width: positions that this step attends to.
    """

    continues = True

    def __init__(self, device: torch.device):
        self.slots = self.positions = torch.zeros(0, dtype=torch.long, device=device)
        self.width = 0

    def append(self, arrays: dict[str, Tensor], name: str, new: Tensor) -> Tensor:
        arrays[name][self.slots, :, self.positions] = new[:, :, 0]
        return arrays[name][: len(new), :, : self.width]

    def replace(self, arrays: dict[str, Tensor], name: str, new: Tensor) -> Tensor:
        return arrays[name][: len(new)].copy_(new)

    def read(self, arrays: dict[str, Tensor], name: str) -> Tensor | None:
        return arrays[name][: len(self.slots)] if name in arrays else None

    def get_length(self, arrays: dict[str, Tensor]) -> int:
        return self.width - 1
