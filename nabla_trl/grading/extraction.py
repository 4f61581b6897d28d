r"""Find the final answer in a response: `extract_answer` in any form, `extract_strict_answer` in a given format."""

from __future__ import annotations

import re

_THINK_BLOCK = re.compile(r"<(think|thinking)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THINK_OPEN = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_THINK_CLOSE = re.compile(r"</think(?:ing)?>", re.IGNORECASE)

# Formats in which a task may ask for its answer (see `extract_strict_answer`).
ANSWER_FORMATS = ("boxed", "hashes", "hash")
_HASHES_LINE = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S[^\n]*)$", re.MULTILINE)

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(\w))")
# Text that joins boxes to one answer: "and", "or" or a comma, within a few characters.
_MAX_BOX_GAP = 40
_BOX_JOINER = re.compile(
    r"[\s$]*(?:\\[)\],;])*[\s$]*(?:,?\s*\b(?:and|or)\b|,|\\text\{,?\s*(?:and|or)\s*\})[\s$]*(?:\\[(\[])?[\s$]*"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,]*\d)|\d+)(?:\.\d+)?|\.\d+"
_CURRENCY = r"(?:\\?[$£€]\s?)"
_NUMBER = (
    rf"(?P<sign>(?<![\w)\]}}])[-+])?(?:{_CURRENCY}(?P<inner>[-+])?)?"
    rf"(?P<body>\\[dt]?frac\{{-?\d+\}}\{{\d+\}}|\d+\s?/\s?\d+(?!\s?/)|{_DIGITS})"
    r"(?!\d)(?!(?:st|nd|rd|th)\b)(?P<percent>\s?\\?%|\s+percent\b)?"
)
# Not inside a word (CO2), a decimal (3.14), an exponent (x^2) or a subscript. ASCII, because 共18个 is not a word.
_ANY_NUMBER = re.compile(rf"(?<![\w.^]){_NUMBER}", re.ASCII)
_UNIT = r"(?:[ \t]+[A-Za-z][A-Za-z ]*)?[.;]?[ \t]*(?=\n|$)"
_HASHES_NUMBER = re.compile(rf"####[ \t]*(?P<answer>{_NUMBER}){_UNIT}")
_HASHES_LAST_LINE = re.compile(r"####[ \t]*(?P<answer>[^\s#][^\n#]*)$")
# "…;#8", only at the start of a line or of a step, so that "door #3" and Markdown headings do not match.
_HASH_NUMBER = re.compile(rf"(?:^|[;\n])[ \t]*#[ \t]*(?P<answer>{_NUMBER})[ \t]*(?=[;\n]|$)")
_ANSWER_PHRASE = re.compile(
    r"\banswers?\b(?:\s+[^\s.,:;=?!]+){0,8}?[\s*_]*(?:\b(?:is|are|was|be|equals)\b|:|=)[\s:*_]*"
    r"|^[#*_ \t]*(?:the )?(?:final )?answer[*_ \t]*\n[\s*_]*",
    re.IGNORECASE | re.MULTILINE,
)
_MATH = (
    r"(?:\$\$(?:[^$]+)\$\$|\\\[(?:.+?)\\\]|\\\((?:.+?)\\\)"
    # A dollar sign may be money. A closing one touches the formula, and no digit follows it (Pandoc's rule).
    r"|(?<!\\)\$(?=\S)(?:[^$\n]*?[^$\s\\])\$(?!\d))"
)
_MATH_RUN = re.compile(rf"{_MATH}(?:\s*(?:,?\s*(?:and|or)|,)\s*{_MATH})*", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[^\s.\\])[.!?](?=\s|$)|\s+I hope\b")
# "18 because …" and "18 eggs a day", but neither "3 and 5" nor "2 pi".
_LEADING_NUMBER = re.compile(rf"{_NUMBER}(?=,?\s+(?:a\b|\(|(?!(?:and|or|pi|sqrt)\b)[A-Za-z]{{2}}))")
_NOT_ONE_VALUE = re.compile(r",\s|\b(?:and|or)\b|\d[A-Za-z]|\^")  # "3, 5", "2x + 3y = 0"
# Words mark prose, in which the answer is a number, in contrast to a formula: "it is 12", but not "ab + 2 sin x".
_FUNCTION = r"(?:and|sin|cos|tan|cot|sec|csc|log|exp|sqrt|mod)\b"
_WORD = re.compile(rf"(?<![A-Za-z])(?:(?!{_FUNCTION})[A-Za-z]{{3}}|[A-Za-z]{{2}} [A-Za-z]{{2}})")
_TRAILING_PUNCTUATION = re.compile(r"(?<!\\right)[.,;:]+$")


def extract_answer(text: str) -> str | None:
    r"""Return the final answer of a response, or None. If there are several, the last one counts.

    Thinking is not an answer. The function removes `<think>…</think>`, everything before a single `</think>` (some
    templates open the block in the prompt), and everything after a `<think>` that is never closed. It then looks for
    markers in this order:

    - `\boxed{…}` or `\fbox{…}` with balanced braces. A box that is cut off is not an answer. Several boxes with only
      "and", "or" or commas between them are one answer of several parts, as in math-verify.
    - `#### 18`, or `#8` at the start of a line or step.
    - "the answer is …" or "Answer: …".
    - The last plain number with its sign, thousands commas, decimals, a/b or %, without its currency sign.
    """
    text = _strip_thinking(text).replace("−", "-")
    box, text = _extract_last_boxes(text)
    for find in (lambda _: box, _extract_after_hashes, _extract_after_phrase, _extract_last_number):
        if answer := find(text):
            return answer
    return None


def extract_strict_answer(text: str, answer_format: str) -> str | None:
    r"""Return the final answer in a given format, or None. If there are several, the last one counts.

    Args:
        text: the response. Thinking is not an answer, as in `extract_answer`.
        answer_format: "boxed" (a complete `\boxed{…}`), "hashes" (the rest of a line that begins with `####`) or
            "hash" (the text after the last `#`, as in the digit chains).
    """
    text = _strip_thinking(text)
    if answer_format == "boxed":
        boxes, _ = _find_boxes(text.replace("−", "-"))
        return boxes[-1][0] if boxes else None
    answers = _HASHES_LINE.findall(text) if answer_format == "hashes" else text.split("#")[1:]
    return (trim_answer(answers[-1].replace("−", "-")) or None) if answers else None


def detect_answer_format(instruction: str) -> str | None:
    r"""Return the answer format that an instruction names by `\boxed` or `####`, or None."""
    return "boxed" if r"\boxed" in instruction else "hashes" if "####" in instruction else None


def has_open_think_block(text: str) -> bool:
    """Return True if a text ends inside a think block."""
    opened, closed = ([match.start() for match in tag.finditer(text)] for tag in (_THINK_OPEN, _THINK_CLOSE))
    return bool(opened) and (not closed or closed[-1] < opened[-1])


def _strip_thinking(text: str) -> str:
    text = _THINK_BLOCK.sub(" ", text)
    text = _THINK_CLOSE.split(text)[-1]
    return _THINK_OPEN.split(text)[0]


def _extract_last_boxes(text: str) -> tuple[str | None, str]:
    """Return the answer in the last complete box and the boxes joined to it, and the text before an unfinished box."""
    boxes, text = _find_boxes(text)
    parts: list[str] = []
    following = 0
    for content, start, end in reversed(boxes):
        if parts and (following - end > _MAX_BOX_GAP or not _BOX_JOINER.fullmatch(text, end, following)):
            break
        parts.insert(0, content)
        following = start
    return ", ".join(parts) or None, text


def _find_boxes(text: str) -> tuple[list[tuple[str, int, int]], str]:
    """Return (content, start, end) of the complete boxes that are not empty, and the text before an unfinished box."""
    boxes: list[tuple[str, int, int]] = []
    for match in _BOX.finditer(text):
        content = match[1] or _extract_balanced(text, match.end())
        if content is None:
            return boxes, text[: match.start()]
        end = match.end() if match[1] else match.end() + len(content) + 1
        if answer := trim_answer(content):
            boxes.append((answer, match.start(), end))
    return boxes, text


def _extract_balanced(text: str, start: int) -> str | None:
    """Return the text from `start` to the brace that closes the one before `start`, or None if it is not closed."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # an escaped brace has two characters and does not count
        if depth == 0:
            return text[start : match.start()]
    return None


def _extract_after_hashes(text: str) -> str | None:
    numbers = [*_HASHES_NUMBER.finditer(text), *_HASH_NUMBER.finditer(text)]
    last_number = max(numbers, key=lambda match: match.start(), default=None)
    line = _HASHES_LAST_LINE.search(text.rstrip())
    if line and (last_number is None or line.start() > last_number.start()) and not _is_heading(line["answer"]):
        return trim_answer(line["answer"])
    return _format_number(last_number) if last_number else None


def _is_heading(line: str) -> bool:
    """Return True if the words after `####` are the title of a section, unlike "yes", "due east" or a formula."""
    return "\\" not in line and bool(_WORD.search(line)) and (":" in line or len(line.split()) > 3)


def _extract_after_phrase(text: str) -> str | None:
    for match in reversed(list(_ANSWER_PHRASE.finditer(text))):
        if answer := _extract_from_sentence(text[match.end() :]):
            return answer
    return None


def _extract_from_sentence(text: str) -> str | None:
    """Return the answer after "the answer is": a formula, a number with its unit, or a few words."""
    if formula := _MATH_RUN.match(text):
        return trim_answer(formula[0])
    line = text.split("\n", 1)[0]
    if number := _LEADING_NUMBER.match(line):
        return _format_number(number)
    if formula := _MATH_RUN.search(line):
        return trim_answer(formula[0])
    line = trim_answer(_SENTENCE_END.split(line, maxsplit=1)[0])
    tail = line if _NOT_ONE_VALUE.search(line) else line.rsplit("=", 1)[-1].strip()
    if number := _ANY_NUMBER.fullmatch(tail) or _LEADING_NUMBER.match(tail):
        return _format_number(number)
    if "\\" in line or not _WORD.search(line):
        return line or None
    return _extract_last_number(line) or (line if len(line.split()) <= 6 else None)


def _extract_last_number(text: str) -> str | None:
    numbers = list(_ANY_NUMBER.finditer(text))
    return _format_number(numbers[-1]) if numbers else None


def _format_number(match: re.Match[str]) -> str:
    sign = "-" if "-" in (match["sign"], match["inner"]) else ""
    return sign + match["body"].replace(" ", "") + ("%" if match["percent"] else "")


def trim_answer(answer: str) -> str:
    r"""Remove outer space, Markdown emphasis, `$…$`, `\(…\)`, `\[…\]` and closing punctuation from an answer."""
    previous = None
    while answer != previous:
        previous = answer
        answer = _TRAILING_PUNCTUATION.sub("", answer.strip(" \t\r\n*_`~\u00a0"))
        for left, right in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            inner = answer[len(left) : -len(right)]
            if answer.startswith(left) and answer.endswith(right) and inner and left not in inner:
                answer = inner
    return answer
