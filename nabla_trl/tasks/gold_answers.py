r"""The gold answer in what a data set holds for one: parsers from text to (answer, worked solution). Text only."""

from __future__ import annotations

import re
from collections.abc import Callable

from nabla_trl.grading.extraction import strict_answer

Gold = tuple[str | None, str | None]  # answer and solution, None where there is none


def plain(text: str) -> Gold:
    """The text itself; None where it is empty."""
    return text.strip() or None, None


def hashes(text: str) -> Gold:
    """Answer and solution of a text in GSM8K's form (a last line "#### n"); other text is itself the answer.

    A number loses its commas, as GSM8K's do; those between the parts of another answer stay.
    """
    match = re.search(r"^####(.*)\Z", text.strip(), flags=re.MULTILINE)
    if match is None:
        return plain(text)
    answer = match[1].strip()
    return (answer.replace(",", "") if re.fullmatch(r"[-+]?[\d,.]+", answer) else answer) or None, text


def boxed(text: str) -> Gold:
    r"""Answer and solution of a text that ends in a `\boxed{…}`, as MATH's solutions do; without a box no answer."""
    return strict_answer(text, "boxed"), text


def integer(text: str) -> Gold:
    """An integer as one writes it: "025" and "25.0" give "25". Other text stays; empty text is None."""
    return re.sub(r"^(-?)0*(\d+)(?:\.0+)?$", r"\1\2", text.strip()) or None, None


def by_pattern(pattern: str) -> Callable[[str], Gold]:
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

    def parse(text: str) -> Gold:
        found = list(regex.finditer(text))
        answer = (found[-1][regex.groups] or "").strip() if found else ""
        return answer or None, text

    return parse


PARSERS: dict[str, Callable[[str], Gold]] = {"plain": plain, "hashes": hashes, "boxed": boxed, "integer": integer}
