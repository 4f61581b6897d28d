"""Policies and tokenizers: loading, where responses end, and the map between two vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nabla_trl.models.flops import ModelSize
from nabla_trl.models.options import PromptOptions
from nabla_trl.models.prompts import (
    NEXT_QUESTION,
    check_prompt,
    opens_thinking,
    tokenize_prompt,
    uses_few_shot,
)
from nabla_trl.models.vocabulary import hash_vocabulary
from nabla_trl.tasks.problem import Problem

if TYPE_CHECKING:
    from nabla_trl.models.vllm_backend import VllmBackend

THINK_TAG = "<think>"  # before a response that begins inside a think block


@dataclass
class Policy:
    """A frozen causal LM with its tokenizer.

    Attributes:
        name: hub id or path, as the user gave it.
        stop_ids: tokens that end a response (every eos of tokenizer and generation config).
        forbidden: [rows of the output head] bool, tokens that must not be sampled: rows without a token string
            and a padding token that is not a stop token.
        plain_head: the logits are the output head of the last hidden state and nothing more; models that scale or
            cap them cannot be differentiated slice by slice.
        server: draws responses in this model's place (`server.connect`); gradients are taken here all the same.
        prompting: how problems are put to it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    size: ModelSize
    stop_ids: frozenset[int]
    forbidden_mask: Tensor
    has_plain_head: bool
    backend: VllmBackend | None = None
    prompt_options: PromptOptions = field(default_factory=PromptOptions)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context_length(self) -> int:
        """Longest sequence (tokens) the position encoding was made for and the server takes."""
        own = get_context_length(self.model)
        return own if self.backend is None else min(own, self.backend.context_length)

    def encode(self, problem: Problem) -> list[int]:
        """Prompt ids: the chat template with a generation prompt; without one worked examples, or the plain question.

        Raises:
            PromptTooLong: the prompt fills the context.
            ValueError: it is empty, holds unknown characters, the template refuses it, or examples are missing.
        """
        ids = tokenize_prompt(self.tokenizer, problem, self.prompt_options)
        return check_prompt(ids, problem, self.tokenizer, name=self.name, context_length=self.context_length)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def get_stop_strings(self, problem: Problem) -> tuple[str, ...]:
        """The strings at whose end a response to this problem is over, besides the stop tokens."""
        examples = uses_few_shot(self.tokenizer, problem, self.prompt_options)
        return (*problem.stop_strings, NEXT_QUESTION) if examples else problem.stop_strings

    def is_finished(self, ids: Sequence[int], stop_strings: tuple[str, ...] = ()) -> bool:
        """Whether a response ends here: with a stop token, or with the token that completes one of the strings.

        A response that goes past such a token is not looked through: one that is drawn ends there.
        """
        if not ids:
            return False
        return ids[-1] in self.stop_ids or bool(stop_strings and self._ends_with_stop_string(ids, stop_strings))

    def _ends_with_stop_string(self, ids: Sequence[int], stop_strings: tuple[str, ...]) -> bool:
        # The last token writes the last character, or its last byte: most tokens are told by that alone.
        last = self._token_texts.get(ids[-1])
        if last is None:
            last = self._token_texts[ids[-1]] = self.decode([ids[-1]])
        if not any(one[-1] in last or not one[-1].isascii() for one in stop_strings):
            return False
        width = 1 + max(len(one.encode()) for one in stop_strings)  # a token writes a byte at least
        tail = self.decode(list(ids[-width:]))
        return any(one in tail for one in stop_strings)

    @cached_property
    def _token_texts(self) -> dict[int, str]:
        return {}

    def decode_response(self, ids: list[int], stop_strings: tuple[str, ...] = ()) -> str:
        """The text of a response up to a stop string, where its answer is looked for; thinking is marked as such."""
        text = self.decode(ids)
        ends = [at for one in stop_strings if (at := text.find(one)) >= 0]
        return THINK_TAG * self._opens_thinking + (text[: min(ends)] if ends else text)

    @cached_property
    def _opens_thinking(self) -> bool:
        return opens_thinking(self.tokenizer, self.prompt_options)

    @cached_property
    def tokenizer_hash(self) -> str:
        """Identifies the map from ids to token strings. Every trace names it, so it is computed once."""
        return hash_vocabulary(self.tokenizer)


def get_context_length(model: PreTrainedModel) -> int:
    """Longest sequence (tokens) that the position encoding of a model was made for."""
    return model.config.get_text_config().max_position_embeddings
