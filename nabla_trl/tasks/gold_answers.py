r"""Parsers of gold answers: from the text in a data set to the final answer and the worked solution."""

from __future__ import annotations

import re
from collections.abc import Callable

import regex  # type: ignore[import-untyped]

from nabla_trl.grading.extraction import extract_strict_answer

_PATTERN_TIMEOUT = 2  # seconds for one answer; a pattern such as (a+)+$ may backtrack for years
ParsedGold = tuple[str | None, str | None]  # final answer and worked solution, None if there is none


def parse_plain(text: str) -> ParsedGold:
    """Return the text itself, or None if it is empty."""
    return text.strip() or None, None


def parse_hashes(text: str) -> ParsedGold:
    """Return answer and solution of a text in GSM8K's format, with a last line "#### n". Other text is the answer.

    A number loses its commas, as GSM8K's numbers need. Commas between the parts of another answer stay.
    """
    match = re.search(r"^####(.*)\Z", text.strip(), flags=re.MULTILINE)
    if match is None:
        return parse_plain(text)
    answer = match[1].strip()
    return (answer.replace(",", "") if re.fullmatch(r"[-+]?[\d,.]+", answer) else answer) or None, text


def parse_boxed(text: str) -> ParsedGold:
    r"""Return answer and solution of a text that ends in `\boxed{…}`, as in MATH. Without a box there is no answer."""
    return extract_strict_answer(text, "boxed"), text


def parse_integer(text: str) -> ParsedGold:
    """Return an integer in its usual form: "25" for "025" and "25.0". Other text stays, and empty text is None."""
    return re.sub(r"^(-?)0*(\d+)(?:\.0+)?$", r"\1\2", text.strip()) or None, None


def make_regex_parser(pattern: str) -> Callable[[str], ParsedGold]:
    """Return a parser that takes the last match of a regular expression, or the match's group if there is one.

    Raises:
        ValueError: if the pattern is not a regular expression or has several groups. The parser raises one if it takes
            more than 2 seconds.
    """
    try:
        compiled = regex.compile(pattern, regex.MULTILINE)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.groups > 1:
        raise ValueError(f"pattern {pattern!r} has {compiled.groups} groups: it may have one, which holds the answer")

    def parse(text: str) -> ParsedGold:
        try:
            matches = list(compiled.finditer(text, timeout=_PATTERN_TIMEOUT))
        except TimeoutError:
            raise ValueError(f"pattern {pattern!r} takes more than {_PATTERN_TIMEOUT} s on an answer") from None
        answer = (matches[-1][compiled.groups] or "").strip() if matches else ""
        return answer or None, text

    return parse


GOLD_PARSERS: dict[str, Callable[[str], ParsedGold]] = {
    "plain": parse_plain,
    "hashes": parse_hashes,
    "boxed": parse_boxed,
    "integer": parse_integer,
}
