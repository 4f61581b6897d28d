"""Encode prompts for a reward model, and find the tokens with which its chat template closes a response."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nabla_trl.models.chat.control_tokens import get_token_guard
from nabla_trl.models.prompts import check_prompt, render_chat_template
from nabla_trl.tasks.problem import Problem

MAX_ENCODED_PROMPTS = 4096
_RESPONSE_SENTINEL = "\x02response\x03"


def make_mapped_prompt_encoder(vocab_map: Tensor, name: str) -> Callable[[Problem, list[int]], list[int]]:
    """Return an encoder that maps the policy's prompt ids to a reward's ids.

    Args:
        vocab_map: [policy rows] the reward's id of each policy token, −1 where it has none.
        name: of the reward, for error messages.
    """
    reward_ids = vocab_map.tolist()

    def encode(problem: Problem, prompt_ids: list[int]) -> list[int]:
        ids = [reward_ids[index] for index in prompt_ids]
        if min(ids) < 0:
            missing = prompt_ids[ids.index(min(ids))]
            raise ValueError(f"{problem.id}: {name} has no token for policy id {missing} of the prompt")
        return ids

    return encode


def make_template_prompt_encoder(
    tokenizer: PreTrainedTokenizerBase, vocab_map: Tensor, name: str, context_length: int
) -> Callable[[Problem, list[int]], list[int]]:
    """Return an encoder that uses the reward's own chat template, or maps the policy's prompt where it has none.

    Args:
        tokenizer: the reward's.
        vocab_map, name: as for `make_mapped_prompt_encoder`.
        context_length: most tokens that the reward can read.
    """
    if tokenizer.chat_template is None:
        return make_mapped_prompt_encoder(vocab_map, name)
    encoded: dict[str, list[int]] = {}

    def encode(problem: Problem, prompt_ids: list[int]) -> list[int]:
        key = repr(problem.build_messages())
        ids = encoded.get(key)
        if ids is None:
            opened = _encode_opened_turn(tokenizer, problem)
            ids = check_prompt(opened, problem, tokenizer, name=name, context_length=context_length)
            if len(encoded) >= MAX_ENCODED_PROMPTS:  # a server would keep every prompt that it ever got
                encoded.clear()
            encoded[key] = ids
        return ids

    return encode


def _encode_opened_turn(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    """Return the ids of the chat up to the beginning of the assistant's response, as a complete turn has them.

    The generation prompt is no guide: many templates open a complete turn in another way (an empty think block), and
    those of many reward models have none.
    """
    guard = get_token_guard(tokenizer)
    mark = guard.choose_mark(problem.build_messages())
    opening, _ = _split_around_response(tokenizer, problem, guard.guard(problem.build_messages(), mark))
    try:
        return guard.encode(opening, mark)
    except ValueError as error:
        raise ValueError(f"{problem.id}: {error}") from error


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
