"""Texts of token ids: what a revision changed, in plain text and as HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any, Protocol

from nabla_trl.utils.files import read_json_file
from nabla_trl.utils.formatting import make_printable

Decode = Callable[[list[int]], str]  # token ids to text without special tokens

TOKENS_FILE = "tokens.json"  # texts of all tokens, beside the shards of a folder


class Branch(Protocol):
    """A proposal: a response up to `position`, and from there on `suffix`, which begins with `new_token`."""

    @property
    def position(self) -> int: ...
    @property
    def new_token(self) -> int: ...
    @property
    def suffix(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class TextChange:
    """The text that a revision changed: prefix + old_token + … became prefix + new_token + suffix.

    `old_token` or `new_token` is empty if the token is special, such as an end token. The parts are cut from decoded
    prefixes, because the text of a token depends on the tokens before it. If the new token is only the beginning of a
    character, `new_token` is the complete character.
    """

    prefix: str
    old_token: str
    new_token: str
    suffix: str

    def format_marked(self, names: tuple[str, str], max_context: int | None = None) -> str:
        """Return the changed response as text, with the change as [-old-]{+new+}.

        Args:
            names: what stands for the old and for the new token if it has no text.
            max_context: characters that are shown at most before and after the change. None: all.
        """
        before, after = cut_context(self.prefix, self.suffix, max_context)
        old, new = format_token(self.old_token, names[0]), format_token(self.new_token, names[1])
        return f"{make_printable(before)}[-{old}-]{{+{new}+}}{make_printable(after)}"

    def format_html(self, names: tuple[str, str]) -> str:
        """Return the changed response as HTML with inline styles. All texts are escaped."""
        old, new = escape(format_token(self.old_token, names[0])), escape(format_token(self.new_token, names[1]))
        prefix, suffix = escape(make_printable(self.prefix)), escape(make_printable(self.suffix))
        return (
            f'{prefix}<del style="background:#f8514955">{old}</del>'
            f'<ins style="background:#3fb95055;text-decoration:none"><b>{new}</b></ins>'
            f'<span style="background:#3fb95022">{suffix}</span>'
        )


def compute_text_change(revision: Branch, base_ids: list[int], decode: Decode) -> TextChange:
    """Return the text that a revision changed.

    Args:
        base_ids: ids of the response that the revision changes.
    """
    prefix_ids, position = base_ids[: revision.position], revision.position
    before, with_old = decode(prefix_ids), decode(base_ids[: position + 1])
    with_new, proposal = decode([*prefix_ids, revision.new_token]), decode([*prefix_ids, *revision.suffix])
    start = _common_prefix_length(before, with_old, with_new, proposal)
    end = _common_prefix_length(with_new, proposal)
    if end == start and decode([revision.new_token]):
        end += 1
    return TextChange(before[:start], with_old[start:], proposal[start:end], proposal[end:])


def _common_prefix_length(*texts: str) -> int:
    ends = (index for index, column in enumerate(zip(*texts, strict=False)) if len(set(column)) > 1)
    return next(ends, min(map(len, texts)))


def name_special_tokens(revision: Branch, base_ids: Sequence[int]) -> tuple[str, str]:
    """Return what stands for the old and for the new token of a revision if they have no text."""
    is_last = revision.position == len(base_ids) - 1, len(revision.suffix) == 1
    old, new = ("⟨end⟩" if last else "⟨special⟩" for last in is_last)
    return old, new


def format_token(text: str, name: str) -> str:
    """Return a visible form of a token: signs for spaces and line breaks.

    Args:
        name: what stands for a token without text.
    """
    if not text:
        return name
    return text.replace("\n", "⏎").replace(" ", "␣").replace("\t", "⇥") if text.isspace() else make_printable(text)


def cut_context(before: str, after: str, max_context: int | None) -> tuple[str, str]:
    """Return two texts, each with at most `max_context` characters beside the place between them."""
    if max_context is not None and len(before) > max_context:
        before = f"… {before[-max_context:]}"
    if max_context is not None and len(after) > max_context:
        after = f"{after[:max_context]} …"
    return before, after


class TextDecoder:
    """Turns token ids of a trace into text. It is not copied with a trace, and not pickled.

    Args:
        decode: token ids to text without special tokens.
        tokenizer: the policy's, if it is at hand.
    """

    def __init__(self, decode: Decode, tokenizer: Any = None):
        self.decode, self.tokenizer = decode, tokenizer

    def __call__(self, ids: Sequence[int]) -> str:
        return self.decode(list(ids))

    def __deepcopy__(self, memo: dict[int, Any]) -> TextDecoder:
        return self  # it holds a tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_decoder, ()


def _no_decoder() -> None:
    return None


@dataclass(frozen=True)
class TokenTable:
    """Texts of tokens by id, as `nabla_trl.search.batches` writes them beside traces. Empty: not known."""

    tokenizer_hash: str = ""
    special_ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> TokenTable:
        """Read the table of a folder of traces. Empty if there is none.

        Raises:
            ValueError: The table is damaged.
        """
        path = folder / TOKENS_FILE
        if not path.exists():
            return cls()
        try:
            table = read_json_file(path)
            texts = tuple(table["tokens"])
            if not isinstance(table["tokenizer"], str) or not all(isinstance(text, str) for text in texts):
                raise ValueError("its values are no texts")
            return cls(table["tokenizer"], frozenset(table["special"]), texts)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not a table of tokens ({error}): delete the file and generate traces again"
            ) from error

    def matches(self, trace: Any) -> bool:
        """Return whether the texts belong to the trace's tokenizer."""
        return bool(self.texts) and trace.meta.get("tokenizer_hash", self.tokenizer_hash) == self.tokenizer_hash

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of tokens, without special tokens and ids that have no text."""
        return "".join(self.texts[i] for i in ids if i not in self.special_ids and 0 <= i < len(self.texts))


def write_token_numbers(ids: Sequence[int]) -> str:
    """Return token ids as text where no text of them is known, such as ⟨17⟩."""
    return "".join(f"⟨{token}⟩" for token in ids)


def make_folder_decoder(folder: Path, tokenizer_hash: str | None) -> TextDecoder | None:
    """Return a decoder by the table of tokens in a folder of traces, read when needed. None: there is no table.

    It writes numbers if the table is damaged or belongs to another tokenizer.

    Args:
        tokenizer_hash: of the trace. None: not known.
    """
    path = folder / TOKENS_FILE
    if not path.exists():
        return None

    def decode(ids: list[int]) -> str:
        try:
            table = _read_table(folder, path.stat().st_mtime_ns)
        except (ValueError, OSError):
            table = TokenTable()
        is_known = bool(table.texts) and tokenizer_hash in (None, table.tokenizer_hash)
        return table.decode(ids) if is_known else write_token_numbers(ids)

    return TextDecoder(decode)


@lru_cache(maxsize=4)
def _read_table(folder: Path, modified_at: int) -> TokenTable:
    return TokenTable.read(folder)
