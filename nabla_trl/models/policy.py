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
    prompt_ids,
    shows_examples,
)
from nabla_trl.models.vocabulary import hash_vocabulary
from nabla_trl.tasks.problem import Problem

if TYPE_CHECKING:
    from nabla_trl.models.vllm_backend import Server

THINK = "<think>"  # before a response that begins inside a think block


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
    forbidden: Tensor
    plain_head: bool
    server: Server | None = None
    prompting: PromptOptions = field(default_factory=PromptOptions)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context(self) -> int:
        """Longest sequence (tokens) the position encoding was made for and the server takes."""
        own = context_length(self.model)
        return own if self.server is None else min(own, self.server.context)

    def encode(self, problem: Problem) -> list[int]:
        """Prompt ids: the chat template with a generation prompt; without one worked examples, or the plain question.

        Raises:
            PromptTooLong: the prompt fills the context.
            ValueError: it is empty, holds unknown characters, the template refuses it, or examples are missing.
        """
        ids = prompt_ids(self.tokenizer, problem, self.prompting)
        return check_prompt(ids, problem, self.tokenizer, name=self.name, context=self.context)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def stops(self, problem: Problem) -> tuple[str, ...]:
        """The strings at whose end a response to this problem is over, besides the stop tokens."""
        examples = shows_examples(self.tokenizer, problem, self.prompting)
        return (*problem.stop, NEXT_QUESTION) if examples else problem.stop

    def over(self, ids: Sequence[int], stop: tuple[str, ...] = ()) -> bool:
        """Whether a response ends here: with a stop token, or with the token that completes one of the strings.

        A response that goes past such a token is not looked through: one that is drawn ends there.
        """
        if not ids:
            return False
        return ids[-1] in self.stop_ids or bool(stop and self._completes(ids, stop))

    def _completes(self, ids: Sequence[int], stop: tuple[str, ...]) -> bool:
        # The last token writes the last character, or its last byte: most tokens are told by that alone.
        last = self._texts.get(ids[-1])
        if last is None:
            last = self._texts[ids[-1]] = self.decode([ids[-1]])
        if not any(one[-1] in last or not one[-1].isascii() for one in stop):
            return False
        width = 1 + max(len(one.encode()) for one in stop)  # a token writes a byte at least
        tail = self.decode(list(ids[-width:]))
        return any(one in tail for one in stop)

    @cached_property
    def _texts(self) -> dict[int, str]:
        return {}

    def said(self, ids: list[int], stop: tuple[str, ...] = ()) -> str:
        """The text of a response up to a stop string, where its answer is looked for; thinking is marked as such."""
        text = self.decode(ids)
        ends = [at for one in stop if (at := text.find(one)) >= 0]
        return THINK * self._thinks + (text[: min(ends)] if ends else text)

    @cached_property
    def _thinks(self) -> bool:
        return opens_thinking(self.tokenizer, self.prompting)

    @cached_property
    def tokenizer_hash(self) -> str:
        """Identifies the map from ids to token strings. Every trace names it, so it is computed once."""
        return hash_vocabulary(self.tokenizer)


def context_length(model: PreTrainedModel) -> int:
    """Longest sequence (tokens) that the position encoding of a model was made for."""
    return model.config.get_text_config().max_position_embeddings
