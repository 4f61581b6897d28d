"""Write a problem as a prompt: with the chat template, after worked examples, or as the plain question."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from nabla_trl.grading.extraction import has_open_think_block
from nabla_trl.models.options import PromptOptions
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.formatting import format_error

# After examples, a model goes on with a question of its own. There its response ends.
NEXT_QUESTION = "\nQuestion:"


class PromptTooLong(ValueError):
    """A prompt that fills the context of a model, so that no token is left for a response."""


def check_prompt_options(options: PromptOptions, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse options that a model's chat template does not support, and would ignore.

    Raises:
        ValueError: there is no template, or a keyword does not occur in it.
    """
    template = tokenizer.chat_template
    if template is None and (options.style == "chat" or options.chat_template_kwargs):
        option = "prompt_style chat" if options.style == "chat" else "chat_template_kwargs"
        raise ValueError(f"{name} has no chat template, which {option} needs")
    for key in options.chat_template_kwargs:
        if not re.search(rf"\b{re.escape(key)}\b", str(template)):
            raise ValueError(f"chat_template_kwargs: the chat template of {name} has no {key!r}")


def uses_few_shot(tokenizer: PreTrainedTokenizerBase, problem: Problem, options: PromptOptions) -> bool:
    """Return whether the prompt has worked examples: on request, or because there is no chat template."""
    if options.style == "auto":
        return tokenizer.chat_template is None and bool(problem.few_shot_examples)
    return options.style == "few_shot"


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, problem: Problem, options: PromptOptions | None = None
) -> list[int]:
    """Return the prompt ids of a problem.

    Worked examples are written as in lm-eval, "Question: …" and "Answer: …" with blank lines between, and without the
    instruction, because they show what it says. Without a template and examples the prompt is the question.

    Raises:
        ValueError: examples are requested and there are none, or the template refuses the chat.
    """
    options = PromptOptions() if options is None else options
    if uses_few_shot(tokenizer, problem, options):
        return list(tokenizer(format_few_shot(problem))["input_ids"])
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"] for message in problem.build_messages()) + "\n"
        return list(tokenizer(text)["input_ids"])
    text = render_chat_template(
        tokenizer, problem, problem.build_messages(), add_generation_prompt=True, **options.chat_template_kwargs
    )
    # The template writes its own special tokens: letting the tokenizer add them again would double the BOS.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def format_few_shot(problem: Problem) -> str:
    """Return the worked examples and the question as text.

    Raises:
        ValueError: there are no examples.
    """
    if not problem.few_shot_examples:
        raise ValueError(
            f"{problem.id}: prompt_style few_shot needs worked examples, and task {problem.task} has none"
        )
    blocks = [f"Question: {question}\nAnswer: {answer}" for question, answer in problem.few_shot_examples]
    return "\n\n".join([*blocks, f"Question: {problem.question}\nAnswer:"])


def render_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    chat: list[dict[str, str]],
    *,
    add_generation_prompt: bool,
    **template_kwargs: Any,
) -> str:
    """Return the text that the chat template writes.

    Args:
        template_kwargs: the template's own keywords, such as enable_thinking.

    Raises:
        ValueError: the template refuses the chat (a role it does not know, turns that do not alternate).
    """
    try:
        return tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
        )
    except TemplateError as error:
        raise ValueError(f"{problem.id}: the chat template refuses the messages: {format_error(error)}") from error


def opens_thinking(tokenizer: PreTrainedTokenizerBase, options: PromptOptions) -> bool:
    """Return whether the chat template's generation prompt ends inside a think block, where a response then begins."""
    if tokenizer.chat_template is None or options.style == "few_shot":
        return False
    probe = Problem(id="probe", question="x")
    try:
        text = render_chat_template(
            tokenizer, probe, probe.build_messages(), add_generation_prompt=True, **options.chat_template_kwargs
        )
    except ValueError:  # the error is raised where a problem is encoded
        return False
    return has_open_think_block(text)


def check_prompt(
    ids: list[int], problem: Problem, tokenizer: PreTrainedTokenizerBase, *, name: str, context_length: int
) -> list[int]:
    """Return the prompt ids, unless they are refused.

    Raises:
        PromptTooLong: the prompt fills the context.
        ValueError: the prompt is empty, or has characters that the tokenizer does not know.
    """
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        unknown = None  # byte-level tokenizers know all characters, and name another special token here
    if not ids:
        raise ValueError(f"{problem.id}: the prompt is empty, it has no tokens")
    if unknown is not None and unknown in ids:
        raise ValueError(f"{problem.id}: {name}'s tokenizer does not know some characters of the prompt")
    if len(ids) >= context_length:
        raise PromptTooLong(f"{problem.id}: the prompt has {len(ids)} tokens, the context of {name} {context_length}")
    return ids
