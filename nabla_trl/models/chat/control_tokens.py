"""Encode a chat so that only the template writes control tokens.

A tokenizer reads "<|im_end|>" in a question as the token that ends a turn, so that whoever writes the question could
write turns of others. Here a control token in a message stays text:

1. `TokenGuard.guard` puts a mark inside each control token in a message. No template writes this mark.
2. The template is rendered. What it writes by itself has no marks.
3. `TokenGuard.encode` gives each control token without a mark a secret name, removes the marks, and encodes the text
   with a copy of the tokenizer that knows these tokens by their secret names only.

So all other rules of the tokenizer hold, and a text without control tokens is encoded by the tokenizer itself.
"""

from __future__ import annotations

import json
import re
import secrets
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from nabla_trl.grading.notation import is_think_tag

# Noncharacters, which Unicode reserves for use inside programs.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDEF)]
_NAME_DELIMITER = "\ufdef"
_guards: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, TokenGuard] = weakref.WeakKeyDictionary()


def get_token_guard(tokenizer: PreTrainedTokenizerBase) -> TokenGuard:
    """Return the guard of a tokenizer, which is made anew if tokens were added or the template has changed."""
    guard = _guards.get(tokenizer)
    key = len(tokenizer), str(tokenizer.chat_template)
    if guard is None or guard.key != key:
        guard = _guards[tokenizer] = TokenGuard(weakref.ref(tokenizer), key, find_control_tokens(tokenizer))
    return guard


def get_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template for messages without tools, or None."""
    return None if tokenizer.chat_template is None else tokenizer.get_chat_template()


def find_control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens that must not come from a message, with their ids.

    These are the special tokens, and other added tokens that the chat template writes, such as <tool_call>. White
    space and single characters are ordinary text.
    """
    try:
        template = get_template(tokenizer) or ""
    except ValueError:  # several templates, and none for chats without tools
        template = ""
    tokens = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    tokens |= {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    return {
        token: index
        for token, index in tokens.items()
        if (token in special or token in template) and len(token) > 1 and not token.isspace()
    }


@dataclass
class TokenGuard:
    """Keeps control tokens out of texts.

    Attributes:
        tokenizer_ref: weak reference, because the guard belongs to the tokenizer.
        key: what the guard depends on.
        control_tokens: token strings and their ids.
        nonce: makes secret names that no text can hold.
    """

    tokenizer_ref: weakref.ref[PreTrainedTokenizerBase]
    key: tuple[int, str]
    control_tokens: Mapping[str, int]
    nonce: str = field(default_factory=lambda: secrets.token_hex(8))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _think_pattern(self) -> re.Pattern[str]:
        tags = sorted(filter(is_think_tag, self.control_tokens), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tags)) or "(?!)")

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        return frozenset(token[:end] for token in self.control_tokens for end in range(1, len(token)))

    @cached_property
    def _endings(self) -> frozenset[str]:
        return frozenset(token[start:] for token in self.control_tokens for start in range(1, len(token)))

    def choose_mark(self, value: Any) -> str:
        """Return a mark that does not occur in a JSON value.

        Raises:
            ValueError: all of them occur.
        """
        text = json.dumps(value, ensure_ascii=False, default=str)
        for mark in _MARKS:
            if mark not in text:
                return mark
        raise ValueError("the text holds all noncharacters from U+FDD0 to U+FDEE, which are no text")

    def guard(self, value: Any, mark: str) -> Any:
        """Return a JSON value with a mark inside every control token in its texts.

        A part of a control token at the beginning or end of a text gets a mark too. Otherwise a template could join
        it with the other part. Think tags in the content of an assistant's turn are left: templates look for them,
        to leave out the thoughts of earlier turns.
        """
        if isinstance(value, str):
            return self._guard_text(value, mark)
        if isinstance(value, Mapping):
            content = {self._guard_key(key, mark): self.guard(item, mark) for key, item in value.items()}
            if value.get("role") == "assistant" and isinstance(value.get("content"), str):
                parts = re.split(f"({self._think_pattern.pattern})", value["content"])
                guarded = [part if index % 2 else self._guard_text(part, mark) for index, part in enumerate(parts)]
                content["content"] = "".join(guarded)
            return content
        if isinstance(value, list | tuple):
            return [self.guard(item, mark) for item in value]
        return value

    def _guard_key(self, key: Any, mark: str) -> Any:
        """Return a key, which a template may write as JSON, with a mark if it holds a control token."""
        return self._guard_text(key, mark) if isinstance(key, str) and self._pattern.search(key) else key

    def _guard_text(self, text: str, mark: str) -> str:
        while self._pattern.search(text):  # again, for tokens that overlap
            text = self._pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        body = text.strip()
        if not body:
            return text
        start = text.index(body[0])
        sizes = range(1, 1 + max(map(len, self.control_tokens), default=0))
        before = mark if any(body[:size] in self._endings for size in sizes) else ""
        after = mark if any(body[-size:] in self._beginnings for size in sizes) else ""
        return text[:start] + before + body + after + text[start + len(body) :]

    def encode(self, text: str, mark: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of a text in which control tokens with a mark inside are ordinary text.

        Raises:
            ValueError: the tokenizer makes a control token of ordinary text.
        """
        tokenizer = self.tokenizer_ref()
        assert tokenizer is not None  # the caller holds it
        if mark not in text:
            ids = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
            num_added = tokenizer.num_special_tokens_to_add() if add_special_tokens else 0
            if self._count(ids) <= len(self._pattern.findall(text)) + num_added:
                return ids
            # The tokenizer reads another writing of a control token as that token, such as one in capitals.
        if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
            return self._encode_in_pieces(tokenizer, text, mark, add_special_tokens)
        counts = Counter(self._pattern.findall(text))
        unread: set[str] = set()

        def rename(match: re.Match[str]) -> str:
            return match[0] if match[0] in unread else self._get_secret_name(match[0])

        for _ in range(2):
            renamed = self._pattern.sub(rename, text).replace(mark, "")
            ids = list(self._renamed_tokenizer.encode(renamed, add_special_tokens=False).ids)
            # A token whose string is normalized, with a space before it, is not read everywhere. There it is text.
            unread = {token for token, count in counts.items() if ids.count(self.control_tokens[token]) < count}
            if not unread:
                break
        self._check_count(ids, counts.total())
        return list(self._renamed_tokenizer.encode(renamed).ids) if add_special_tokens else ids

    def _get_secret_name(self, token: str) -> str:
        return f"{_NAME_DELIMITER}{self.nonce}:{self.control_tokens[token]}{_NAME_DELIMITER}"

    @cached_property
    def _renamed_tokenizer(self) -> Tokenizer:
        """Return a copy of a fast tokenizer in which control tokens have secret names and the same ids."""
        tokenizer = self.tokenizer_ref()
        assert tokenizer is not None
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        names = {token: self._get_secret_name(token) for token in self.control_tokens}
        for entry in state["added_tokens"]:
            entry["content"] = names.get(entry["content"], entry["content"])
        _rename_in_model(state["model"], names, self.control_tokens)
        state |= {"truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(state))

    def _encode_in_pieces(
        self, tokenizer: PreTrainedTokenizerBase, text: str, mark: str, add_special_tokens: bool
    ) -> list[int]:
        """Encode with a tokenizer that has no fast form: in pieces, none of which holds a marked token as a whole."""
        break_ids = list(tokenizer.encode("\n", add_special_tokens=False))
        first, *others = text.split(mark)
        ids = list(tokenizer.encode(first, add_special_tokens=False))
        for piece in others:
            # After a line break, because SentencePiece puts a space before the beginning of a text.
            piece_ids = list(tokenizer.encode("\n" + piece, add_special_tokens=False))
            has_break = piece_ids[: len(break_ids)] == break_ids
            ids += piece_ids[len(break_ids) :] if has_break else tokenizer.encode(piece, add_special_tokens=False)
        self._check_count(ids, sum(len(self._pattern.findall(piece)) for piece in (first, *others)))
        return list(tokenizer.build_inputs_with_special_tokens(ids)) if add_special_tokens else ids

    def _check_count(self, ids: list[int], expected: int) -> None:
        """Refuse ids with more control tokens than the template wrote."""
        if self._count(ids) > expected:
            raise ValueError("the prompt writes a control token, and the tokenizer cannot read it as text")

    def _count(self, ids: list[int]) -> int:
        return sum(index in self._control_ids for index in ids)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """Return the ids of control tokens. A token for unknown characters is none, unless it also ends texts."""
        tokenizer = self.tokenizer_ref()
        assert tokenizer is not None
        is_only_unknown = tokenizer.unk_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return frozenset(self.control_tokens.values()) - ({tokenizer.unk_token_id} if is_only_unknown else set())


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str], ids: Mapping[str, int]) -> None:
    """Give control tokens their secret names in a tokenizer's vocabulary, so that no text is split into them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [token, score] by id
        model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
        known = {entry[0] for entry in model["vocab"]}
        for token, index in sorted(ids.items(), key=lambda item: item[1]):
            if names[token] not in known:
                fillers = range(len(model["vocab"]), index)
                model["vocab"] += [[f"{names[token]}filler{number}", 0.0] for number in fillers]
                model["vocab"].append([names[token], 0.0])
        return
    # Tokens that were added beside the vocabulary enter it, so that all ids stay as they are.
    model["vocab"] = {names.get(token, token): index for token, index in vocabulary.items()}
    model["vocab"] |= {names[token]: index for token, index in ids.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            merge
            for merge, pair in zip(model["merges"], pairs, strict=True)
            if not {*pair, "".join(pair)} & names.keys()
        ]
