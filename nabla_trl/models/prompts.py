"""Write a problem as a prompt: with the chat template, after worked examples, or as the plain question."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from nabla_trl.grading.extraction import has_open_think_block
from nabla_trl.models.chat.control_tokens import TokenGuard, get_template, get_token_guard
from nabla_trl.models.chat.thinking import ThinkingFormat, find_thinking_format
from nabla_trl.models.options import PromptOptions
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.templates import TemplateFailure, render_chat

# After examples, a model goes on with a question of its own. There its response ends.
NEXT_QUESTION = "\nQuestion:"


class PromptTooLong(ValueError):
    """A prompt that fills the context of a model, so that no token is left for a response."""


def check_prompt_options(options: PromptOptions, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse options that a model's chat template does not support, and would ignore."""
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
        return _encode_text(tokenizer, problem, format_few_shot(problem))
    if tokenizer.chat_template is None:
        text = "\n\n".join(message["content"] for message in problem.build_messages()) + "\n"
        return _encode_text(tokenizer, problem, text)
    return encode_chat(
        tokenizer, problem, problem.build_messages(), add_generation_prompt=True, **options.chat_template_kwargs
    )


def _encode_text(tokenizer: PreTrainedTokenizerBase, problem: Problem, text: str) -> list[int]:
    """Return the ids of a prompt without a template, all of which is text, with the tokenizer's own special tokens."""
    guard = get_token_guard(tokenizer)
    mark = guard.choose_mark(text)
    return _encode_guarded(guard, problem, guard.guard(text, mark), mark, add_special_tokens=True)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    problem: Problem,
    chat: list[dict[str, str]],
    *,
    add_generation_prompt: bool,
    **template_kwargs: Any,
) -> list[int]:
    """Return the ids of a chat. Control tokens in its messages stay text, so that nobody can forge a turn.

    Args:
        template_kwargs: the template's own keywords, such as enable_thinking.

    Raises:
        ValueError: the template refuses the chat, or the tokenizer makes a control token of ordinary text.
    """
    guard = get_token_guard(tokenizer)
    mark = guard.choose_mark([chat, template_kwargs])
    text = render_chat_template(
        tokenizer,
        problem,
        guard.guard(chat, mark),
        add_generation_prompt=add_generation_prompt,
        **guard.guard(template_kwargs, mark),
    )
    # The template writes its own special tokens: letting the tokenizer add them again would double the BOS.
    return _encode_guarded(guard, problem, text, mark, add_special_tokens=False)


def _encode_guarded(
    guard: TokenGuard, problem: Problem, text: str, mark: str, *, add_special_tokens: bool
) -> list[int]:
    try:
        return guard.encode(text, mark, add_special_tokens=add_special_tokens)
    except ValueError as error:
        raise ValueError(f"{problem.id}: {error}") from error
    except TypeError as error:  # the tokenizer takes no half of a surrogate pair
        raise ValueError(f"{problem.id}: the prompt is not Unicode text: {error}") from error


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
    template = str(get_template(tokenizer))
    special_tokens = {name: _to_plain(token) for name, token in tokenizer.special_tokens_map.items()}
    variables = {**special_tokens, "tools": None, "documents": None, **template_kwargs}
    try:
        if _reads_parts(template):
            chat = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in chat]  # type: ignore[dict-item]
        return render_chat(template, {**variables, "messages": chat, "add_generation_prompt": add_generation_prompt})
    except TemplateFailure as error:
        raise ValueError(f"{problem.id}: the chat template refuses the messages: {error}") from error


def _to_plain(token: Any) -> Any:
    return list(map(str, token)) if isinstance(token, list | tuple) else str(token)


@lru_cache
def _reads_parts(template: str) -> bool:
    """Return whether a template takes lists of text parts, as those of vision-language models do, and no text."""
    text, parts = ("\x02content\x03", [{"type": "text", "text": "\x02content\x03"}])
    written = []
    for content in (text, parts):
        chat = {"messages": [{"role": "user", "content": content}], "add_generation_prompt": True}
        try:
            written.append(text in render_chat(template, {**chat, "bos_token": "", "eos_token": ""}))
        except TemplateFailure:
            written.append(False)
    return written == [False, True]


def find_policy_thinking(tokenizer: PreTrainedTokenizerBase, options: PromptOptions) -> tuple[ThinkingFormat, bool]:
    """Return how a policy writes thoughts, and whether its responses begin inside one, which the prompt opened."""
    if tokenizer.chat_template is None or options.style == "few_shot":
        return find_thinking_format(tokenizer, None), False
    probe = Problem(id="probe", question="\x02question\x03")

    def render(chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return render_chat_template(
            tokenizer, probe, chat, add_generation_prompt=add_generation_prompt, **options.chat_template_kwargs
        )

    thinking = find_thinking_format(tokenizer, render)
    try:
        text = render(probe.build_messages(), True)
    except ValueError:  # the error is raised where a problem is encoded
        return thinking, False
    # A system prompt may explain the tags. Only what follows the question is the beginning of the response.
    return thinking, has_open_think_block(thinking.normalize(text.rpartition(probe.question)[2]))


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
