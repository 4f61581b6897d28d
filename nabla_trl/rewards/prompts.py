"""How a reward model reads a prompt, and how its chat template closes a response."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nabla_trl.models.prompts import check_prompt, prompt_ids, render
from nabla_trl.tasks.problem import Problem

_SENTINEL = "\x02response\x03"


def mapped_prompt(mapping: Tensor, name: str) -> Callable[[Problem, list[int]], list[int]]:
    """The policy's prompt ids as a reward's own; `name` is the reward's."""
    table = mapping.tolist()

    def encode(problem: Problem, prompt: list[int]) -> list[int]:
        ids = [table[index] for index in prompt]
        if min(ids) < 0:
            raise ValueError(
                f"{problem.id}: {name} has no token for policy id {prompt[ids.index(min(ids))]} of the prompt"
            )
        return ids

    return encode


def template_prompt(
    tokenizer: PreTrainedTokenizerBase, mapping: Tensor, name: str, context: int
) -> Callable[[Problem, list[int]], list[int]]:
    """The reward's own chat template; the policy's prompt, mapped, where it has none."""
    if tokenizer.chat_template is None:
        return mapped_prompt(mapping, name)
    seen: dict[str, list[int]] = {}

    def encode(problem: Problem, prompt: list[int]) -> list[int]:
        key = repr(problem.chat())
        if key not in seen:
            ids = _opened_turn(tokenizer, problem)
            seen[key] = check_prompt(ids, problem, tokenizer, name=name, context=context)
        return seen[key]

    return encode


def _opened_turn(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    """The chat up to where the assistant begins to speak."""
    if render(tokenizer, problem, problem.chat(), add_generation_prompt=True) != render(
        tokenizer, problem, problem.chat(), add_generation_prompt=False
    ):
        return prompt_ids(tokenizer, problem)
    # Templates of many reward models have no generation prompt: what opens the turn shows only in a whole turn.
    opening, _ = _around_response(tokenizer, problem)
    return list(tokenizer(opening, add_special_tokens=False)["input_ids"])


def template_tail(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the reward's template writes after an assistant's words."""
    if tokenizer.chat_template is None:
        return []
    _, closing = _around_response(tokenizer, Problem(id="probe", question="x"))
    return list(tokenizer(closing, add_special_tokens=False)["input_ids"])


def _around_response(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> tuple[str, str]:
    """What the template writes before and after the assistant's words."""
    turns = [*problem.chat(), {"role": "assistant", "content": _SENTINEL}]
    parts = render(tokenizer, problem, turns, add_generation_prompt=False).split(_SENTINEL)
    if len(parts) != 2:
        raise ValueError("the reward's chat template does not show the assistant's words once, unchanged")
    return parts[0], parts[1]
