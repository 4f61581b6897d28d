r"""Find the final answer in a response: `extract_answer` in any form, `extract_strict_answer` in a given format."""

from __future__ import annotations

import re

from nabla_trl.grading.formulas import Span, find_bare_formulas, find_formulas, join_spans
from nabla_trl.grading.notation import (
    join_thousands,
    normalize_think_tags,
    rewrite_modulus,
    rewrite_symbols,
    trim_answer,
)

_THINK_TAG = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)
_THINK_OPEN = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_THINK_CLOSE = re.compile(r"</think(?:ing)?>", re.IGNORECASE)

# Formats in which a task may ask for its answer (see `extract_strict_answer`).
ANSWER_FORMATS = ("boxed", "hashes", "hash")
_HASHES_LINE = re.compile(r"^[ \t]*####(?!#)[ \t]*(\S[^\n]*)$", re.MULTILINE)

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(\w))")
# Text that joins boxes to one answer: spacing, "and", "or" or a comma, with a few words before and a name behind.
_MAX_BOX_GAP = 70
_ITEM = r"(?:[A-Za-z]\s?=\s?)?-?\d+(?:\.\d+)?(?:/\d+)?"
_LIST_AT_END = re.compile(
    rf"(?<![-+*/^=<>(\[{{.,\\]\s)(?<![-+*/^=<>(\[{{\w.,\\])({_ITEM}(?:(?:,\s(?:and\s|or\s)?|\s(?:and|or)\s){_ITEM})+)"
    r"[.\s*]*\Z",
    re.ASCII,
)
_MAX_LIST_LENGTH = 200
_SPACING = re.compile(r"\\[,;:! ()\[\]]|\\q?quad(?![A-Za-z])|[~$]|\\text\s*\{([^{}]*)\}")
_NAME_BEFORE_BOX = re.compile(r"\s*\b[A-Za-z](?:_\{?\w+\}?)?\s*(?:=|:|\bis)\s*$")
_BOX_JOINER = re.compile(r"\s*[,;]?\s*(?:(?:[a-z()]+\s){0,5}(?:and|or|&))?\s*")
_CORRECTION = re.compile(
    r"\b(?:no|not|but|wait|wrong|so|thus|hence|then|correct\w*|actually|instead|rather|check\w*|is|are|was|equal\w*)\b"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# Thousands commas, or a decimal comma: "2,74" is a number or a list of two, and the gold answer tells which.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+,\d{1,2}(?!,?\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+(?!\w))?|\.\d+"
_CURRENCY = r"(?:\\?[$£€]\s?)"
_NUMBER = (
    rf"(?P<sign>(?<![\w)\]}}])[-+])?(?:{_CURRENCY}(?P<inner>[-+])?)?"
    rf"(?P<body>\\[dt]?frac\{{-?\d+\}}\{{\d+\}}|(?:\d{{1,3}} (?=\d+/))?\d+\s?/\s?\d+(?!\s?/)|{_DIGITS})"
    r"(?!\d)(?!(?:st|nd|rd|th)\b)(?P<percent>\s?\\?%|\s+percent\b)?"
)
# Not inside a word (CO2), a decimal (3.14), an exponent (x^2) or a subscript. ASCII, because 共18个 is not a word.
_ANY_NUMBER = re.compile(rf"(?<![\w.^])(?<!\^\{{){_NUMBER}", re.ASCII)
_UNIT = r"(?:[ \t]+[A-Za-z][A-Za-z ]*)?[.;]?[ \t]*(?=\n|$)"
_HASHES_NUMBER = re.compile(rf"####[ \t]*(?P<answer>{_NUMBER}){_UNIT}")
_HASHES_LAST_LINE = re.compile(r"####[ \t]*(?P<answer>[^\s#][^\n#]*)$")
# "…;#8", only at the start of a line or of a step, so that "door #3" and Markdown headings do not match.
_HASH_NUMBER = re.compile(rf"(?:^|[;\n])[ \t]*#[ \t]*(?P<answer>{_NUMBER})[ \t]*(?=[;\n]|$)")
_ANSWER_PHRASE = re.compile(
    r"\b(?:answers?|(?:correct|right|best) (?:option|choice))\b"
    r"(?:\s+[^\s.,:;=?!]+){0,8}?[\s*_]*(?:\b(?:is|are|was|be|equals)\b|:|=)[\s:*_]*"
    r"|^[#*_ \t]*(?:the )?(?:final )?answer[*_ \t]*\n[\s*_]*",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"(?<=[^\s.\\])[.!?](?=\s|$)|\s+I hope\b|,?\s+(?:not|rather than|instead of)\b")
# "18 because …" and "18 eggs a day", but neither "3 and 5" nor "2 pi".
_LEADING_NUMBER = re.compile(rf"{_NUMBER}(?=,?\s+(?:a\b|\(|(?!(?:and|or|pi|sqrt)\b)[A-Za-z]{{2}}))")
_NOT_ONE_VALUE = re.compile(r",\s|\b(?:and|or)\b|\d[A-Za-z]|\^")  # "3, 5", "2x + 3y = 0"
_TIMES_POWER = re.compile(r"(?<=\d)\s?x\s?(?=10\s?\^)")
# "The answer is not 5." says what the answer is not, unless the sentence goes on to say what it is.
_DENIED = re.compile(
    r"\banswers?\b(?:\s+[^\s.,:;=?!]+){0,4}?\s+"
    r"(?:(?:is|are|was|were|can|could|should|would)(?:n't|\s+(?:[a-z]+ly\s+)?(?:not|never))|cannot|can't)\b(?: be)?"
    r"(?!(?:[^.!?\n]|\.(?=\d)){0,200}(?:\b(?:but|rather|instead|is|are|it's|equals|only|just)\b|[:;=$\\]))"
    r"(?:[^.!?\n]|\.(?=\d)){0,200}",
    re.IGNORECASE,
)
_BOUNDED = re.compile(
    r"(?:(?:strictly |always |exactly )?(?:less|more|greater|fewer|larger|smaller) than"
    r"|at (?:most|least)|between|no (?:more|less) than"
    r"|up to|under|over|above|below)\s.{1,60}|[-+]?[\d.,]+ or (?:more|less|fewer|greater|above|below)"
)
_MAX_WORDS, _MAX_WORDS_LENGTH = 3, 40  # "I do not know" is longer
_UNFINISHED = re.compile(r"\b(?:answers?|so|thus|hence)\b|\b(?:is|are|the|an?)$", re.IGNORECASE)  # "The answer is"
_ONLY_WORDS = re.compile(r"(?:[^\W\d_]|[\u0300-\u036f\u0900-\u0dff\u0e00-\u0e7f'’ -])+")
_MAX_PHRASES, _MAX_SENTENCE = 20, 2000  # what is looked at, so that repeated phrases take no quadratic time
_VERB_BEFORE = re.compile(r"(?:\b(?:is|are|was|be|equals|gives|becomes)|[:=])[\s*_]*$")
_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)[a-z]*\.?"
_LITERAL = re.compile(
    r"(?<![\w:.,/-])(?:\d{1,2}:\d{2}(?::\d{2})?(?:\s?[AaPp]\.?[Mm]\b\.?)?|\d+(?::\d+)+|\d{4}-\d{2}-\d{2}"
    r"|(?<=ratio is )\d+ to \d+(?: to \d+)*"
    rf"|{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?"
    rf"|\d{{1,2}}(?:st|nd|rd|th)? {_MONTH}(?:,? \d{{4}})?)(?![\w:/-])",
    re.ASCII,
)
_LITERAL_HINT = re.compile(rf"\d[:-]\d|ratio is \d|{_MONTH} \d|\d[a-z]* {_MONTH}")
_LABEL_BEFORE = re.compile(r"(?:^|\n)[A-Z][a-z]+ $")  # "Week 3:210 pages"
_SPACED_NUMBER = re.compile(r"[-+]?[1-9]\d{0,2}(?: \d{3})+(?:\.\d+)?", re.ASCII)
_SUBSCRIPT = re.compile(r"_\s?(?:\{[^{}]*\}|\w)")
_NAMING_COMMAND = re.compile(
    r"\\(?:triangle|angle|overline|overrightarrow|vec|hat|bar|mathbf|mathbb|mathcal|mathrm|square|odot|ell|alpha|beta"
    r"|gamma|delta|theta|lambda|phi|omega|sigma|varphi|left|right|prime)(?![A-Za-z])"
)
_ONLY_NAMES = re.compile(r"[A-Za-z\s(),|'^{}\[\]]*")
_NUMBER_COMMAND = re.compile(r"\\(?:d?frac|times|cdot|div|left|right|text\s?\{[^{}]*\}|[,;! ])")
# Words mark prose, in which the answer is a number, in contrast to a formula: "it is 12", but not "ab + 2 sin x".
_FUNCTION = r"(?:and|sin|cos|tan|cot|sec|csc|log|exp|sqrt|mod)\b"
_WORD = re.compile(rf"(?<![A-Za-z])(?:(?!{_FUNCTION})[A-Za-z]{{3}}|[A-Za-z]{{2}} [A-Za-z]{{2}})")


def extract_answer(text: str) -> str | None:
    r"""Return the final answer of a response, or None. If there are several, the last one counts.

    Thinking is not an answer. The function removes `<think>…</think>`, everything before a single `</think>` (some
    templates open the block in the prompt), and everything after a `<think>` that is never closed. It then looks for
    markers in this order:

    - `\boxed{…}` or `\fbox{…}` with balanced braces. A box that is cut off is not an answer. Several boxes with only
      spacing, "and", "or", commas, a few words or a name such as `n =` between them are one answer of several parts.
    - `#### 18`, or `#8` at the start of a line or step.
    - "the answer is …" or "Answer: …".
    - The last formula or plain number. A number has its sign, thousands commas, decimals, a/b or %, without its
      currency sign. Names such as `$x$` or `$f(x)$` have no value, so they count only if nothing else is there.

    The time is linear in the length of the text.
    """
    whole = _strip_thinking(text).replace("−", "-")
    box, text = _extract_last_boxes(whole)
    is_whole = len(text) == len(whole)  # no box was cut off
    if answer := box or _extract_after_hashes(text):
        return answer
    text = rewrite_modulus(_TIMES_POWER.sub(r" \\times ", join_thousands(rewrite_symbols(text))))
    text = _DENIED.sub("", text)
    return _extract_after_phrase(text) or _extract_last_value(text) or (_read_words(text) if is_whole else None)


def _read_words(text: str) -> str | None:
    """Return a response that is nothing but a few words, such as "Paris" or "red and blue"."""
    answer = trim_answer(text).strip("!() ")
    is_short = len(answer) <= _MAX_WORDS_LENGTH and len(answer.split()) <= _MAX_WORDS
    if not is_short or not _ONLY_WORDS.fullmatch(answer) or _UNFINISHED.search(answer):
        return None
    return answer


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
    text = normalize_think_tags(text)
    opened, closed = ([match.start() for match in tag.finditer(text)] for tag in (_THINK_OPEN, _THINK_CLOSE))
    return bool(opened) and (not closed or closed[-1] < opened[-1])


def _strip_thinking(text: str) -> str:
    """Return a text without its think blocks, in one pass over their tags."""
    text = normalize_think_tags(text)
    kept: list[str] = []
    start, is_thinking = 0, False
    for tag in _THINK_TAG.finditer(text):
        is_closing = bool(tag[1])
        if is_closing and not is_thinking:
            kept = []  # the template opened the block in the prompt
        elif not is_closing and not is_thinking:
            kept.append(text[start : tag.start()])
        is_thinking = not is_closing
        start = tag.end()
    return " ".join(kept if is_thinking else [*kept, text[start:]])


def _extract_last_boxes(text: str) -> tuple[str | None, str]:
    """Return the answer in the last complete box and the boxes joined to it, and the text before an unfinished box."""
    boxes, text = _find_boxes(text)
    parts: list[str] = []
    following = 0
    for content, start, end in reversed(boxes):
        if parts and not _joins_boxes(text[end:following]):
            break
        parts.insert(0, content)
        following = start
    return ", ".join(dict.fromkeys(parts)) or None, text


def _joins_boxes(gap: str) -> bool:
    """Return True if the text between two boxes makes them parts of one answer."""
    if len(gap) > _MAX_BOX_GAP or "\n\n" in gap:
        return False
    gap = _NAME_BEFORE_BOX.sub(" ", _SPACING.sub(lambda match: f" {match[1] or ''} ", gap))
    return bool(_BOX_JOINER.fullmatch(" ".join(gap.split()))) and not _CORRECTION.search(gap)


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
    matches = list(_ANSWER_PHRASE.finditer(text))[-_MAX_PHRASES:]
    for match in reversed(matches):
        if answer := _extract_from_sentence(text[match.end() : match.end() + _MAX_SENTENCE]):
            return answer
    return None


def _extract_from_sentence(text: str) -> str | None:
    """Return the answer after "the answer is": a formula, a number with its unit, or a few words."""
    text = text.removeprefix("either ")
    sentence = trim_answer(_SENTENCE_END.split(text.split("\n", 1)[0], maxsplit=1)[0])
    if _BOUNDED.fullmatch(sentence):  # "at most 5" is not 5
        return sentence
    formulas = join_spans(text, find_formulas(text))
    if formulas and formulas[0].start == 0 and (formulas[0].text is None or has_value(formulas[0].text)):
        return _read_formula(formulas[0])
    line = text.split("\n", 1)[0]
    if number := _LEADING_NUMBER.match(line):
        return _format_number(number)
    if literal := _LITERAL.match(line):
        return literal[0]
    formulas = [formula for formula in formulas if formula.start < len(line)]
    if any(formula.text is None for formula in formulas):
        return None
    if formulas:
        return _choose_in_sentence(line, formulas)
    if (bare := find_bare_formulas(line)) and bare[0].start == 0:
        return trim_answer(str(join_spans(line, bare)[0].text))
    line = trim_answer(_SENTENCE_END.split(line, maxsplit=1)[0])
    tail = line if _NOT_ONE_VALUE.search(line) else line.rsplit("=", 1)[-1].strip()
    if number := _ANY_NUMBER.fullmatch(tail) or _LEADING_NUMBER.match(tail):
        return _format_number(number)
    if "\\" in line or not _WORD.search(line):
        return line or None
    return _extract_last_value(line) or (line if len(line.split()) <= 6 else None)


def _choose_in_sentence(line: str, formulas: list[Span]) -> str | None:
    """Return the answer of a sentence with formulas: what "is", "equals" or "=" points to, else the first formula."""
    ends = [
        match.start()
        for match in _SENTENCE_END.finditer(line)
        if not any(span.start <= match.start() < span.end for span in formulas)
    ]
    sentence = line[: ends[0]] if ends else line
    values = [formula for formula in formulas if formula.start < len(sentence) and has_value(str(formula.text))]
    numbers = _find_numbers(sentence, 0, len(sentence), formulas)
    after_verb = [s for s in sorted(values + numbers) if _VERB_BEFORE.search(sentence[max(0, s.start - 40) : s.start])]
    chosen = after_verb[-1:] or values[:1] or numbers[-1:] or formulas[:1]
    return _read_formula(chosen[0])


def _extract_last_value(text: str) -> str | None:
    """Return the last formula or number of a text. The last line is read first, because most answers are there."""
    if _SPACED_NUMBER.fullmatch(text.strip()):
        return text.strip()
    formulas = find_formulas(text)
    remaining = list(formulas)
    end = len(text)
    while end >= 0:
        begin = text.rfind("\n", 0, end) + 1
        in_line: list[Span] = []
        while remaining and remaining[-1].end > begin:
            in_line.append(remaining.pop())
        begin = min([begin, *(formula.start for formula in in_line)])
        if span := _find_last_value(text, begin, end, in_line[::-1]):
            return _read_formula(span)
        end = begin - 1
    # A name is an answer if the response is nothing else, or says that something is it.
    if formulas:
        before, formula = text[: formulas[-1].start], formulas[-1]
        is_all = not before.strip() and not text[formula.end :].strip(" .\n")
        return _read_formula(formula) if is_all or _VERB_BEFORE.search(before[-40:]) else None
    return None


def _find_last_value(text: str, begin: int, end: int, formulas: list[Span]) -> Span | None:
    """Return the last formula, literal or number of a part of a text in which the formulas are known."""
    literals = [*_find_literals(text, begin, end, formulas), *_find_list_at_end(text, begin, end, formulas)]
    bare, position = [], begin
    for formula in [*formulas, Span(end, end, None)]:
        bare += find_bare_formulas(text, position, formula.start)
        position = formula.end
    bare = [*literals, *_outside(bare, literals)]
    values = [formula for formula in formulas if formula.text is None or has_value(formula.text)]
    spans = join_spans(text, sorted([*values, *bare], key=lambda span: span.end))
    candidates = [*spans, *_find_numbers(text, begin, end, [*formulas, *bare])]
    return max(candidates, key=lambda span: span.end, default=None)


def _find_literals(text: str, begin: int, end: int, taken: list[Span]) -> list[Span]:
    """Return times, ratios and dates outside the `taken` spans."""
    if not _LITERAL_HINT.search(text, begin, end):
        return []
    found = [
        Span(match.start(), match.end(), match[0])
        for match in _LITERAL.finditer(text, begin, end)
        if not _LABEL_BEFORE.search(text[max(0, match.start() - 20) : match.start()])
    ]
    return _outside(found, taken)


def _find_list_at_end(text: str, begin: int, end: int, taken: list[Span]) -> list[Span]:
    """Return the list of numbers at the end of a line, as in "The roots are 5 and 6." or "x = 5, y = 7"."""
    match = _LIST_AT_END.search(text, max(begin, end - _MAX_LIST_LENGTH), end)
    return _outside([Span(match.start(), match.end(1), match[1])], taken) if match else []


def _find_numbers(text: str, begin: int, end: int, taken: list[Span]) -> list[Span]:
    """Return the plain numbers outside the `taken` spans."""
    found = [
        Span(match.start(), match.end(), _format_number(match)) for match in _ANY_NUMBER.finditer(text, begin, end)
    ]
    return _outside(found, taken)


def _outside(spans: list[Span], taken: list[Span]) -> list[Span]:
    """Return the spans that overlap none of the `taken` ones, in one pass over both."""
    bounds = iter(sorted(taken))
    outside, bound = [], next(bounds, None)
    for span in spans:
        while bound and bound.end <= span.start:
            bound = next(bounds, None)
        if bound is None or span.end <= bound.start:
            outside.append(span)
    return outside


def has_value(formula: str) -> bool:
    r"""Return False for a formula that only names something: `x`, `f(x)`, `x_1`, `\triangle ABC`, `(x, y)`."""
    plain = _SUBSCRIPT.sub("", _NAMING_COMMAND.sub(" ", trim_answer(formula)))
    return _ONLY_NAMES.fullmatch(plain) is None


def _read_formula(span: Span) -> str | None:
    """Return the answer in a formula. Of an equation between numbers, `3 + 4 = 7`, the last number is the answer."""
    if span.text is None:
        return None
    formula = trim_answer(span.text)
    left, equals, right = formula.rpartition("=")
    is_arithmetic = (
        equals and left[-1:] not in tuple("<>!\\") and not re.search("[A-Za-z]", _NUMBER_COMMAND.sub("", left))
    )
    if is_arithmetic and (number := _ANY_NUMBER.fullmatch(right.strip())):
        return _format_number(number)
    return formula or None


def _format_number(match: re.Match[str]) -> str:
    sign = "-" if "-" in (match["sign"], match["inner"]) else ""
    return sign + re.sub(r" (?=/)|(?<=/) ", "", match["body"]) + ("%" if match["percent"] else "")
