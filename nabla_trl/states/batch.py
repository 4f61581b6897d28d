"""Prefixes in one batch: stack their states, read new tokens after them, and take the new states out.

States are padded on the left and new tokens on the right. Stored states are never written to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from nabla_trl.states.layout import ArrayGroup, StateLayout, find_backbone
from nabla_trl.states.masks import build_masks, find_hidden_keys
from nabla_trl.states.prefix import PrefixState
from nabla_trl.states.writers import BatchWriter


def stack_states(layout: StateLayout, states: Sequence[PrefixState], device: torch.device) -> tuple[Cache, Tensor]:
    """Stack prefixes into one left-padded cache.

    Args:
        states: prefixes that the model can go on from (see `PrefixState.resume`).

    Returns:
        the cache (batch, longest) and its mask [batch, longest] (1 = a real token).
    """
    lengths = [state.length for state in states]
    longest = max(lengths)
    arrays: dict[int, dict[str, Tensor]] = defaultdict(dict)
    if longest:
        for number, group in enumerate(layout.token_groups):
            heads, width = group.shape
            batch = torch.zeros(
                len(group.arrays), len(states), heads, longest, width, dtype=group.dtype, device=device
            )
            for row, state in enumerate(states):
                if state.length:
                    batch[:, row, :, longest - state.length :] = state.tokens[number]
            _hand_out(group, batch, arrays)
        fixed = [state.get_fixed() for state in states]
        for number, group in enumerate(layout.fixed_groups):
            batch = torch.zeros(len(group.arrays), len(states), *group.shape, dtype=group.dtype, device=device)
            for row, tensors in enumerate(fixed):
                if tensors is not None:
                    batch[:, row] = tensors[number]
            # Copies, because some models write into their states, and autograd forbids that for views of one tensor.
            _hand_out(group, [array.clone() for array in batch], arrays)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return layout.make_cache(BatchWriter(continues=longest > 0), arrays), mask.long().to(device)


def _hand_out(group: ArrayGroup, batch: Iterable[Tensor], arrays: dict[int, dict[str, Tensor]]) -> None:
    for (layer, name), array in zip(group.arrays, batch, strict=True):
        arrays[layer][name] = array


def unstack_states(
    layout: StateLayout, cache: Cache, spans: Sequence[tuple[int, int]], earlier: Sequence[PrefixState] | None = None
) -> list[PrefixState]:
    """Copy the rows of a cache: row i from entry `spans[i][0]` up to `spans[i][1]`.

    Args:
        earlier: prefixes that the rows went on from. Their snapshots are kept.
    """
    arrays = [getattr(layer, "arrays", {}) for layer in cache.layers]
    states = []
    for row, (begin, end) in enumerate(spans):
        tokens = tuple(
            torch.stack([arrays[layer][name][row, :, begin:end] for layer, name in group.arrays])
            for group in layout.token_groups
        )
        snapshots = None
        if layout.is_recurrent:
            snapshots = dict(earlier[row].snapshots or {}) if earlier is not None else {}
        states.append(PrefixState(end - begin, tokens, snapshots))
    return states


def copy_fixed_states(layout: StateLayout, cache: Cache, row: int) -> tuple[Tensor, ...]:
    """Return a copy of the recurrent states of one row, per fixed group [arrays, *shape]."""
    arrays = [getattr(layer, "arrays", {}) for layer in cache.layers]
    return tuple(
        torch.stack([arrays[layer][name][row].detach() for layer, name in group.arrays])
        for group in layout.fixed_groups
    )


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


def read_tokens(
    model: PreTrainedModel,
    layout: StateLayout,
    states: Sequence[PrefixState],
    input_ids: Tensor,
    position_ids: Tensor,
    num_tokens: Sequence[int],
    *,
    embeds: dict[str, Tensor] | None = None,
    return_states: bool = False,
    snapshot_every: int | None = None,
) -> tuple[Tensor, list[PrefixState]]:
    """Read new tokens after the prefixes of a batch, without the output head.

    Args:
        states: B prefixes that the model can go on from.
        input_ids, position_ids: [B, R], padded on the right.
        num_tokens: how many of the R tokens are real in each row.
        embeds: the model's inputs [B, R, ...] in place of the ids.
        return_states: return the state after the real tokens of each row.
        snapshot_every: tokens between two snapshots of recurrent states. None: no new snapshot but that of the last
            token of rows without padding.

    Returns:
        the last hidden states [B, R, d], and the states.
    """
    if layout.is_recurrent and input_ids.shape[1] == 1 and torch.is_grad_enabled():
        # A step of one token writes into the states that autograd has saved. A pass over two tokens does not.
        hidden, new_states = read_tokens(
            model,
            layout,
            states,
            input_ids.expand(-1, 2),
            position_ids.expand(-1, 2),
            num_tokens,
            embeds=None if embeds is None else {name: torch.cat((x, x), dim=1) for name, x in embeds.items()},
            return_states=return_states,
            snapshot_every=snapshot_every,
        )
        return hidden[:, :1], new_states
    cache, cached_mask = stack_states(layout, states, input_ids.device)
    width, longest = cached_mask.shape[1], input_ids.shape[1]
    padding = [width - state.length for state in states]
    key_positions = torch.arange(width + longest, device=input_ids.device) - torch.tensor(
        padding, device=input_ids.device
    ).unsqueeze(1)
    hidden_keys = find_hidden_keys(cached_mask, longest)
    keeps_snapshots = return_states and layout.is_recurrent
    size = snapshot_every if keeps_snapshots and snapshot_every else longest
    snapshots: list[dict[int, tuple[Tensor, ...]]] = [{} for _ in states]
    parts = []
    for begin in range(0, longest, size):
        span = slice(begin, min(begin + size, longest))
        end = width + span.stop
        masks = build_masks(
            layout,
            hidden_keys[:, span, :end],
            key_positions[:, width + begin : end],
            key_positions[:, :end],
            layout.dtype,
        )
        inputs: dict[str, Any] = {"input_ids": input_ids[:, span]}
        if embeds is not None:
            inputs = {name: tensor[:, span] for name, tensor in embeds.items()}
        output = layout.run(find_backbone(model), cache, masks, position_ids[:, span], **inputs)
        parts.append(output.last_hidden_state)
        if keeps_snapshots:
            for row, count in enumerate(num_tokens):
                if span.stop <= count:  # the row has read no padding yet
                    snapshots[row][states[row].length + span.stop] = copy_fixed_states(layout, cache, row)
    last_hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if not return_states:
        return last_hidden, []
    spans = [(begin, width + count) for begin, count in zip(padding, num_tokens, strict=True)]
    new_states = unstack_states(layout, cache, spans, states)
    for state, row_snapshots in zip(new_states, snapshots, strict=True):
        if state.snapshots is not None:
            state.snapshots.update(row_snapshots)  # type: ignore[attr-defined]  # it was made here
    return last_hidden, new_states


@torch.no_grad()
def prefill_sequences(
    model: PreTrainedModel, layout: StateLayout, sequences: Sequence[Sequence[int]]
) -> list[PrefixState]:
    """Return the states of whole sequences (each may be empty), by forwards without the output head.

    It takes one forward. Recurrent layers take one for each length, because padding must not enter their states. So do
    models with position biases, because in float64 some of them give NaN for padding.
    """
    by_length = layout.is_recurrent or layout.mask_style == "padding"
    states = [PrefixState(0, snapshots={} if layout.is_recurrent else None)] * len(sequences)
    batches: dict[int, list[int]] = defaultdict(list)
    for index, sequence in enumerate(sequences):
        if len(sequence):
            batches[len(sequence) if by_length else 0].append(index)
    for indices in batches.values():
        ids, mask = pad_sequences([sequences[index] for index in indices], model.device, left=True)
        cache = layout.make_cache(BatchWriter(continues=False), {})
        layout.run(find_backbone(model), cache, mask, (mask.cumsum(1) - 1).clamp(min=0), input_ids=ids)
        spans = [(ids.shape[1] - len(sequences[index]), ids.shape[1]) for index in indices]
        for row, (index, state) in enumerate(zip(indices, unstack_states(layout, cache, spans), strict=True)):
            if layout.is_recurrent:
                state = PrefixState(state.length, state.tokens, {state.length: copy_fixed_states(layout, cache, row)})
            states[index] = state
    return states


@torch.no_grad()
def catch_up(
    model: PreTrainedModel, layout: StateLayout, states: Sequence[PrefixState], sequences: Sequence[Sequence[int]]
) -> list[PrefixState]:
    """Return states that the model can go on from, by reading again what follows their last snapshots.

    Args:
        sequences: the ids that each state is of.
    """
    ready = list(states)
    batches: dict[int, list[int]] = defaultdict(list)  # by how many tokens to read, so that there is no padding
    for index, state in enumerate(states):
        if state.resume_length < state.length:
            batches[state.length - state.resume_length].append(index)
    for count, indices in batches.items():
        begun = [states[index].resume() for index in indices]
        ids = torch.tensor(
            [
                list(sequences[index][state.length : state.length + count])
                for index, state in zip(indices, begun, strict=True)
            ]
        ).to(model.device)
        starts = torch.tensor([state.length for state in begun])[:, None]
        positions = (starts + torch.arange(count)).to(model.device)
        _, new_states = read_tokens(model, layout, begun, ids, positions, [count] * len(begun), return_states=True)
        for index, state in zip(indices, new_states, strict=True):
            ready[index] = state
    return ready
