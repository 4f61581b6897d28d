"""Encode prompts for a reward model, and find the tokens with which its chat template closes a response."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nabla_trl.gradient.score import TurnPromptEncoder
from nabla_trl.models.chat.control_tokens import get_template, get_token_guard
from nabla_trl.models.prompts import check_prompt, render_chat_template
from nabla_trl.tasks.problem import Problem

MAX_ENCODED_PROMPTS = 4096
_RESPONSE_SENTINEL = "\x02response\x03"
_THINK_TAG = re.compile(r"(</?think>)")


@dataclass(frozen=True)
class MappedPromptEncoder:
    """Maps the policy's prompt ids to a reward's ids.

    Attributes:
        reward_ids: the reward's id of each policy token, −1 where it has none.
        name: of the reward, for error messages.
    """

    reward_ids: list[int]
    name: str

    def __call__(self, problem: Problem, prompt_ids: list[int]) -> list[int]:
        """Return the reward's ids of a prompt.

        Raises:
            ValueError: the reward has no token for one of the prompt.
        """
        ids = [self.reward_ids[index] for index in prompt_ids]
        if min(ids) < 0:
            missing = prompt_ids[ids.index(min(ids))]
            raise ValueError(f"{problem.id}: {self.name} has no token for policy id {missing} of the prompt")
        return ids


@dataclass
class TurnEncoder(TurnPromptEncoder):
    """Encodes what stands before a response in the complete turn that a reward's own chat template writes.

    The generation prompt is no guide: many templates open a complete turn in another way (an empty think block), and
    those of many reward models have none. Some templates open a turn with a thought in another way than a turn
    without one. So the opening depends on where the think tags of a response stand, and on nothing else of it.

    Attributes:
        tokenizer: the reward's.
        name: of the reward, for error messages.
        context_length: most tokens that the reward can read.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    context_length: int
    _prompts: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    _skeletons: dict[tuple[int, ...], str] = field(default_factory=dict)

    def __call__(self, problem: Problem, prompt_ids: list[int]) -> list[int]:
        """Return the ids before a response without a thought."""
        return self._encode(problem, _RESPONSE_SENTINEL)

    def encode_for_response(self, problem: Problem, response_ids: Sequence[int]) -> list[int]:
        """Return the ids before a response."""
        return self._encode(problem, self._get_skeleton(response_ids))

    def _encode(self, problem: Problem, skeleton: str) -> list[int]:
        key = repr(problem.build_messages()), skeleton
        if key not in self._prompts:
            ids = _encode_opened_turn(self.tokenizer, problem, skeleton)
            ids = check_prompt(ids, problem, self.tokenizer, name=self.name, context_length=self.context_length)
            if len(self._prompts) >= MAX_ENCODED_PROMPTS:  # a server would keep every prompt that it ever got
                self._prompts.clear()
            self._prompts[key] = ids
        return self._prompts[key]

    def _get_skeleton(self, response_ids: Sequence[int]) -> str:
        """Return the response's text with a sentinel in place of all but its think tags and the space around them."""
        if "think>" not in str(get_template(self.tokenizer)):
            return _RESPONSE_SENTINEL
        key = tuple(response_ids)
        if key not in self._skeletons:
            if len(self._skeletons) >= MAX_ENCODED_PROMPTS:
                self._skeletons.clear()
            text = self.tokenizer.decode([index for index in response_ids if index >= 0])
            self._skeletons[key] = _build_skeleton(text)
        return self._skeletons[key]


def _build_skeleton(text: str) -> str:
    if not _THINK_TAG.search(text):
        return _RESPONSE_SENTINEL
    parts = _THINK_TAG.split(text)  # text, tag, text, …
    for index, part in enumerate(parts):
        if body := part.strip() if index % 2 == 0 else "":
            start = part.index(body)
            parts[index] = part[:start] + _RESPONSE_SENTINEL + part[start + len(body) :]
    return "".join(parts)


def make_template_prompt_encoder(
    tokenizer: PreTrainedTokenizerBase, vocab_map: Tensor, name: str, context_length: int
) -> Callable[[Problem, list[int]], list[int]]:
    """Return an encoder that uses the reward's own chat template, or maps the policy's prompt where it has none.

    Args:
        tokenizer: the reward's.
        vocab_map: [policy rows] the reward's id of each policy token, −1 where it has none.
        name: of the reward, for error messages.
        context_length: most tokens that the reward can read.
    """
    if tokenizer.chat_template is None:
        return MappedPromptEncoder(vocab_map.tolist(), name)
    return TurnEncoder(tokenizer, name, context_length)


def _encode_opened_turn(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, skeleton: str = _RESPONSE_SENTINEL
) -> list[int]:
    """Return the ids of the chat up to the beginning of the assistant's response, as a complete turn has them."""
    guard = get_token_guard(tokenizer)
    mark = guard.choose_mark(problem.build_messages())
    opening = _find_opening(tokenizer, problem, guard.guard(problem.build_messages(), mark), skeleton)
    try:
        return guard.encode(opening, mark)
    except ValueError as error:
        raise ValueError(f"{problem.id}: {error}") from error


def _find_opening(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, messages: list[dict[str, str]], skeleton: str
) -> str:
    """Return what the template writes before a response with this skeleton."""
    if skeleton != _RESPONSE_SENTINEL:
        begun, has_text, _ = skeleton.partition(_RESPONSE_SENTINEL)
        turns = [*messages, {"role": "assistant", "content": skeleton}]
        text, is_written, _ = render_chat_template(tokenizer, problem, turns, add_generation_prompt=False).partition(
            _RESPONSE_SENTINEL
        )
        if has_text and is_written and text.endswith(begun):
            return text.removesuffix(begun)
        # The template writes other white space around the tags with which the response begins.
        own = re.search(r"\s*".join(map(re.escape, re.findall(r"\S+", begun))) + r"\s*$", text)
        if has_text and is_written and own:
            return text[: own.start()]
    # Without a thought, or with one that the template drops: the response is read after the usual opening.
    return _split_around_response(tokenizer, problem, messages)[0]


def get_turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the reward's chat template writes after an assistant's response."""
    if tokenizer.chat_template is None:
        return []
    problem = Problem(id="test-input", question="x")
    _, closing = _split_around_response(tokenizer, problem, problem.build_messages())
    return list(tokenizer(closing, add_special_tokens=False)["input_ids"])


def _split_around_response(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, messages: list[dict[str, str]]
) -> tuple[str, str]:
    """Return what the template writes before and after the assistant's response."""
    turns = [*messages, {"role": "assistant", "content": _RESPONSE_SENTINEL}]
    parts = render_chat_template(tokenizer, problem, turns, add_generation_prompt=False).split(_RESPONSE_SENTINEL)
    if len(parts) != 2:
        raise ValueError("the reward's chat template does not write the assistant's response once, unchanged")
    return parts[0], parts[1]
