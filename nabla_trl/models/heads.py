"""Logits of last hidden states, computed as the model computes them.

A causal LM is a backbone, which ends in hidden states h [T, d], and a head. In most families the head is one matrix W.
Others scale the logits (Granite, Cohere, Falcon-H1), cap them (Gemma), scale h first (MiniCPM), or cut padded rows.
The head of a model is therefore the model itself, with a backbone that hands on given hidden states. No list of
families is needed, and a family that comes later is right as well.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from nabla_trl.states.layout import find_backbone
from nabla_trl.utils.formatting import format_error

_NUM_TEST_TOKENS = 4
_TEST_STATE_SCALE = 30.0  # large states give large logits, so that a soft cap shows


class OutputHead:
    """Map last hidden states to logits as the model does, with its own scale and soft cap.

    Attributes:
        num_rows: V, the width of the logits.
        is_plain: the head is the output embedding alone, which is then called directly.

    Raises:
        ValueError: the logits of the model are no function of its last hidden states.
    """

    def __init__(self, model: PreTrainedModel):
        self._matrix: Any = model.get_output_embeddings()
        backbone = find_backbone(model)
        # A shallow copy: weights and modules are the model's own, and the model stays as it is.
        self._model = copy.copy(model)
        self._model.__dict__["_modules"] = {
            name: _GivenStates(child) if child is backbone else child for name, child in model._modules.items()
        }
        # A trainer binds a forward of its own to its model. On the copy it would still call the model.
        self._model.__dict__.pop("forward", None)
        self.is_plain = False
        name = model.name_or_path or type(model).__name__
        with torch.no_grad():
            ids = torch.arange(_NUM_TEST_TOKENS, device=model.device)[None] % model.config.get_text_config().vocab_size
            states, logits = backbone(input_ids=ids).last_hidden_state[0], model(input_ids=ids).logits[0]
            try:
                own_logits = self(states)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise ValueError(f"{name} has a head that cannot be called alone: {format_error(error)}") from error
            tolerance = 1e-3 * max(1.0, float(logits.abs().max()))
            if not torch.allclose(own_logits, logits, rtol=1e-3, atol=tolerance, equal_nan=True):
                raise ValueError(f"the logits of {name} are more than a function of its last hidden states")
            self.num_rows, self.is_plain = logits.shape[-1], self._is_matrix_alone(states)

    def __call__(self, states: Tensor) -> Tensor:
        """Return logits [N, V] of hidden states [N, d]."""
        if self.is_plain:
            return self._matrix(states)
        return self._model(inputs_embeds=states[None], use_cache=False).logits[0]

    def _is_matrix_alone(self, states: Tensor) -> bool:
        """Return whether the output embedding gives the same logits, on random states that no cap leaves alone."""
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(states.shape, generator=generator).to(states) * _TEST_STATE_SCALE
        if self._matrix is None or self._matrix.weight.shape[-1] != states.shape[-1]:
            return False
        # Exactly: the same product with nothing after it. If in doubt, the model's own forward is used.
        return torch.equal(self._matrix(random[None])[0], self(random))


class StateRecorder:
    """A causal LM that also keeps the last hidden states of a forward pass. Its logits are the model's, bit for bit.

    Attributes:
        width: d, the size of a hidden state.
    """

    def __init__(self, model: PreTrainedModel):
        self._model, self._backbone = model, find_backbone(model)
        self._states: Tensor | None = None
        with torch.no_grad():
            self(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
        self.width = self.take().shape[-1]

    def __call__(self, **inputs: Any) -> Any:
        """Return what the model returns for its inputs, and keep the hidden states for `take`."""

        def keep_states(module: nn.Module, arguments: Any, output: Any) -> None:
            self._states = output[0] if isinstance(output, tuple) else output.last_hidden_state

        hook = self._backbone.register_forward_hook(keep_states)
        try:
            return self._model(**inputs)
        finally:
            hook.remove()

    def take(self) -> Tensor:
        """Return the hidden states [B, R, d] of the last forward pass, once.

        Raises:
            RuntimeError: there was no forward pass since the last call.
        """
        states, self._states = self._states, None
        if states is None:
            raise RuntimeError("no hidden states: run the model first")
        return states


class _GivenStates(nn.Module):
    """Stands where the backbone was, and returns its `inputs_embeds` as the last hidden states."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.__dict__["backbone"] = backbone  # no submodule: only its attributes are read

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> _BackboneOutput:
        return _BackboneOutput(last_hidden_state=inputs_embeds)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["backbone"], name)
        return self if isinstance(value, nn.Module) else value  # OPT calls the decoder inside its backbone


class _BackboneOutput(BaseModelOutputWithPast):
    """An output without any of the further fields that a family may ask for (router logits, a recurrent state)."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None
