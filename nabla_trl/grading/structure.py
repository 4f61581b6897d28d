r"""Split an answer of several parts at its top level: lists, sets, tuples, intervals and chains of inequalities."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

_OPENING = {"(": ")", "[": "]", r"\{": r"\}", "{": "}"}
_CLOSING = frozenset(_OPENING.values())
_TOKEN = re.compile(
    r"\\text\s?\{\s?,?\s?(?:and|or|,)\s?\}|\\[{}]|\\\\|\\[A-Za-z]+|[()\[\]{}|,;]|\b(?:and|or)\b|[^\\()\[\]{}|,;]"
)
_IN_ORDER = re.compile(
    r"(?:,\s?)?(?:\\text\s?\{)?\s?,?\s?(?:\(\s?)?(?:in (?:that|this|the given) order|in order|respectively)"
    r"(?:\s?\))?\s?\}?$"
)
_MEMBER = re.compile(r"[A-Za-z]\s?\\in\s?(.+)")
_LIST_IN_TEXT = re.compile(r"\\text\s?\{([^{},]*,[^{}]*)\}")  # \text{Alice, Bob}
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_UNARY_PLUS = re.compile(r"(^|[=({]\s?)\+\s?")
_NAMED = re.compile(r"(\S[^=<>]{0,40}?)\s?=\s?([^=<>]+)")
_VECTOR = re.compile(r"\\begin\{([pb]?)matrix\}(.+)\\end\{\1matrix\}")
_RELATION = re.compile(r"(\\leq|\\geq|<=|>=|<|>)(?![A-Za-z])")
_REVERSED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}


class Parts(NamedTuple):
    """The parts of an answer.

    Attributes:
        brackets: the outer brackets, such as "()", "[)" or "\\{\\}". Empty for a plain list. `{}` prints nothing.
        parts: the parts in their order. One part means that there is nothing to split.
        in_order: whether the answer says that the order matters.
    """

    brackets: str
    parts: list[str]
    in_order: bool = False


def split_parts(text: str) -> Parts:
    """Split a normalized answer at the commas, semicolons, "and" and "or" that no bracket encloses.

    Commas between groups of three digits belong to the number, if the list has other separators.
    """
    if match := _MEMBER.fullmatch(text) or _LIST_IN_TEXT.fullmatch(text):
        text = match[1]
    if in_order := _IN_ORDER.search(text):
        text = text[: in_order.start()].rstrip(", ")
    if (match := _VECTOR.fullmatch(text)) and "&" not in match[2]:
        entries = [entry.strip() for entry in match[2].strip().split(r"\\")]
        return Parts("()", [entry for entry in entries if entry])
    brackets, inner = _strip_brackets(text)
    if brackets == r"\{\}" and re.search(r"\\mid\b|[|:]", inner):  # a set by its property
        return Parts("", [text])
    parts = _split(inner)
    if brackets in ("", r"\{\}"):
        parts = [value for part in parts for value in _expand_signs(part)]
    if len(parts) < 2 and brackets != r"\{\}":
        return Parts("", [text], bool(in_order))
    return Parts(brackets.replace("{}", "") if brackets == "{}" else brackets, parts, bool(in_order))


def _strip_brackets(text: str) -> tuple[str, str]:
    """Return the outer brackets and what is inside, if the first bracket closes at the end of the text."""
    depth, first = 0, ""
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token in _OPENING:
            depth += 1
            first = first or token
            if match.start() and depth == 1:
                return "", text
        elif token in _CLOSING:
            depth -= 1
            if depth == 0:
                if match.end() != len(text):
                    return "", text
                return first + token, text[len(first) : match.start()].strip()
        elif depth == 0:
            return "", text
    return "", text


def _split(text: str) -> list[str]:
    tokens = [(match[0], match.start(), match.end()) for match in _TOKEN.finditer(text)]
    depth, separators = 0, []
    for token, start, end in tokens:
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
        elif depth == 0 and (token in (",", ";", "and", "or") or token.startswith("\\text")) and token != "\\text":
            separators.append((token, start, end))
    is_thousands = [token == "," and _is_thousands_comma(text, start) for token, start, _ in separators]
    if not all(is_thousands):
        separators = [separator for separator, skip in zip(separators, is_thousands, strict=True) if not skip]
    bounds = [(0, 0), *((start, end) for _, start, end in separators), (len(text), len(text))]
    parts = [text[end:start].strip() for (_, end), (start, _) in itertools.pairwise(bounds)]
    return [part for part in parts if part]


def _expand_signs(part: str) -> list[str]:
    r"""Return both values of a part with one `\pm`, and the part itself if it has none or several."""
    names = _PLUS_MINUS.findall(part)
    if not names or len(names) != len(set(names)):
        return [part]
    upper, lower = {"pm": "+", "mp": "-"}, {"pm": "-", "mp": "+"}
    pieces = _PLUS_MINUS.split(part)  # text, name of a sign, text, …
    values = ("".join(signs.get(piece, piece) for piece in pieces) for signs in (upper, lower))
    return [_UNARY_PLUS.sub(r"\1", value).strip() for value in values]


def _is_thousands_comma(text: str, comma: int) -> bool:
    before, after = text[max(0, comma - 4) : comma], text[comma + 1 : comma + 5]
    return bool(re.search(r"(?:^|\D)\d{1,3}$", before, re.ASCII) and re.match(r"\d{3}(?!\d)", after, re.ASCII))


def split_name(part: str) -> tuple[str, str]:
    """Return the name and the value of `x = 5`, or an empty name and the part."""
    match = _NAMED.fullmatch(part)
    return (match[1].replace(" ", ""), match[2].strip()) if match else ("", part)


def split_inequalities(text: str) -> tuple[list[str], list[str]] | None:
    r"""Return the terms and the signs of a chain `1 < x \leq 3` in ascending order, or None for other text."""
    pieces = _RELATION.split(text.replace("<=", r"\leq ").replace(">=", r"\geq "))
    terms, signs = [piece.strip() for piece in pieces[::2]], pieces[1::2]
    if len(signs) < 2 or not all(terms) or "=" in text.replace("<=", "").replace(">=", ""):
        return None
    if all(sign in (">", r"\geq") for sign in signs):
        return terms[::-1], [_REVERSED[sign] for sign in reversed(signs)]
    return (terms, signs) if all(sign in ("<", r"\leq") for sign in signs) else None


_OR = re.compile(r"\\text ?\{ ?or ?\}|\\vee\b|\bor\b")
_BOUND = re.compile(r"([a-z]) ?(<|>|\\leq|\\geq) ?([^<>a-z=]*(?:\\(?:frac|sqrt|pi|infty)[^<>=]*)?)")
_INTERVALS = {"<": r"(-\infty, {})", r"\leq": r"(-\infty, {}]", ">": r"({}, \infty)", r"\geq": r"[{}, \infty)"}


def write_as_union(text: str) -> str | None:
    r"""Return the union of intervals that `x < -2 \text{ or } x > 2` says, or None for other text."""
    parts = [part.strip() for part in _OR.split(text)]
    matches = [_BOUND.fullmatch(part) for part in parts]
    if len(parts) < 2 or not all(matches) or len({match[1] for match in matches if match}) > 1:
        return None
    return r" \cup ".join(_INTERVALS[match[2]].format(match[3].strip()) for match in matches if match)
