"""The state of one sequence: what its layers keep after reading a prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

# Tokens between two snapshots of recurrent states. A branch reads half of them again on average. Snapshots of large
# models take tens of megabytes.
SNAPSHOT_INTERVAL = 32


@dataclass(frozen=True)
class PrefixState:
    """What a model keeps of a prefix. It is never written to, so that sequences can share it and cut it.

    Attributes:
        length: tokens that the prefix has.
        tokens: per token group of the layout, [arrays, heads, length, width]. Empty if `length` is 0.
        snapshots: states of recurrent layers by the number of tokens that they have read: per fixed group of the
            layout, [arrays, *shape]. The state of no token is known without a snapshot. None: no layer is recurrent.
    """

    length: int
    tokens: tuple[Tensor, ...] = ()
    snapshots: Mapping[int, tuple[Tensor, ...]] | None = field(default=None, compare=False)

    def cut(self, length: int) -> PrefixState:
        """Return the state of the first `length` tokens, or this state if it is not longer.

        Nothing is copied. Snapshots beyond the cut are left out, so the state may have to be resumed from an earlier
        token (see `resume_length`).
        """
        if length >= self.length:
            return self
        snapshots = self.snapshots
        if snapshots is not None:
            snapshots = {count: states for count, states in snapshots.items() if count <= length}
        tokens = tuple(tensor[:, :, :length] for tensor in self.tokens) if length else ()
        return PrefixState(length, tokens, snapshots)

    @property
    def resume_length(self) -> int:
        """Return how many tokens need not be read again: attention goes on anywhere, recurrent layers at snapshots."""
        return self.length if self.snapshots is None else max(self.snapshots, default=0)

    def resume(self) -> PrefixState:
        """Return the longest part of this state from which the model can go on without reading a token again."""
        return self.cut(self.resume_length)

    def get_fixed(self) -> tuple[Tensor, ...] | None:
        """Return the recurrent states after the last token, and None where they are those of no token.

        Raises:
            RuntimeError: the state must be resumed from an earlier token first.
        """
        if self.resume_length != self.length:
            raise RuntimeError(
                f"the recurrent states of {self.length} tokens are not known: go on from {self.resume_length}"
            )
        return None if self.snapshots is None else self.snapshots.get(self.length)
