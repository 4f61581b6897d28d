r"""The gold answer in what a data set holds for one: parsers from text to (answer, worked solution). Text only."""

from __future__ import annotations

import re
from collections.abc import Callable

from nabla_trl.grading.extraction import extract_strict_answer

ParsedGold = tuple[str | None, str | None]  # answer and solution, None where there is none


def parse_plain(text: str) -> ParsedGold:
    """The text itself; None where it is empty."""
    return text.strip() or None, None


def parse_hashes(text: str) -> ParsedGold:
    """Answer and solution of a text in GSM8K's form (a last line "#### n"); other text is itself the answer.

    A number loses its commas, as GSM8K's do; those between the parts of another answer stay.
    """
    match = re.search(r"^####(.*)\Z", text.strip(), flags=re.MULTILINE)
    if match is None:
        return parse_plain(text)
    answer = match[1].strip()
    return (answer.replace(",", "") if re.fullmatch(r"[-+]?[\d,.]+", answer) else answer) or None, text


def parse_boxed(text: str) -> ParsedGold:
    r"""Answer and solution of a text that ends in a `\boxed{…}`, as MATH's solutions do; without a box no answer."""
    return extract_strict_answer(text, "boxed"), text


def parse_integer(text: str) -> ParsedGold:
    """An integer as one writes it: "025" and "25.0" give "25". Other text stays; empty text is None."""
    return re.sub(r"^(-?)0*(\d+)(?:\.0+)?$", r"\1\2", text.strip()) or None, None


def make_regex_parser(pattern: str) -> Callable[[str], ParsedGold]:
    """The last match of a regular expression: its group, or all of it; no answer where nothing matches.

    Raises:
        ValueError: no regular expression, or one of several groups.
    """
    try:
        regex = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
    if regex.groups > 1:
        raise ValueError(f"pattern {pattern!r} has {regex.groups} groups: it may have one, which holds the answer")

    def parse(text: str) -> ParsedGold:
        found = list(regex.finditer(text))
        answer = (found[-1][regex.groups] or "").strip() if found else ""
        return answer or None, text

    return parse


GOLD_PARSERS: dict[str, Callable[[str], ParsedGold]] = {
    "plain": parse_plain,
    "hashes": parse_hashes,
    "boxed": parse_boxed,
    "integer": parse_integer,
}
