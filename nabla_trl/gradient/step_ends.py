"""Where the reasoning steps of a response end: at the tokens that complete a delimiter. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLANK_LINE = "\n\n"
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|.?)", re.DOTALL)
_ESCAPED_CHARACTERS = {"n": "\n", "t": "\t", "\\": "\\"}


def parse_delimiter(text: str) -> str:
    r"""Return the delimiter that is written with escapes: \n, \t, \\ and \xHH (\x3a for a colon, \x2c for a comma).

    Raises:
        ValueError: an empty text, an unknown escape, or a line break that is not escaped (specs are one line).
    """
    if not text.isprintable():
        raise ValueError(rf"step_delimiter must be written with escapes (\n, \t, \xHH), not as {text!r}")
    delimiter = _ESCAPE.sub(_decode_escape, text)
    check_delimiter(delimiter)
    return delimiter


def check_delimiter(value: object) -> None:
    """Refuse anything but a text of at least one character."""
    if not (isinstance(value, str) and value):
        raise ValueError(f"step_delimiter must be a text of at least one character, not {value!r}")


def _decode_escape(match: re.Match[str]) -> str:
    code = match[1]
    if len(code) == 3:
        return chr(int(code[1:], 16))
    if code not in _ESCAPED_CHARACTERS:
        raise ValueError(rf"step_delimiter knows the escapes \n, \t, \\ and \xHH, not {match[0]!r}")
    return _ESCAPED_CHARACTERS[code]


class StepFinder:
    r"""Finds the tokens that end a step in the ids of a response.

    A step ends at the token that completes the delimiter, which may be spread over several tokens or stand inside one.
    Delimiters are counted from the left and do not overlap ("\n\n\n" holds one). A token that completes two ends one
    step. A token writes what people read of it: a special token writes nothing, unless it is the delimiter itself.
    Texts are looked up token by token, so a character that is split between two tokens is not seen.

    Whether a token ends a step depends on that token and the ones before it, and on nothing else.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, delimiter: str):
        check_delimiter(delimiter)
        self.tokenizer, self.delimiter = tokenizer, delimiter
        self._token_texts: dict[int, str] = {}

    def find_step_ends(self, ids: Sequence[int]) -> list[int]:
        """Return the positions of the tokens that end a step, ascending."""
        detector = StepEndDetector(self)
        return [position for position, token in enumerate(ids) if detector(token)]

    def advance(self, pending_text: str, token: int) -> tuple[bool, str]:
        """Return whether a token ends a step, and the new pending text.

        Args:
            pending_text: end of the text so far, in which a delimiter may have begun.
        """
        *closed, rest = (pending_text + self._get_token_text(token)).split(self.delimiter)
        return bool(closed), rest[max(0, len(rest) - len(self.delimiter) + 1) :]

    def _get_token_text(self, token: int) -> str:
        if token not in self._token_texts:
            # Some decoders drop a space at the beginning: the second of two tokens writes what it does within a text.
            text = self._decode([token, token])[len(self._decode([token])) :]
            if not text and self.tokenizer.convert_ids_to_tokens(token) == self.delimiter:
                text = self.delimiter
            self._token_texts[token] = text
        return self._token_texts[token]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StepEndDetector:
    """Takes the tokens of a response one by one, and returns for each whether it ends a step.

    Attributes:
        pending_text: end of the text so far, in which a delimiter may have begun.
    """

    def __init__(self, finder: StepFinder, pending_text: str = ""):
        self.finder, self.pending_text = finder, pending_text

    def __call__(self, token: int) -> bool:
        ends, self.pending_text = self.finder.advance(self.pending_text, token)
        return ends
