"""How a reward model reads a prompt, and how its chat template closes a response."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nabla_trl.models.prompts import check_prompt, render_chat_template, tokenize_prompt
from nabla_trl.tasks.problem import Problem

_RESPONSE_SENTINEL = "\x02response\x03"


def make_mapped_prompt_encoder(vocab_map: Tensor, name: str) -> Callable[[Problem, list[int]], list[int]]:
    """The policy's prompt ids as a reward's own; `name` is the reward's."""
    table = vocab_map.tolist()

    def encode(problem: Problem, prompt: list[int]) -> list[int]:
        ids = [table[index] for index in prompt]
        if min(ids) < 0:
            raise ValueError(
                f"{problem.id}: {name} has no token for policy id {prompt[ids.index(min(ids))]} of the prompt"
            )
        return ids

    return encode


def make_template_prompt_encoder(
    tokenizer: PreTrainedTokenizerBase, vocab_map: Tensor, name: str, context_length: int
) -> Callable[[Problem, list[int]], list[int]]:
    """The reward's own chat template; the policy's prompt, mapped, where it has none."""
    if tokenizer.chat_template is None:
        return make_mapped_prompt_encoder(vocab_map, name)
    seen: dict[str, list[int]] = {}

    def encode(problem: Problem, prompt: list[int]) -> list[int]:
        key = repr(problem.build_messages())
        if key not in seen:
            ids = _encode_opened_turn(tokenizer, problem)
            seen[key] = check_prompt(ids, problem, tokenizer, name=name, context_length=context_length)
        return seen[key]

    return encode


def _encode_opened_turn(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    """The chat up to where the assistant begins to speak."""
    if render_chat_template(
        tokenizer, problem, problem.build_messages(), add_generation_prompt=True
    ) != render_chat_template(tokenizer, problem, problem.build_messages(), add_generation_prompt=False):
        return tokenize_prompt(tokenizer, problem)
    # Templates of many reward models have no generation prompt: what opens the turn shows only in a whole turn.
    opening, _ = _split_around_response(tokenizer, problem)
    return list(tokenizer(opening, add_special_tokens=False)["input_ids"])


def get_turn_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the reward's template writes after an assistant's words."""
    if tokenizer.chat_template is None:
        return []
    _, closing = _split_around_response(tokenizer, Problem(id="probe", question="x"))
    return list(tokenizer(closing, add_special_tokens=False)["input_ids"])


def _split_around_response(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> tuple[str, str]:
    """What the template writes before and after the assistant's words."""
    turns = [*problem.build_messages(), {"role": "assistant", "content": _RESPONSE_SENTINEL}]
    parts = render_chat_template(tokenizer, problem, turns, add_generation_prompt=False).split(_RESPONSE_SENTINEL)
    if len(parts) != 2:
        raise ValueError("the reward's chat template does not show the assistant's words once, unchanged")
    return parts[0], parts[1]
