r"""Find formulas in a text: between `$…$`, `$$…$$`, `\(…\)` and `\[…\]`, and without any mark. In linear time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Span(NamedTuple):
    """A part of a text.

    Attributes:
        start, end: where the part is in the text, with its delimiters.
        text: what an answer would be, or None for a formula that is not closed properly.
    """

    start: int
    end: int
    text: str | None


# --- formulas between delimiters -----------------------------------------------------------------------

_DELIMITER = re.compile(r"\\\\|\\[$()\[\]]|\$\$?|\n")
_CLOSING = {r"\(": r"\)", r"\[": r"\]", "$$": "$$", "$": "$"}
_COMMAND_OR_TEXT = re.compile(r"\\(?:text[a-z]*|mathrm|mbox|operatorname)\s?\{[^{}]*\}|\\[A-Za-z]+")
_PROSE = re.compile(r"[A-Za-z]{2}\s+[A-Za-z]{2}|\d\s+[A-Za-z]{2,}\s|^\s+[A-Za-z]{2,}\s")
_PERCENT_BEHIND = re.compile(r"\s*(?:\\?%|(?:percent(?:age)?|pct)\b)")
_JOINED_FORMULAS = re.compile(r"[ \t]*(?:,?[ \t]*(?:and|or)\b|,)[ \t]*")


def find_formulas(text: str) -> list[Span]:
    r"""Return the formulas between delimiters in their order.

    A single dollar sign may also be money. So it closes a formula only on the same line, if no digit follows it
    (Pandoc's rule) and if there is no prose between the signs. A `$` or `\(` with a line break behind it opens nothing
    that can be read.
    """
    formulas: list[Span] = []
    opening, start, content_start = "", 0, 0
    for match in _DELIMITER.finditer(text):
        token = match[0]
        if token in ("\\\\", r"\$") or (token == "\n" and opening != "$"):
            continue
        if token == "\n":
            # `$` alone before a line break: its formula is broken if another `$` follows on a line of its own.
            is_alone = not text[content_start : match.start()].strip()
            opening = "$\n" if is_alone and opening == "$" else ""
            continue
        if opening in ("$", "$\n") and token == "$$":  # "$a$$b$"
            token = "$"
        is_closed = token == _CLOSING.get(opening[:1] if opening == "$\n" else opening)
        if is_closed and (content := _read_content(opening, text[content_start : match.start()], text, match.end())):
            percent = _PERCENT_BEHIND.match(text, match.end())
            broken = content == "\n"
            formulas.append(
                Span(start, match.end(), None if broken else content + ("%" if percent and content[-1] != "%" else ""))
            )
            opening = "$" if match[0] == "$$" and token == "$" else ""
            start, content_start = match.end() - 1, match.end()
        elif token in _CLOSING and (token != "$" or opening in ("", "$", "$\n")):
            opening, start, content_start = token, match.start(), match.end()
    return formulas


def _read_content(opening: str, content: str, text: str, end: int) -> str:
    r"""Return the content of a formula, "\n" if it is broken, or nothing if the delimiters enclose no formula."""
    stripped = content.strip()
    if opening == "$\n" or (opening == r"\(" and content.lstrip(" \t").startswith("\n")):
        is_alone = content.rstrip(" \t").endswith("\n")
        return "\n" if stripped and "\n" not in stripped and is_alone else ""
    if opening == "$":
        if text[end : end + 1].isdigit() or content.endswith("\\"):
            return ""
        if _PROSE.search(_COMMAND_OR_TEXT.sub("", content)):
            return ""
    return stripped


def join_spans(text: str, spans: Iterable[Span]) -> list[Span]:
    """Return spans in which formulas with only a comma, "and" or "or" between them are one."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].text and span.text:
            before = joined[-1]
            if _JOINED_FORMULAS.fullmatch(text, before.end, span.start):
                joined[-1] = Span(before.start, span.end, text[before.start : span.end])
                continue
        joined.append(span)
    return joined


# --- formulas without delimiters -----------------------------------------------------------------------

_FUNCTIONS = r"(?:sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi)(?![A-Za-z])"
_TOKEN = re.compile(
    r"(?P<command>\\text[a-z]*\s?\{[^{}\n]{0,80}\}|\\[A-Za-z]{2,}|\\[{},;!:%])"
    r"|(?P<number>\d+(?:,\d+)*(?:\.\d+)?|\.\d+)"
    rf"|(?P<function>{_FUNCTIONS}|mod(?![A-Za-z]))"
    r"|(?P<letter>[A-Za-z](?![\w']))"
    r"|(?P<word>[^\W\d_][\w'’]*)"
    r"|(?P<operator>[-+*/^_=<>!|%]+)"
    r"|(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<comma>[,;])|(?P<space>[ \t]+)|(?P<other>.|\n)",
    re.DOTALL,
)
_JOINING = frozenset({"operator", "open", "command", "function"})
_JOINED = frozenset({"operator", "close", "command", "function"})
_VALUE_COMMAND = re.compile(r"\\(?!text|left|right|big|quad|qquad|boxed|begin|end|item|section)[A-Za-z]{2,}")
_TUPLE = re.compile(r"(?:\\\{|[(\[{])[^()\[\]{}]*\d[^()\[\]{}]*[,;].*(?:\\\}|[)\]}])", re.DOTALL)
_PRODUCT = re.compile(rf"\d(?:[A-Za-z](?<![mgshklLKDkMB])|{_FUNCTIONS})|\bsqrt|\d\*?\(|\)\(|\d\s?pi\b")
_SUM = re.compile(r"[A-Za-z]\s?[-+*/]\s?[\dA-Za-z(]|\d\s?[-+*/]\s?[A-Za-z]")
_RELATION = re.compile(r"[<>]|!=")
# What every formula has, so that most prose is not split into tokens.
_HINT = re.compile(r"[\\^(\[{<>]|!=|\d(?:[A-Za-z]|\s?pi\b)|\bsqrt|\b[A-Za-z]\s?[-+*/]|\d\s?[-+*/]\s?[A-Za-z]\b")
# Letters behind the number are units that are no usual variables: "= 5cm", but not "= 2x".
_NUMBER_AT_END = re.compile(
    r"(?<![<>!\\])=\s*[-+]?[\d.,]*\d(?:[mcdk]?m|k?g|mg|m?s|h|hrs?|min|m?[lL]|ft|in|yd|mi|lbs?|oz|kW|[Jj]pm|mph)?$"
)
_EQUATION = re.compile(r"[A-Za-z]\s?=\s?[-+]?[\d.,]*\d[A-Za-z]")
_EDGES = " \t*_|!:.,"
_WITH_SQUARE_UNIT = re.compile(r"[-+]?[\d.,]+(?:[mcdk]?m|ft|in|yd|mi|s)\^\{?[23]\}?")
_UNIT_BEFORE = re.compile(r"\d\s*[A-Za-z]{0,3}$")


def find_bare_formulas(text: str, begin: int = 0, end: int | None = None) -> list[Span]:
    r"""Return the formulas that no delimiter marks, such as `x \leq 4`, (3, 5) or 2x + 1.

    Plain numbers, sums of plain numbers and equations with a number on the right are no formulas here, because prose
    is full of them, and the number is the answer.

    Args:
        text: the text, in which a formula ends at the end of its line.
        begin: where to begin in the text.
        end: where to end, by default at the end of the text.
    """
    end = len(text) if end is None else end
    if not _HINT.search(text, begin, end):
        return []
    runs = (_trim(text, *run) for run in _find_runs(text, begin, end))
    return [Span(start, stop, text[start:stop]) for start, stop in runs if _is_formula(text[start:stop], text, start)]


def _find_runs(text: str, begin: int, end: int) -> Iterable[tuple[int, int]]:
    """Yield the bounds of runs of mathematical tokens with balanced brackets."""
    tokens = [(str(match.lastgroup), match.start(), match.end()) for match in _TOKEN.finditer(text, begin, end)]
    run: list[int] = []  # starts of open brackets, after the start of the run
    previous, run_end = "other", begin
    for index, (kind, start, stop) in enumerate(tokens):
        following = tokens[index + 1][0] if index + 1 < len(tokens) else "other"
        if kind == "letter" and text[start] in "aAI" and following == "space" and index + 2 < len(tokens):
            kind = "word" if tokens[index + 2][0] in ("word", "letter") else kind  # an article
        if kind == "command" and text[start:stop] in (r"\{", r"\}"):
            kind = "open" if text[start:stop] == r"\{" else "close"
        is_open = len(run) > 1
        if (
            kind == "space"
            and run
            and (is_open or previous in _JOINING or following in _JOINED or following == "command")
        ):
            continue
        if (
            kind in ("word", "other", "space")
            or (kind == "comma" and not is_open)
            or (kind == "close" and not is_open)
        ):
            if run:
                yield (run[-1] if is_open else run[0]), run_end
            run, previous = [], kind
            continue
        run = run or [start]
        if kind == "open":
            run.append(start)
        elif kind == "close":
            run.pop()
        if len(run) == 1 and kind == "close" and start < run[0]:
            run = [start]
        previous, run_end = kind, stop
    if run:
        yield (run[-1] if len(run) > 1 else run[0]), run_end


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start] in _EDGES and not text.startswith(".", start):
        start += 1
    while start < end and text[end - 1] in _EDGES:
        end -= 1
    return start, end


def _is_formula(run: str, text: str, start: int) -> bool:
    if (
        not run
        or not (any(map(str.isdigit, run)) or _VALUE_COMMAND.search(run))
        or sum(map(run.count, "([{")) != sum(map(run.count, ")]}"))
    ):
        return False
    if "<<" in run or ">>" in run or _NUMBER_AT_END.search(run):  # a calculation, whose result is a number
        return False
    if _WITH_SQUARE_UNIT.fullmatch(run):
        return False
    if run[0] in "^_" or (run[0].isalpha() and _UNIT_BEFORE.search(text[max(0, start - 8) : start])):  # 9 m^2
        return False
    has_letter = any(map(str.isalpha, run))
    return bool(
        _VALUE_COMMAND.search(run)
        or _EQUATION.fullmatch(run)
        or ("^" in run and run[-1] != "^")
        or _TUPLE.fullmatch(run)
        or (_RELATION.search(run) and has_letter)
        or _PRODUCT.search(run)
        or _SUM.search(run)
    )
