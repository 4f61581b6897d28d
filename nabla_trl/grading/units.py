r"""Split an answer into its value and its unit, and compare units: 5 km is 5000 m, and neither is 5 m or 5 hours."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from nabla_trl.grading.literals import unwrap_text


class Unit(NamedTuple):
    """What a value is measured in. Two values can be compared if their dimensions are equal.

    Attributes:
        dimension: the quantity and its power, such as ("length", 2), or the words of a unit that is not known.
        factor: how many base units of the dimension the unit is.
        is_known: False for words such as "apples", which say what is counted.
    """

    dimension: tuple
    factor: Fraction
    is_known: bool = True


_NAMES = {
    ("length", "1/1000"): "mm millimeter millimeters millimetre millimetres",
    ("length", "1/100"): "cm centimeter centimeters centimetre centimetres",
    ("length", "1/10"): "dm decimeter decimeters",
    ("length", "1"): "m meter meters metre metres",
    ("length", "1000"): "km kilometer kilometers kilometre kilometres",
    ("length", "0.0254"): "in inch inches",
    ("length", "0.3048"): "ft foot feet",
    ("length", "0.9144"): "yd yard yards",
    ("length", "1609.344"): "mi mile miles",
    ("mass", "1/1000"): "mg milligram milligrams",
    ("mass", "1"): "g gram grams",
    ("mass", "1000"): "kg kilogram kilograms",
    ("mass", "453.59237"): "lb lbs",
    ("mass", "28.349523125"): "oz ounce ounces",
    ("time", "1/1000"): "ms millisecond milliseconds",
    ("time", "1"): "s sec secs second seconds",
    ("time", "60"): "min mins minute minutes",
    ("time", "3600"): "h hr hrs hour hours",
    ("time", "86400"): "day days",
    ("time", "604800"): "week weeks",
    ("months", "1"): "month months",
    ("months", "12"): "yr yrs year years",
    ("volume", "1/1000"): "ml mL milliliter milliliters millilitre millilitres",
    ("volume", "1"): "l L liter liters litre litres",
    ("gallons", "1"): "gallon gallons gal",
    ("gallons", "1/4"): "quart quarts",
    ("gallons", "1/8"): "pint pints",
    ("dollars", "1"): "dollar dollars usd USD",
    ("dollars", "1/100"): "cent cents",
    ("euros", "1"): "euro euros EUR",
    ("sterling", "1"): "GBP",
    ("yuan", "1"): "yuan RMB CNY",
    ("yen", "1"): "yen JPY",
    ("rupees", "1"): "rupee rupees Rs Rs.",
    ("angle", "1"): "degree degrees deg",
    ("radians", "1"): "radian radians rad",
    ("speed", "1609.344"): "mph",
    ("speed", "1000"): "kph kmph kmh",
}
_KNOWN = {
    name: Unit((quantity, 1), Fraction(factor))
    for (quantity, factor), names in _NAMES.items()
    for name in names.split()
}
DEGREE = _KNOWN["degree"]
_CURRENCIES = {"$": "dollars", "€": "euros", "£": "GBP"}
_MONEY = re.compile(r"([-+]?)\s?\\?([$€£])\s?([-+]?[\d.,]*\d)|([-+]?[\d.,]*\d)\s?\\?([$€£])", re.ASCII)
# A value, then letters that no operator joins to it. The last group is a power, as in cm^2.
_ENDS_IN_TEXT = re.compile(r"(.*?[^\s\\])\s?((?:\\text\s?\{[^{}]*\}\s?)+)(?:\^\s?\{?\s?([23])\s?\}?)?")
_ENDS_IN_WORDS = re.compile(
    r"(.*?(?:[\d}\)%]|\\pi))\s?((?<=\s)[A-Za-z][A-Za-z./]*|[A-Za-z]{2,}[A-Za-z/]*)((?:\s[A-Za-z][A-Za-z./]*)*)"
    r"(?:\^\s?\{?\s?([23])\s?\}?)?"
)
_ENDS_IN_DEGREES = re.compile(r"(.+?)\s?\^\s?\{?\\circ\s?\}?\s?([CFK]?)")
_SINE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])[^()+-]*\\circ")
_POWER_WORDS = {"square": 2, "squared": 2, "sq": 2, "sq.": 2, "cubic": 3, "cubed": 3, "cu": 3}
_NOT_UNITS = re.compile(r"\b(?:and|or|to|base|mod|sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|if|for|where|inf)\b")
_SCALES = re.compile(r"(?:hundred|thousand|million|billion|trillion|dozen)\b")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s?([A-Za-z]+)", re.ASCII)
_QUANTITIES = re.compile(rf"{_QUANTITY.pattern}(?:,?\s(?:and\s)?{_QUANTITY.pattern})+", re.ASCII)
_MAX_UNIT_LENGTH = 80


def split_money(text: str) -> tuple[str, str] | None:
    """Return the amount and the currency's name of an answer such as "$18" as it was written. Else return None."""
    match = _MONEY.fullmatch(text) if len(text) <= _MAX_UNIT_LENGTH else None
    if not match:
        return None
    return (f"{match[1]}{match[3]}" if match[3] else match[4]), _CURRENCIES[match[2] or match[5]]


def add_quantities(text: str) -> tuple[Fraction, tuple] | None:
    """Return the sum and the dimension of "2 hours 30 minutes", in base units, or None for other text."""
    plain = unwrap_text(text)
    if len(plain) > _MAX_UNIT_LENGTH or not _QUANTITIES.fullmatch(plain):
        return None
    quantities = [(Fraction(number), _read_unit(name, 1)) for number, name in _QUANTITY.findall(plain)]
    dimensions = {unit.dimension for _, unit in quantities}
    if len(quantities) < 2 or len(dimensions) != 1 or not all(unit.is_known for _, unit in quantities):
        return None
    return sum((number * unit.factor for number, unit in quantities), Fraction(0)), dimensions.pop()


@lru_cache(maxsize=1 << 14)
def split_unit(text: str) -> tuple[str, Unit | None]:
    r"""Return the value of a normalized answer and its unit, or the text and None if it has no unit.

    A unit is `^\circ`, `\text{…}` after a value, a word of several letters, or a known letter after a space. The `d`
    of `2d` is a variable.
    """
    if _SINE.search(text):  # the degrees of \sin 1^\circ belong to its argument
        return text, None
    if match := _ENDS_IN_DEGREES.fullmatch(text[-_MAX_UNIT_LENGTH:]):
        scale = Unit((f"degrees {match[2]}", 1), Fraction(1)) if match[2] else DEGREE
        return text[:-_MAX_UNIT_LENGTH] + match[1], scale
    if len(text) > _MAX_UNIT_LENGTH and not text.endswith("}"):
        return text, None
    if match := _ENDS_IN_TEXT.fullmatch(text):
        value, words, power = match[1], unwrap_text(match[2]), int(match[3] or 1)
    elif (match := _ENDS_IN_WORDS.fullmatch(text)) and "\\" not in match[2]:
        value, words, power = match[1], f"{match[2]}{match[3]}", int(match[4] or 1)
        if value.endswith(r"\pi") and (len(words) == 1 or words not in _KNOWN):  # the r of 2\pi r is a variable
            return text, None
    else:
        return text, None
    if (
        not words
        or _NOT_UNITS.search(words.lower())
        or _SCALES.match(words.lower())
        or not re.search(r"[\d}a-z]", value)
    ):
        return text, None
    if re.match(r"(?:st|nd|rd|th|[ap]\.?m\b)", words):  # an ordinal or a time
        return text, None
    return value.strip(), _read_unit(words, power)


def _read_unit(words: str, power: int) -> Unit:
    parts = words.replace(" per ", "/").split("/")
    units = [_read_simple_unit(part) for part in parts]
    if not all(units) or len(parts) > 2:
        return Unit(("words", words.lower()), Fraction(1), is_known=False)
    unit = units[0]
    assert unit
    if unit.dimension == ("radians", 1):  # the number of radians is the angle itself
        return Unit(("words", "radians"), Fraction(1), is_known=False)
    if len(parts) == 2 and units[1]:
        if (unit.dimension, units[1].dimension) == (("length", 1), ("time", 1)):
            return Unit(("speed", power), unit.factor / units[1].factor * 3600)
        return Unit((*unit.dimension, "per", *units[1].dimension), unit.factor / units[1].factor)
    return Unit((unit.dimension[0], unit.dimension[1] * power), unit.factor**power)


def _read_simple_unit(words: str) -> Unit | None:
    names = words.split()
    powers = [_POWER_WORDS[name.lower()] for name in names if name.lower() in _POWER_WORDS]
    names = [name for name in names if name.lower() not in _POWER_WORDS]
    if len(names) != 1 or len(powers) > 1:
        return None
    unit = _KNOWN.get(names[0]) or _KNOWN.get(names[0].lower()) or _KNOWN.get(names[0].rstrip("."))
    power = powers[0] if powers else 1
    return unit and Unit((unit.dimension[0], power), unit.factor**power)


def are_comparable(one: Unit | None, other: Unit | None) -> bool:
    """Return False if two units measure different quantities. Words such as "apples" are not compared."""
    return one is None or other is None or not (one.is_known and other.is_known) or one.dimension == other.dimension
