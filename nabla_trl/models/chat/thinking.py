"""Find the tokens and texts with which a model begins and ends a thought, from its tokenizer and chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from nabla_trl.grading.notation import THINK_CLOSING, THINK_OPENING, is_think_tag, normalize_think_tags

_THOUGHT, _ANSWER = "\x02thought\x03", "\x02answer\x03"
_CHANNEL_TOKEN = re.compile(r"<\|?channel\|?>|<\|message\|>|<\|constrain\|>")
# Writes a chat as text: the messages, and whether to add the generation prompt.
Render = Callable[[list[dict[str, str]], bool], str]


@dataclass(frozen=True)
class ThinkingFormat:
    """How a model writes thoughts.

    Attributes:
        token_ids: special tokens that begin or end a thought. A decoded response keeps them.
        dropped_token_texts: of these, the texts that mean nothing beside a thought, such as `<|message|>`.
        delimiters: texts that open a thought, close it, and open an answer without a thought, beyond those that
            `normalize_think_tags` knows. The template shows them.
    """

    token_ids: frozenset[int]
    dropped_token_texts: tuple[str, ...]
    delimiters: tuple[tuple[str, str], ...] = ()

    def normalize(self, text: str) -> str:
        """Return a decoded response with `<think>` and `</think>` around its thoughts."""
        for delimiter, tag in self.delimiters:
            text = text.replace(delimiter, tag)
        text = normalize_think_tags(text)
        for token in self.dropped_token_texts:
            text = text.replace(token, "")
        return text


def find_thinking_format(tokenizer: PreTrainedTokenizerBase, render: Render | None) -> ThinkingFormat:
    """Return how a model writes thoughts.

    Args:
        render: writes chats with the model's template. None: there is no template.
    """
    delimiters = [] if render is None else _find_delimiters(render)
    written = "\0".join(delimiter for delimiter, _ in delimiters)
    special = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    tags = {text for text in special if is_think_tag(text)}
    others = {text for text in special if _CHANNEL_TOKEN.fullmatch(text) or (text and text in written)} - tags
    return ThinkingFormat(
        frozenset(special[text] for text in tags | others),
        tuple(sorted(others, key=len, reverse=True)),
        tuple((text, tag) for text, tag in delimiters if tag or normalize_think_tags(text) == text),
    )


def _find_delimiters(render: Render) -> list[tuple[str, str]]:
    """Return (text, tag) pairs, longest text first, from what a template writes around a thought and an answer.

    The tag is `<think>` or `</think>`, and empty for what opens an answer without a thought.
    """
    question = {"role": "user", "content": "x"}
    answer = {"role": "assistant", "content": _ANSWER}
    thought = dict.fromkeys(("reasoning_content", "thinking", "reasoning"), _THOUGHT)
    try:
        prompt, plain, whole = render([question], True), render([question, answer], False), ""
        whole = render([question, {**answer, **thought}], False)
    except ValueError:  # the template knows no such turns
        return []
    pairs = []
    if whole.startswith(prompt) and whole.count(_THOUGHT) == whole.count(_ANSWER) == 1:
        opening, _, rest = whole[len(prompt) :].partition(_THOUGHT)
        closing = rest.partition(_ANSWER)[0]
        if opening.strip() and closing.strip() and normalize_think_tags(opening).strip() != THINK_OPENING:
            pairs += [(opening.strip(), THINK_OPENING), (closing.strip(), THINK_CLOSING)]
        elif _CHANNEL_TOKEN.search(closing):
            pairs.append((closing.strip(), THINK_CLOSING))
    if pairs and plain.startswith(prompt) and plain.count(_ANSWER) == 1:
        pairs.append((plain[len(prompt) :].partition(_ANSWER)[0].strip(), ""))
    return sorted((pair for pair in pairs if pair[0]), key=lambda pair: -len(pair[0]))


def decode_with_thinking(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], kept: frozenset[int]) -> str:
    """Return the text of a response without special tokens other than those in `kept`."""
    if kept.isdisjoint(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    hidden = (special | set(tokenizer.all_special_ids)) - kept
    return tokenizer.decode([index for index in ids if index not in hidden], skip_special_tokens=False)
