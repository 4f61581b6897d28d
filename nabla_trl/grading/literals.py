r"""Read answers that need no computer algebra: numbers, units, times, dates, digits in a base, ranges and words.

All functions take normalized answers (`nabla_trl.grading.notation.normalize_answer`) and run in linear time.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

_MAX_NUMBER_LENGTH = 400
_MAX_EXPONENT = 1000
# Decimals are compared to 6 places, as math-verify does, and must also agree to about 4 significant digits.
_DECIMAL_PLACES = 6
_RELATIVE_TOLERANCE = Fraction(1, 10_000)

_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_POWER = r"(?:\{\s?([-+]?\d+)\s?\}|\(([-+]?\d+)\)|([-+]?\d+))"
_BRACED = r"(?:\{\s?([-+]?\d+)\s?\}|(\d))"
_DECIMAL_NUMBER = re.compile(
    rf"([-+]?)\s?({_DECIMAL})(?:[eE]([-+]?\d+)|\s?(?:\\times|\\cdot|\*|x)\s?10\s?\^\s?{_POWER})?", re.ASCII
)
_POWER_OF_TEN = re.compile(rf"([-+]?)10\s?\^\s?{_POWER}", re.ASCII)
_DECIMAL_COMMA = re.compile(r"([-+]?)(\d+),(\d{1,2}|\d{4,})", re.ASCII)
_FRACTION = re.compile(
    rf"([-+]?)\s?(?:(\d+)\s?)?\\frac\s?{_BRACED}\s?{_BRACED}|([-+]?)(?:(\d+) )?(\d+)\s?/\s?([-+]?\d+)", re.ASCII
)
_IN_PARENTHESES = re.compile(r"\(([^(),]*)\)")  # without a comma: (1,234) is a pair
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\(?:overline|bar|dot)\s?(?:\{\s?(\d+)\s?\}|(\d))", re.ASCII)
_TEXT_WRAPPER = re.compile(r"\\text\s?\{([^{}]*)\}")


def unwrap_text(text: str) -> str:
    r"""Return a text without its `\text{…}` wrappers."""
    return " ".join(_TEXT_WRAPPER.sub(r" \1 ", text).split())


class Number(NamedTuple):
    """The value of a number, and how it was written."""

    value: Fraction
    is_decimal: bool
    is_percent: bool


@lru_cache(maxsize=1 << 16)
def parse_number(text: str) -> Number | None:
    r"""Return the exact value of `1,234.5`, `2 \times 10^{3}`, `\frac34`, `2\frac12`, `25%` or `0.\overline{3}`.

    Args:
        text: a normalized answer.

    Returns:
        None for other text, for a division by zero and for numbers that are too long.
    """
    if len(text) > _MAX_NUMBER_LENGTH:
        return None
    if is_percent := text.endswith("%"):
        text = text[:-1].rstrip()
    if wrapped := _IN_PARENTHESES.fullmatch(text):
        text = wrapped[1].strip()
    if match := _DECIMAL_NUMBER.fullmatch(text):
        exponent = int(match[3] or match[4] or match[5] or match[6] or 0)
        if abs(exponent) > _MAX_EXPONENT:
            return None
        digits = match[2].replace(",", "")
        value = Fraction(digits if digits[-1] != "." else digits[:-1]) * Fraction(10) ** exponent
        return Number(-value if match[1] == "-" else value, "." in digits or exponent < 0, is_percent)
    if match := _POWER_OF_TEN.fullmatch(text):
        exponent = int(match[2] or match[3] or match[4])
        if abs(exponent) > _MAX_EXPONENT:
            return None
        return Number(Fraction(10) ** exponent * (-1 if match[1] == "-" else 1), False, is_percent)
    if match := _FRACTION.fullmatch(text):
        return _read_fraction(match, is_percent)
    if match := _REPEATING.fullmatch(text):
        cycle = match[4] or match[5]
        repeated = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(match[3]))
        value = Fraction(f"{match[2] or 0}.{match[3] or 0}") + repeated
        return Number(-value if match[1] == "-" else value, False, is_percent)
    return None


def _read_fraction(match: re.Match[str], is_percent: bool) -> Number | None:
    sign = match[1] or match[7]
    whole = int(match[2] or match[8] or 0)
    numerator = int(match[3] or match[4] or match[9])
    denominator = int(match[5] or match[6] or match[10])
    is_mixed = match[2] or match[8]
    if denominator == 0 or (is_mixed and (numerator < 0 or denominator < 0)):
        return None
    value = whole + Fraction(numerator, denominator)
    return Number(-value if sign == "-" else value, False, is_percent)


def parse_decimal_comma(text: str) -> Number | None:
    """Return the value of a number with a decimal comma, `2,74`. The same text may also be a list of two numbers."""
    match = _DECIMAL_COMMA.fullmatch(text) if len(text) <= _MAX_NUMBER_LENGTH else None
    return Number(Fraction(f"{match[1]}{match[2]}.{match[3]}"), True, False) if match else None


def equal_numbers(one: Number, other: Number) -> bool:
    """Return True if two numbers are equal.

    Whole numbers and fractions are compared exactly. A decimal and a number that is not whole agree to 6 places.
    A percentage equals a hundredth of its number, and its number if that is at least 1: golds have all these forms.
    """
    if one.is_percent != other.is_percent:
        percent, plain = (one, other) if one.is_percent else (other, one)
        percent = percent._replace(is_percent=False)
        hundredth = percent._replace(value=percent.value / 100, is_decimal=True)
        # 25% for a gold answer 25 says the same, but 0.15% is not 0.15.
        return (abs(plain.value) >= 1 and equal_numbers(percent, plain)) or equal_numbers(hundredth, plain)
    if one.value == other.value:
        return True
    if not (one.is_decimal or other.is_decimal):
        return False
    if any(number.value.denominator == 1 and not number.is_decimal for number in (one, other)):
        return False
    if abs(one.value - other.value) > _RELATIVE_TOLERANCE * max(abs(one.value), abs(other.value)):
        return False
    return round(one.value, _DECIMAL_PLACES) == round(other.value, _DECIMAL_PLACES)


# --- numbers in words --------------------------------------------------------------------------------

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_SMALL = {word: number for number, word in enumerate((_UNITS + " seventeen eighteen nineteen").split())}
_TENS = {
    word: 10 * n
    for n, word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2)
}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_ORDINAL_NAMES = [
    "zeroth",
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
]
_ORDINALS = {word: number for number, word in enumerate(_ORDINAL_NAMES)}
_ORDINAL = re.compile(r"(\d+)\s?\^?\s?\{?(?:\\text\s?\{)?\s?(?:st|nd|rd|th)\s?\}*", re.ASCII)
_WITH_SCALE = re.compile(r"(.*[\d}%])[ -]?(?:\\text\s?\{\s?)?(hundred|thousand|million|billion|trillion|dozen)\s?\}?")


_PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4} | {
    f"{name}{ending}": number for name, number in _ORDINALS.items() if number > 2 for ending in ("", "s")
}


def parse_number_words(text: str) -> Number | None:
    """Return the value of "seven", "twenty-five", "two hundred", "5 million" or "3rd", or None for other text."""
    text = unwrap_text(text).lower()
    if match := _ORDINAL.fullmatch(text):
        return Number(Fraction(int(match[1])), False, False) if len(text) < 20 else None
    if match := _WITH_SCALE.fullmatch(text) if len(text) <= _MAX_NUMBER_LENGTH else None:
        number = parse_number(match[1].strip())
        return number and number._replace(value=number.value * _SCALES[match[2]])
    words = text.replace("-", " ").split()
    if words and words[-1] in _PARTS and (len(words) == 2 or text in ("half", "quarter")):  # "two thirds"
        count = {"a": 1}.get(words[0], _SMALL.get(words[0], 0)) if len(words) == 2 else 1
        return Number(Fraction(count, _PARTS[words[-1]]), False, False) if count else None
    if not words or len(words) > 12 or not all(w in _SMALL or w in _TENS or w in _SCALES or w == "and" for w in words):
        return Number(Fraction(_ORDINALS[text]), False, False) if text in _ORDINALS else None
    return _read_number_words([word for word in words if word != "and"])


def _read_number_words(words: list[str]) -> Number | None:
    total = group = last = 0  # `last` is the place of the word before: units follow tens, nothing follows units
    for position, word in enumerate(words):
        if word in _SCALES:
            if last == 0 and position:
                return None
            scale, group = _SCALES[word], group or 1
            total, group = (total, group * 100) if scale == 100 else (total + group * scale, 0)
            last = 3
        else:
            place = 2 if word in _TENS else 1
            if last == 1 or (last == 2 and (place == 2 or not 0 < _SMALL[word] < 10)):
                return None
            group += _TENS.get(word) or _SMALL[word]
            last = place
    return Number(Fraction(total + group), False, False) if words else None


# --- times, dates, bases and ranges ------------------------------------------------------------------

_MONTH_NAMES = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]
_MONTHS = {name[:length]: n for n, name in enumerate(_MONTH_NAMES, 1) for length in (3, len(name))} | {"sept": 9}
_MONTH = "(" + "|".join(sorted(_MONTHS, key=len, reverse=True)) + r")\.?"
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})(?::(\d{2}))?(?:\s?([ap])\.?\s?m\.?)?|(\d{1,2})\s?([ap])\.?\s?m\.?", re.ASCII)
_ISO_DATE = re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})", re.ASCII)
_SHORT_DATE = re.compile(r"(\d{1,2})([-/.])(\d{1,2})\2(\d{4})", re.ASCII)
_MONTH_FIRST = re.compile(rf"{_MONTH}\s(\d{{1,2}})(?:st|nd|rd|th)?(?:,?\s(\d{{4}}))?", re.ASCII)
_DAY_FIRST = re.compile(rf"(\d{{1,2}})(?:st|nd|rd|th)?\s(?:of\s)?{_MONTH}(?:,?\s(\d{{4}}))?", re.ASCII)
_BASE_SUBSCRIPT = r"\s?_\s?\{?\s?\(?(?:\\text\s?\{\s?)?([a-z]+|\d{1,2})\)?\s?\}*"
_IN_BASE = re.compile(
    r"([-+]?)(\d[\dA-F]*(?:\.[\dA-F]+)?|[A-F][\dA-F]+|\([\dA-F]+\))"
    rf"(?:{_BASE_SUBSCRIPT}|\s(?:in\s)?base[ -]([a-z]+|\d{{1,2}}))",
    re.ASCII,
)
_RANGE = re.compile(r"(\d+(?:\.\d+)?)(?:\s?-\s?|\sto\s|\s?\\text\s?\{\s?to\s?\}\s?)(\d+(?:\.\d+)?)", re.ASCII)
_RATIO = re.compile(r"\d+(?:\s?:\s?\d+)+|\d+(?:\sto\s\d+)+", re.ASCII)
_MAX_LITERAL_LENGTH = 60


class Literal(NamedTuple):
    """A time, a date, digits in a base or a range: text with a meaning that arithmetic would lose."""

    kind: str
    parts: tuple


def parse_literal(text: str) -> Literal | None:
    """Return the meaning of a time, a date, digits in a base or a range of numbers. Return None for other text.

    "3:4" may be a ratio and "12:30" a time. Only text that must be a time is read as a time.
    """
    if len(text) > _MAX_LITERAL_LENGTH:
        return None
    if wrapped := _IN_PARENTHESES.fullmatch(text):
        text = wrapped[1].strip()
    if match := _IN_BASE.fullmatch(text):
        name = match[3] or match[4]
        base = int(name) if name.isdigit() else _SMALL.get(name, 0)
        digits = match[2].strip("()").upper()
        if 2 <= base <= 36 and all(int(d, 36) < base for d in digits if d != "."):
            return Literal("base", (match[1].replace("+", ""), digits.lstrip("0") or "0", base))
    plain = unwrap_text(text).lower()
    if date := _parse_date(plain):
        return Literal("date", date)
    if match := _CLOCK.fullmatch(plain):
        hour, minute = int(match[1] or match[5]), int(match[2] or 0)
        if hour <= 24 and minute < 60:
            return Literal("time", (hour, minute, int(match[3] or 0), match[4] or match[6]))
    if (match := _RANGE.fullmatch(text)) and float(match[1]) < float(match[2]):
        return Literal("range", (Fraction(match[1]), Fraction(match[2])))
    if _RATIO.fullmatch(plain):
        terms = [int(term) for term in re.findall(r"\d+", plain)]
        divisor = math.gcd(*terms) or 1
        return Literal("ratio", tuple(term // divisor for term in terms))
    return None


def _parse_date(text: str) -> tuple | None:
    if match := _ISO_DATE.fullmatch(text):
        year, month, day = int(match[1]), int(match[3]), int(match[4])
    elif match := _MONTH_FIRST.fullmatch(text):
        year, month, day = int(match[3] or 0), _MONTHS[match[1]], int(match[2])
    elif match := _DAY_FIRST.fullmatch(text):
        year, month, day = int(match[3] or 0), _MONTHS[match[2]], int(match[1])
    elif match := _SHORT_DATE.fullmatch(text):  # whether the day or the month comes first is not known
        return ("as written", int(match[1]), int(match[3]), int(match[4]))
    else:
        return None
    return (year, month, day) if 1 <= month <= 12 and 1 <= day <= 31 else None


def equal_literals(
    predicted: Literal | None, gold: Literal | None, predicted_text: str, gold_text: str
) -> bool | None:
    """Compare two answers of which at least one is a literal. Return None if they may be equal as numbers."""
    if predicted and gold and predicted.kind == gold.kind:
        if gold.kind == "time":
            *clock, half = predicted.parts
            *gold_clock, gold_half = gold.parts
            is_same = clock == gold_clock and (gold_half is None or half == gold_half)
            return is_same or _to_24_hours(predicted) == _to_24_hours(gold) is not None
        return predicted.parts == gold.parts
    if predicted and gold and {predicted.kind, gold.kind} == {"ratio", "range"}:  # "2 to 3" may be either
        return predicted.parts == gold.parts
    literal, text = (predicted, gold_text) if predicted else (gold, predicted_text)
    assert literal
    if literal.kind == "base":  # the base may be left out, because the question names it
        return "".join(literal.parts[:2]) == text.lstrip("0")
    if literal.kind == "ratio":  # 7:32 is 7/32 too
        return None
    if literal.kind == "time":
        may_be_ratio = literal.parts[1] >= 10 and literal.parts[3] is None
        return None if may_be_ratio else False
    return False


def _to_24_hours(time: Literal) -> tuple[int, int, int] | None:
    """Return hours, minutes and seconds of a day, or None if the half of the day is not known."""
    hour, minute, second, half = time.parts
    if half is None:
        return (hour, minute, second) if hour > 12 else None
    return (hour % 12 + (12 if half == "p" else 0), minute, second)
