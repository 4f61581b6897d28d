"""A policy: a frozen causal LM, how it reads a problem, where its responses end, and what generates its tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nabla_trl.grading.notation import THINK_CLOSING, THINK_OPENING, is_think_tag, normalize_think_tags
from nabla_trl.models.chat.thinking import ThinkingFormat, decode_with_thinking
from nabla_trl.models.flops import ModelSize
from nabla_trl.models.heads import OutputHead
from nabla_trl.models.options import PromptOptions, Sampling
from nabla_trl.models.prompts import (
    NEXT_QUESTION,
    PromptTooLong,
    check_prompt,
    find_policy_thinking,
    tokenize_prompt,
    uses_few_shot,
)
from nabla_trl.states.prefix import PrefixState
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.identity import hash_json

MIN_PIECE_CHARS = 4096  # of a text whose tokens are counted piece by piece
UNLIMITED_CONTEXT = 2**20  # tokens
_CONTEXT_LENGTH_NAMES = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length")


@dataclass
class GenerationRequest:
    """A request for one continuation.

    Attributes:
        cost_key: key that the FLOP counter charges, usually the problem id.
        prefix_ids: ids to continue: the prompt, or the prompt and the beginning of a response. Never empty.
        rng: random numbers for this continuation alone. Unused when decoding is greedy.
        max_new_tokens: at least 1.
        cache: state of `prefix_ids[:-1]`. None: `generate_continuations` computes it.
        stop_strings: strings that end the response, besides the policy's stop tokens.
        response_tokens_in_prefix: how many tokens at the end of the prefix belong to the response. A stop string may
            begin in them.
        should_stop: called once with every new token, in order. True ends the continuation, as a stop token does.
        stop_entropy: end with the first token whose distribution has at least this entropy (nats). Needs a session
            that records statistics.
        stop_entropy_after: tokens before which `stop_entropy` does not end the continuation.
    """

    cost_key: str
    prefix_ids: list[int]
    rng: np.random.Generator | None
    max_new_tokens: int
    cache: PrefixState | None = None
    stop_strings: tuple[str, ...] = ()
    response_tokens_in_prefix: int = 0
    should_stop: Callable[[int], bool] | None = None
    stop_entropy: float = math.inf
    stop_entropy_after: int = 1

    def get_rng(self) -> np.random.Generator:
        """Return the random numbers of a sampled continuation."""
        if self.rng is None:
            raise ValueError("sampling needs a random stream for every request: set rng")
        return self.rng

    def get_cache(self) -> PrefixState:
        """Return the cache of a request whose prefix has been prefilled."""
        if self.cache is None:
            raise RuntimeError("the request's prefix has no cache: call generate_continuations, which prefills it")
        return self.cache

    def join_response(self, new_ids: Sequence[int]) -> list[int]:
        """Return the response's tokens so far: those in the prefix, then the new ones."""
        return [*self.prefix_ids[len(self.prefix_ids) - self.response_tokens_in_prefix :], *new_ids]


@dataclass
class GenerationOutput:
    """A continuation of T tokens.

    Attributes:
        ids: the T new tokens, a final stop token included.
        finished: the last token is a stop token, or completes a stop string.
        candidates: [T, K] long, the policy's K likeliest tokens at each position. The sampled token is one of them.
        logp: [T, K] float32, log π of the candidates (temperature 1, no filter). −inf for forbidden tokens.
        log_importance_weight: [T, K] log π − log q of the candidates, where q is the sampler, both normalized over
            the allowed tokens. inf where q is 0. None where q = π, or if it was not asked for.
        cache: state of `prefix_ids + ids[:-1]`. None if it was not asked for.
        statistics: [T, 3] float32, what is recorded of π at each position (`TokenStatistic`). None if it was not asked
            for. A server knows only the first column, and the others are NaN.
        hidden_states: [T, d] the policy's last hidden states that predicted the tokens. None if they were not asked
            for, or if the back end does not give them.
    """

    ids: list[int]
    finished: bool
    candidates: Tensor
    logp: Tensor
    log_importance_weight: Tensor | None = None
    cache: PrefixState | None = None
    statistics: Tensor | None = None
    hidden_states: Tensor | None = None

    def get_cache(self) -> PrefixState:
        """Return the cache of an output made with `return_cache`."""
        if self.cache is None:
            raise RuntimeError("the output has no cache: generate it with return_cache")
        return self.cache

    def get_log_importance_weight(self) -> Tensor:
        """Return the weights of an output made with `return_log_importance_weight` by a sampler that is not π."""
        if self.log_importance_weight is None:
            raise RuntimeError("the output has no log_importance_weight: its sampler is π itself")
        return self.log_importance_weight


class GenerationBackend(Protocol):
    """What generates a policy's tokens, in this process or on a server. Gradients are always computed in this process.

    Attributes:
        returns_caches: outputs and prefilled prompts carry states of `policy.model`. If False, their rows are empty.
        supports_should_stop: `GenerationRequest.should_stop` is called.
        knows_distributions: `GenerationOutput.statistics` has all columns.
    """

    returns_caches: ClassVar[bool]
    supports_should_stop: ClassVar[bool]
    knows_distributions: ClassVar[bool]

    def get_context_length(self, policy: Policy) -> int:
        """Return the longest sequence (tokens, prompt and response) that can be generated."""

    def get_metadata(self) -> dict[str, str]:
        """Return what every trace records about this back end."""

    def prefill(self, policy: Policy, sequences: Sequence[list[int]]) -> list[PrefixState]:
        """Return the state of each sequence, which may be empty."""

    def open_session(
        self,
        policy: Policy,
        sampling: Sampling,
        *,
        max_sequences: int = 256,
        top_k_candidates: int = 1,
        return_cache: bool = False,
        return_log_importance_weight: bool = False,
        statistics_top_k: int = 0,
        return_hidden_states: bool = False,
    ) -> GenerationSession:
        """Return a session for requests with these options.

        Args:
            max_sequences: sequences that are generated together at most.
            top_k_candidates: K, how many candidates to record per position (capped at the vocabulary).
            return_cache: return each output's state. Outputs of a server have empty rows.
            return_log_importance_weight: record log π − log q of the candidates, unless the sampler q is π.
            statistics_top_k: record `GenerationOutput.statistics` with this k. 0 records none, and costs nothing.
            return_hidden_states: return the hidden states that predicted the tokens. A server returns none.

        Raises:
            ValueError: an option that this back end does not support.
        """


class GenerationSession(Protocol):
    """Requests of one kind that a back end works on. They join and leave at any time."""

    @property
    def num_unfinished(self) -> int:
        """Return how many submitted requests have no output yet."""

    def submit(self, tag: Hashable, request: GenerationRequest) -> None:
        """Begin a request whose prefix has been prefilled.

        Args:
            tag: given back with the output.

        Raises:
            ValueError: a request that this back end does not support.
        """

    def step(self) -> list[tuple[Hashable, GenerationOutput | Exception]]:
        """Go on with all requests, and return the tags and outputs (or errors) of those that have ended."""

    def cancel(self, tags: Collection[Hashable]) -> None:
        """Drop requests and whatever has been generated for them."""

    def list_requests(self) -> list[tuple[Hashable, GenerationRequest]]:
        """Return the requests that have no output yet, with their tags."""


@dataclass
class Policy:
    """A frozen causal LM with its tokenizer.

    Attributes:
        name: hub id or path, as the user gave it.
        stop_ids: tokens that end a response (every eos token of tokenizer and generation config).
        forbidden_mask: [rows of the output head] bool, tokens that are never sampled: rows without a token string, and
            a padding token that is not a stop token.
        head: maps last hidden states to logits.
        backend: what generates its responses.
        prompt_options: how problems are written as prompts.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    size: ModelSize
    stop_ids: frozenset[int]
    forbidden_mask: Tensor
    head: OutputHead
    backend: GenerationBackend
    prompt_options: PromptOptions = field(default_factory=PromptOptions)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context_length(self) -> int:
        """Return the longest sequence (tokens) that model and back end take."""
        return self.backend.get_context_length(self)

    def encode(self, problem: Problem) -> list[int]:
        """Return the prompt ids of a problem: its own, or those of its messages (see `tokenize_prompt`).

        Raises:
            PromptTooLong: the prompt fills the context.
            ValueError: the prompt is empty, holds unknown characters, is refused by the chat template, or needs
                worked examples that the problem does not have.
        """
        if problem.prompt_ids is not None:
            ids = list(problem.prompt_ids)
        else:
            self.check_text_length("".join(message["content"] for message in problem.build_messages()), problem.id)
            ids = tokenize_prompt(self.tokenizer, problem, self.prompt_options)
        return check_prompt(ids, problem, self.tokenizer, name=self.name, context_length=self.context_length)

    def check_text_length(self, text: str, name: str) -> None:
        """Refuse a text that cannot fit into the context, at a cost that does not grow with the text.

        Args:
            name: begins the message of an error.
        """
        context_length, num_bytes = self.context_length, len(text.encode(errors="replace"))
        is_too_long = num_bytes > context_length * self._max_token_bytes
        num_chars = MIN_PIECE_CHARS + 4 * context_length
        if not is_too_long and len(text) > 2 * num_chars:  # longer than most texts that fit: count piece by piece
            num_tokens = 0
            for begin in range(0, len(text), num_chars):
                piece = text[begin : begin + num_chars]
                # A cut may split a token, or change how its neighbors are split.
                num_tokens += max(0, len(self.tokenizer(piece, add_special_tokens=False)["input_ids"]) - 16)
                if is_too_long := num_tokens > context_length:
                    break
        if is_too_long:
            raise PromptTooLong(
                f"{name}: the prompt has {num_bytes} bytes, more than {self.name} can read within its context of "
                f"{context_length} tokens"
            )

    @cached_property
    def _max_token_bytes(self) -> int:
        return max(len(token.encode()) for token in self.tokenizer.get_vocab())

    def decode(self, ids: list[int]) -> str:
        """Return the text of a response. Of special tokens it holds only those that begin or end a thought."""
        return decode_with_thinking(self.tokenizer, ids, self._thinking[0].token_ids)

    @cached_property
    def _thinking(self) -> tuple[ThinkingFormat, bool]:
        return find_policy_thinking(self.tokenizer, self.prompt_options)

    @property
    def think_token_ids(self) -> frozenset[int]:
        """Return the special tokens that begin or end a thought."""
        return self._thinking[0].token_ids

    @cached_property
    def thought_closings(self) -> tuple[str, ...]:
        """Return the texts that close a thought, the one that the policy writes first. Empty: it does not think."""
        written = [text for text, tag in self._thinking[0].delimiters if tag == THINK_CLOSING]
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        tags = [text for text in tokens if is_think_tag(text) and normalize_think_tags(text) == THINK_CLOSING]
        return tuple(dict.fromkeys([*written, *tags]))

    def get_stop_strings(self, problem: Problem) -> tuple[str, ...]:
        """Return the strings that end a response to this problem, besides the stop tokens."""
        few_shot = uses_few_shot(self.tokenizer, problem, self.prompt_options)
        return (*problem.stop_strings, NEXT_QUESTION) if few_shot else problem.stop_strings

    def is_finished(self, ids: Sequence[int], stop_strings: tuple[str, ...] = ()) -> bool:
        """Return whether the last token ends the response: a stop token, or the token that completes a stop string.

        Earlier tokens are not checked, because generation would have ended there.
        """
        if not ids:
            return False
        return ids[-1] in self.stop_ids or bool(stop_strings and self._ends_with_stop_string(ids, stop_strings))

    def _ends_with_stop_string(self, ids: Sequence[int], stop_strings: tuple[str, ...]) -> bool:
        # The last token must write the last character of the string, or the last byte of that character. Most tokens
        # do not, so that the tail is rarely decoded.
        last_text = self._token_texts.get(ids[-1])
        if last_text is None:
            # Decoded after another token, because some tokenizers drop the space at the beginning of a text.
            before = self.decode(list(self._letter_ids))
            text = self.decode([*self._letter_ids, ids[-1]])
            last_text = text.removeprefix(before) if text.startswith(before) else self.decode([ids[-1]])
            self._token_texts[ids[-1]] = last_text
        if not any(string[-1] in last_text or not string[-1].isascii() for string in stop_strings):
            return False
        # Every token writes at least a byte, apart from special tokens, which are not part of the text.
        num_tokens = 1 + max(len(string.encode()) for string in stop_strings)
        tail: list[int] = []
        for token in reversed(ids):
            if token not in self._special_ids:
                tail.append(token)
            if len(tail) == num_tokens:
                break
        text = self.decode(tail[::-1])
        return any(string in text for string in stop_strings)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def _letter_ids(self) -> list[int]:
        return list(self.tokenizer("a", add_special_tokens=False)["input_ids"])

    @cached_property
    def _token_texts(self) -> dict[int, str]:
        return {}

    def decode_response(self, ids: list[int], stop_strings: tuple[str, ...] = ()) -> str:
        """Return the text of a response up to the first stop string, for grading.

        Thoughts stand between `<think>` and `</think>`, whatever tags the model writes. A response that begins inside
        a thought begins with `<think>`.
        """
        text = self.decode(ids)
        ends = [position for string in stop_strings if (position := text.find(string)) >= 0]
        thinking, is_opened = self._thinking
        return THINK_OPENING * is_opened + thinking.normalize(text[: min(ends)] if ends else text)

    @cached_property
    def tokenizer_hash(self) -> str:
        """Return the hash of the vocabulary. Cached, because every trace names it."""
        return hash_vocabulary(self.tokenizer)


def get_context_length(model: PreTrainedModel) -> int:
    """Return the longest sequence (tokens) that the model was made for, and that is read alike in every batch.

    It is `UNLIMITED_CONTEXT` where the config names no length, as positions have no table (ALiBi) or there are none
    (recurrent layers).
    """
    return read_context_length(model.config)


def read_context_length(config: PreTrainedConfig) -> int:
    """Return the same from the config of a model."""
    config = config.get_text_config()
    lengths = [getattr(config, name, None) for name in _CONTEXT_LENGTH_NAMES]
    longest = next((length for length in lengths if isinstance(length, int) and length > 0), UNLIMITED_CONTEXT)
    return min([longest, *_list_uniform_lengths(config)])


def _list_uniform_lengths(config: PreTrainedConfig) -> list[int]:
    """Return lengths beyond which what a token reads depends on the rest of its sequence or batch."""
    ropes = getattr(config, "rope_parameters", None) or {}
    # A longer sequence turns all of its keys by other angles (Phi-3, Phi-4-mini), those in a cache too.
    lengths = [
        rope["original_max_position_embeddings"]
        for rope in (ropes, *ropes.values())
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope"
    ]
    # These count places in the cache of a batch, which is at most twice as long as its longest sequence.
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4
        lengths.append(int(config.floor_scale) // 2)
    if isinstance(keys := getattr(config, "keep_window_size", None), int):  # Doge
        lengths.append(keys // 2)
    return [length for length in lengths if length]


def hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the map from ids to token strings."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hash_json(vocabulary, length=16)
