"""States of prefixes: into a batch and back, cut and gone on from, and the mask that all layers share."""

from __future__ import annotations

import pytest
import torch
import worlds

from nabla_trl.states.batch import prefill_sequences, read_tokens, stack_states, unstack_states
from nabla_trl.states.probe import get_layout

SEQUENCES = ([3, 1, 4], [], [1, 5, 9, 2, 6, 5, 3])


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_states_come_back_as_they_went_in(architecture: str) -> None:
    model = worlds.tiny_model(architecture)
    layout = get_layout(model)
    states = prefill_sequences(model, layout, SEQUENCES)
    assert [state.length for state in states] == [3, 0, 7]
    cache, mask = stack_states(layout, states, model.device)
    assert mask.sum(1).tolist() == [3, 0, 7] and mask.shape == (3, 7) and mask[:, -1].tolist() == [1, 0, 1]
    back = unstack_states(layout, cache, [(4, 7), (7, 7), (0, 7)])
    for state, other in zip(states, back, strict=True):
        assert state.length == other.length
        assert state.length == 0 or all(map(torch.equal, state.tokens, other.tokens))
    [part] = unstack_states(layout, stack_states(layout, states[2:], model.device)[0], [(1, 4)])
    assert torch.equal(part.tokens[0], states[2].tokens[0][:, :, 1:4])


def test_a_state_taken_out_is_a_copy_and_a_cut_is_not() -> None:
    model = worlds.tiny_model()
    layout = get_layout(model)
    [state] = prefill_sequences(model, layout, SEQUENCES[2:])
    cut = state.cut(4)
    assert cut.length == cut.resume_length == 4 and state.cut(9) is state and not state.cut(0).tokens
    assert cut.tokens[0].data_ptr() == state.tokens[0].data_ptr()
    cache, _ = stack_states(layout, [state], model.device)
    before = state.tokens[0].clone()
    cache.layers[0].arrays["keys"].zero_()
    assert torch.equal(state.tokens[0], before)


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_the_shared_mask_is_transformers_own(architecture: str) -> None:
    """The same hidden states as from a mask of zeros and ones, with the prefix padded on the left."""
    model = worlds.tiny_model(architecture, dtype=torch.float64)
    layout = get_layout(model)
    prefixes, inputs = [[1, 2, 3, 4], [5]], torch.tensor([[6, 7, 8], [9, 10, 11]])
    positions = torch.tensor([[4, 5, 6], [1, 2, 3]])
    with torch.no_grad():
        states = prefill_sequences(model, layout, prefixes)
        shared, _ = read_tokens(model, layout, states, inputs, positions, [3, 3])
        cache, cached_mask = stack_states(layout, states, model.device)
        own = model.base_model(
            input_ids=inputs,
            attention_mask=torch.cat((cached_mask, torch.ones_like(inputs)), 1),
            position_ids=positions,
            past_key_values=cache,
        ).last_hidden_state
    assert torch.allclose(shared, own, rtol=0, atol=1e-12)
