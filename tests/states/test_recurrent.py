"""Recurrent states: padding never enters them, and a prefix between two copies is read again from the earlier one."""

from __future__ import annotations

import pytest
import torch
from architectures import build_model

from nabla_trl.states.batch import catch_up, prefill_sequences, read_tokens
from nabla_trl.states.prefix import PrefixState
from nabla_trl.states.probe import get_layout
from nabla_trl.states.releases import RECURRENT_LAYERS_RELEASE, supports_recurrent_layers
from nabla_trl.states.slots import SlotStore

pytestmark = pytest.mark.skipif(
    not supports_recurrent_layers, reason=f"needs transformers {RECURRENT_LAYERS_RELEASE} or newer"
)
SEQUENCES = ([3, 1, 4, 1, 5, 9, 2, 6], [], [5], [2, 7, 1, 8, 2], [9, 8, 7, 6, 5])


def assert_same_state(state: PrefixState, other: PrefixState) -> None:
    assert state.length == other.length
    torch.testing.assert_close(state.tokens, other.tokens, rtol=1e-4, atol=1e-4)
    fixed, other_fixed = state.get_fixed(), other.get_fixed()
    assert (fixed is None) == (other_fixed is None)
    if fixed is not None:
        torch.testing.assert_close(fixed, other_fixed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba2", "lfm2", "qwen3_5_text", "falcon_h1"])
def test_padding_never_enters_a_state(name: str) -> None:
    model = build_model(name)
    layout = get_layout(model)
    assert layout.is_recurrent and layout.fixed_groups
    alone = [prefill_sequences(model, layout, [sequence])[0] for sequence in SEQUENCES]
    for state, other in zip(prefill_sequences(model, layout, SEQUENCES), alone, strict=True):
        assert_same_state(state, other)
    # New tokens are padded on the right, and copies are taken only before the padding.
    count = torch.tensor([4, 2, 4])
    states = [alone[index] for index in (0, 2, 3)]
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 0], [1, 2, 3, 4]])
    positions = torch.tensor([[state.length] for state in states]) + torch.arange(4)
    with torch.no_grad():
        _, together = read_tokens(
            model, layout, states, ids, positions, count.tolist(), return_states=True, snapshot_every=2
        )
    for row, (state, begin) in enumerate(zip(together, (8, 1, 5), strict=True)):
        assert set(state.snapshots or ()) == {begin, *range(begin + 2, begin + int(count[row]) + 1, 2)}
        whole = [*SEQUENCES[(0, 2, 3)[row]], *ids[row, : count[row]].tolist()]
        assert_same_state(state, prefill_sequences(model, layout, [whole])[0])


@pytest.mark.parametrize("name", ["mamba2", "qwen3_5_text"])
def test_a_cut_is_caught_up_from_the_copy_before_it(name: str) -> None:
    model = build_model(name)
    layout = get_layout(model)
    [state] = prefill_sequences(model, layout, [[3, 1, 4]])
    ids, positions = torch.tensor([[1, 5, 9, 2, 6]]), torch.arange(3, 8)[None]
    with torch.no_grad():
        _, [longer] = read_tokens(model, layout, [state], ids, positions, [5], return_states=True, snapshot_every=2)
    cut = longer.cut(6)
    assert (cut.length, cut.resume_length, longer.resume_length) == (6, 5, 8)
    with pytest.raises(RuntimeError, match="go on from 5"):
        cut.get_fixed()
    sequence = [3, 1, 4, 1, 5, 9]
    [ready] = catch_up(model, layout, [cut], [sequence])
    assert_same_state(ready, prefill_sequences(model, layout, [sequence])[0])
    assert cut.resume_length == 5, "a stored state was written to"


@pytest.mark.parametrize("name", ["falcon_h1", "deepseek_v32"])
def test_a_slot_holds_its_state_when_the_store_grows_and_slots_move(name: str) -> None:
    model = build_model(name)
    layout = get_layout(model)
    states = prefill_sequences(model, layout, [SEQUENCES[0], SEQUENCES[3]])
    store = SlotStore(layout, model.device)
    assert store.reserve(2, 8) and not store.reserve(1, 8)
    for slot, state in enumerate(states):
        store.write(slot, state)
    assert store.reserve(3, 16)
    store.move(1, 2, states[1].length)
    for slot, state in ((0, states[0]), (1, states[1]), (2, states[1])):
        assert all(map(torch.equal, store.copy_tokens(slot, state.length), state.tokens))
        assert all(map(torch.equal, store.copy_fixed(slot), state.get_fixed() or ()))
