"""Compare a final answer with the gold answer. Neither torch nor sympy is imported with this module.

`match_without_worker` returns the results that are certain at once. `match_answers` also asks math-verify, which may
hang, so it runs in the workers of `nabla_trl.grading.checker`. Both follow the same order: identical text, numbers,
times and dates, units, words, and only then the parts of lists and computer algebra.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from typing import Any

from nabla_trl.grading.algebra import load_math_verify, match_with_math_verify, parse_with_math_verify
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.grading.literals import (
    equal_literals,
    equal_numbers,
    parse_decimal_comma,
    parse_literal,
    parse_number,
    parse_number_words,
    unwrap_text,
)
from nabla_trl.grading.notation import normalize_answer, rewrite_symbols, trim_answer
from nabla_trl.grading.structure import Parts, split_inequalities, split_name, split_parts, write_as_union
from nabla_trl.grading.units import DEGREE, Unit, add_quantities, are_comparable, split_money, split_unit

__all__ = ["MatchResult", "match_answers", "match_without_worker", "normalize_answer", "parse_plain_number"]


class MatchResult(str, Enum):
    """The result of one comparison. All results but CORRECT count as incorrect."""

    CORRECT = "correct"
    INCORRECT = "incorrect"
    NO_ANSWER = "no_answer"  # there is no predicted answer
    NO_GOLD = "no_gold"  # there is no gold answer
    BAD_GOLD = "bad_gold"  # the gold answer cannot be parsed
    TIMEOUT = "timeout"
    ERROR = "error"  # the comparison ended its worker or ran out of memory

    @property
    def is_correct(self) -> bool:
        """True for CORRECT alone."""
        return self is MatchResult.CORRECT


# A gold answer with this prefix names a question of reasoning-gym, whose family scores the answer. JSON follows.
VERIFIER_PREFIX = "reasoning_gym:"
_PLAIN_NUMBER = re.compile(r"([-+]?)((?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.(\d+))?|\.(\d+))", re.ASCII)
# Longer answers are compared in a worker, because some patterns need more than linear time.
_MAX_FAST_LENGTH = 300
_MAX_PARTS_WITH_ALGEBRA = 12
_ASSIGNMENT = re.compile(r"(?:\\[a-z]+ ?)?[A-Za-z]{1,3}(?:_\{?\w+\}?)?(?:\([A-Za-z\d, ]+\))? ?= ?([^=<>,;]+)")
_CHOICE = re.compile(r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer) )?(?:\\text\s?)?[({]*\s?([A-J])\s?[)}]*")
_CHOICE_WITH_VALUE = re.compile(r"(?:\\text\s?\{\s?)?\(?([A-J])(?:\)|[.:](?=\s))\s?\}?\s?(.+)")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\{(.*)\}", re.DOTALL)
_SPACE_AT_SYMBOL = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")
_YES_OR_NO = re.compile(r"(yes|no|true|false)(?=[,.;:]|$)", re.IGNORECASE)
_LETTER_AS_UNIT = re.compile(r"([-+]?[\d.,]*\d)(?: ?[msghLl]| [KNJWVACF])", re.ASCII)
_PRIME = re.compile(r"(?<=[A-Za-z)}'])'(?![A-Za-z])")  # not the feet of 6'
_SINE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_SINE_OF_DEGREES = re.compile(rf"{_SINE.pattern}[^=,;]{{0,40}}\\circ")
_MATH_WORDS = frozenset({"infinity", "inf", "pi", "and", "or", "exp", "sin", "cos", "tan", "log"})


@lru_cache(maxsize=1 << 16)
def parse_plain_number(text: str) -> tuple[Decimal, bool] | None:
    """Return (exact value, has decimals) of a plain number. Return None for other text and too many digits."""
    match = _PLAIN_NUMBER.fullmatch(text)
    decimals = match and (match[3] or match[4])
    if not match or len(text) > (16 if decimals else 300):
        return None
    return Decimal(text.replace(",", "")), bool(decimals)


@lru_cache(maxsize=1 << 16)
def _prepare(answer: str) -> str:
    """Return a normalized answer in which a currency sign has become a unit."""
    if money := split_money(trim_answer(rewrite_symbols(answer)) if len(answer) <= _MAX_FAST_LENGTH else ""):
        amount, currency = money
        return f"{amount} {currency}"
    text = normalize_answer(answer)
    if len(text) > _MAX_FAST_LENGTH:
        return text
    if match := _SET_BY_PROPERTY.fullmatch(text):  # the set of all x with x > 3
        text = match[2].strip()
    return _MEANINGS.get(unwrap_text(text).lower(), text)


_SET_BY_PROPERTY = re.compile(
    r"\\\{ ?([a-z])(?: ?\\in ?\\mathbb ?\{R\})? ?(?:\\mid|\||:) ?([^:|{}]*[<>q][^:|{}]*)\\\}"
)
_MEANINGS = {
    **dict.fromkeys(
        ("all real numbers", "all reals", "the set of all real numbers", r"(-\infty,\infty)"), r"\mathbb{R}"
    ),
    **dict.fromkeys(("no solution", "no solutions", "no real solutions", "the empty set", "empty set"), r"\emptyset"),
    **{"infinity": r"\infty", "negative infinity": r"-\infty", "does not exist": "DNE", "noon": "12:00 PM"},
    **{"midnight": "12:00 AM", r"\{ \}": r"\emptyset", r"\{\}": r"\emptyset"},
}


@lru_cache(maxsize=1 << 16)
def _prepare_gold(gold: str) -> str | None:
    """Return the normalized gold answer, also of a worked solution that marks it, or None if there is none."""
    is_solution = re.search(r"\\boxed|\\fbox|####|\b[Ff]inal answer is\b", gold)
    return _prepare((extract_answer(gold) or "") if is_solution else gold) or None


def match_without_worker(predicted: str | None, gold: str | None) -> MatchResult | tuple[str, str]:
    """Return the result if it needs no worker, or else the normalized (predicted, gold) pair for a worker."""
    if gold is None or not gold.strip():
        return MatchResult.NO_GOLD
    if gold.startswith(VERIFIER_PREFIX):  # its scorer reads the answer without normalization
        return (predicted.strip(), gold) if predicted and predicted.strip() else MatchResult.NO_ANSWER
    if predicted and (result := _match_plain_numbers(predicted, gold)):
        return result
    if (gold := _prepare_gold(gold)) is None:
        return MatchResult.BAD_GOLD
    if not predicted or not (predicted := _prepare(predicted)):
        return MatchResult.NO_ANSWER
    if max(len(predicted), len(gold)) > _MAX_FAST_LENGTH:
        return MatchResult.CORRECT if _is_identical(predicted, gold) else (predicted, gold)
    if _match_texts(predicted, gold):
        return MatchResult.CORRECT
    is_certain = parse_number(predicted) and parse_number(gold)
    return MatchResult.INCORRECT if is_certain else (predicted, gold)


def _match_plain_numbers(predicted: str, gold: str) -> MatchResult | None:
    """Compare the most frequent answers, which are plain numbers, without any other work."""
    number, gold_number = parse_plain_number(predicted), parse_plain_number(gold)
    if number is None or gold_number is None:
        return None
    if number[0] == gold_number[0]:
        return MatchResult.CORRECT
    return None if number[1] or gold_number[1] else MatchResult.INCORRECT


def match_answers(predicted: str, gold: str) -> str:
    """Return the `MatchResult` value of two normalized answers. For workers, because computer algebra may hang."""
    if gold.startswith(VERIFIER_PREFIX):
        return _score_with_reasoning_gym(predicted, gold).value
    load_math_verify()  # with the first call, whose time does not count
    try:
        if _match(predicted, gold):
            return MatchResult.CORRECT.value
        # A gold answer that is neither text nor mathematics can never be met.
        is_readable = _match_texts(gold, gold, identical=False) is not None or len(split_parts(gold).parts) > 1
        return (MatchResult.INCORRECT if is_readable or parse_with_math_verify(gold) else MatchResult.BAD_GOLD).value
    except (MemoryError, RecursionError):
        return MatchResult.ERROR.value
    except Exception:  # a comparison that cannot be made does not show that the answers are equal
        return MatchResult.INCORRECT.value


# --- without computer algebra ------------------------------------------------------------------------


def _match_texts(predicted: str, gold: str, identical: bool = True) -> bool | None:
    """Compare two normalized answers as text, numbers, literals, words and units. Return None if that cannot decide.

    Args:
        predicted: the normalized predicted answer.
        gold: the normalized gold answer.
        identical: whether identical text is equal, also if nothing else is known about it.
    """
    if identical and _is_identical(predicted, gold):
        return True
    if ("=" in predicted) != ("=" in gold):
        predicted, gold = _strip_name(predicted), _strip_name(gold)
    number, gold_number = parse_number(predicted), parse_number(gold)
    if number and gold_number:
        return equal_numbers(number, gold_number)
    literal, gold_literal = parse_literal(predicted), parse_literal(gold)
    if literal or gold_literal:
        is_equal = equal_literals(literal, gold_literal, predicted, gold)
        if is_equal is not None:
            return is_equal
    if (is_equal := _match_number_forms(predicted, gold)) is not None:
        return is_equal
    if (is_equal := _match_choices(predicted, gold)) is not None:
        return is_equal
    if (is_equal := _match_words(predicted, gold)) is not None:
        return is_equal
    return _match_units(predicted, gold, _match_texts)


def _strip_name(text: str) -> str:
    """Return the value of `x = 5`. Equations such as `2x + z = 5` stay whole."""
    match = _ASSIGNMENT.fullmatch(text)
    return match[1] if match else text


def _is_identical(predicted: str, gold: str) -> bool:
    """Return True for the same text but for case in words and space at symbols. Text that was cut off never is."""
    if predicted != gold:
        predicted, gold = (_SPACE_AT_SYMBOL.sub("", text) for text in (predicted, gold))
    return predicted == gold and _is_balanced(gold)


def _is_balanced(text: str) -> bool:
    plain = text.replace(r"\\", "").replace(r"\{", "").replace(r"\}", "")
    return plain.count("{") == plain.count("}") and text.count(r"\begin{") == text.count(r"\end{")


def _match_number_forms(predicted: str, gold: str) -> bool | None:
    """Compare a number with a number in words ("seven", "5 million", "3rd") or with a decimal comma ("2,74")."""
    number, gold_number = parse_number(predicted), parse_number(gold)
    in_words = number or parse_number_words(predicted)
    gold_in_words = gold_number or parse_number_words(gold)
    if in_words and gold_in_words:
        return equal_numbers(in_words, gold_in_words)
    with_comma, gold_with_comma = number or parse_decimal_comma(predicted), gold_number or parse_decimal_comma(gold)
    if (number or gold_number) and with_comma and gold_with_comma and equal_numbers(with_comma, gold_with_comma):
        return True
    return None


def _match_choices(predicted: str, gold: str) -> bool | None:
    """Compare letters of a multiple choice: "C" is "(C)", "c" and "C. 12"."""
    letter, gold_letter = _CHOICE.fullmatch(predicted), _CHOICE.fullmatch(gold)
    with_value, gold_with_value = _CHOICE_WITH_VALUE.fullmatch(predicted), _CHOICE_WITH_VALUE.fullmatch(gold)
    if gold_letter:
        if letter or with_value:
            return (letter or with_value)[1] == gold_letter[1]  # type: ignore[index]
        lower = re.fullmatch(r"(?:\\text\s?)?[({]*\s?([a-j])\s?[)}]*", predicted)
        return True if lower and lower[1].upper() == gold_letter[1] and gold_letter[1] != "E" else None
    if gold_with_value and letter:
        return letter[1] == gold_with_value[1]
    if gold_with_value and with_value:
        is_equal = _match_texts(with_value[2], gold_with_value[2])
        return False if with_value[1] != gold_with_value[1] else is_equal
    if gold_with_value:
        return _match_texts(predicted, gold_with_value[2])
    return True if with_value and _match_texts(with_value[2], gold) else None


def _match_words(predicted: str, gold: str) -> bool | None:
    """Compare words of any script without regard to case. Return None if the gold answer is not made of words."""
    gold_words = _read_words(gold)
    if gold_words is None:
        return None
    if gold_words in ("yes", "no", "true", "false") and (match := _YES_OR_NO.match(unwrap_text(predicted))):
        return match[1].lower() == gold_words
    if (words := _read_words(predicted)) is not None:
        return words == gold_words
    return None if any(char.isalpha() for char in predicted) else False


def _read_words(text: str) -> str | None:
    """Return the words of a text in a common form, or None if it has digits, symbols or only short words."""
    plain = unwrap_text(text).strip(" \"'")
    if re.search(r"[\d\\^_=<>+*/{}()\[\]|,;:!%]", plain):
        return None
    plain = unicodedata.normalize("NFC", plain).casefold().strip(" .\"'")
    words = plain.split()
    is_plain_ascii = plain.isascii() and not any(len(word) >= 3 for word in words)
    if not words or is_plain_ascii or _MATH_WORDS.intersection(words) or not any(map(str.isalpha, plain)):
        return None
    return " ".join(words[1:] if words[0] in ("the", "a", "an") and len(words) > 1 else words)


def _match_units(predicted: str, gold: str, match: Callable[[str, str], bool | None]) -> bool | None:
    """Compare the values of two answers if one of them has a unit, and their units if both have one."""
    (value, unit), (gold_value, gold_unit) = split_unit(predicted), split_unit(gold)
    total, gold_total = add_quantities(predicted), add_quantities(gold)
    if total or gold_total:
        total, gold_total = total or _in_base_units(value, unit), gold_total or _in_base_units(gold_value, gold_unit)
        return total == gold_total
    if unit is None and gold_unit is None:
        # In "5m" beside the gold answer 5, the letter is a unit. In a gold answer it is a variable.
        lettered = _LETTER_AS_UNIT.fullmatch(predicted)
        return match(lettered[1], gold) if lettered and parse_number(gold) else None
    if not are_comparable(unit, gold_unit):
        return False
    if unit == DEGREE and (gold_unit is None or not gold_unit.is_known) and r"\pi" in gold:
        return match(rf"\frac{{({value})\pi}}{{180}}", gold_value)
    if gold_unit == DEGREE and (unit is None or not unit.is_known) and r"\pi" in predicted:
        return match(value, rf"\frac{{({gold_value})\pi}}{{180}}")
    number, gold_number = parse_number(value), parse_number(gold_value)
    if number and gold_number and unit and gold_unit and unit.is_known and gold_unit.is_known:
        scaled, gold_scaled = number.value * unit.factor, gold_number.value * gold_unit.factor
        return equal_numbers(number._replace(value=scaled), gold_number._replace(value=gold_scaled))
    if unit and gold_unit and unit.is_known and gold_unit.is_known and unit.factor != gold_unit.factor:
        return False
    return match(value, gold_value)


def _in_base_units(value: str, unit: Unit | None) -> tuple[Fraction, tuple] | None:
    number = parse_number(value)
    return (number.value * unit.factor, unit.dimension) if number and unit and unit.is_known else None


# --- families of reasoning-gym -----------------------------------------------------------------------


def _score_with_reasoning_gym(predicted: str, gold: str) -> MatchResult:
    """Return CORRECT if a family of reasoning-gym gives the answer the full score, 1.

    An empty answer only loads the package. A missing package raises an ImportError, which ends the worker.
    """
    import reasoning_gym  # noqa: F401

    if not predicted:
        return MatchResult.INCORRECT
    source = json.loads(gold.removeprefix(VERIFIER_PREFIX))
    if wrapped := _LATEX_TEXT.fullmatch(predicted):
        predicted = wrapped[1]
    try:
        family = _load_reasoning_gym_dataset(
            json.dumps({name: source[name] for name in ("name", "seed", "size", "options")})
        )
        is_full_score = family.score_answer(predicted, family[source["index"]]) == 1
        return MatchResult.CORRECT if is_full_score else MatchResult.INCORRECT
    except (MemoryError, RecursionError):
        return MatchResult.ERROR
    except Exception:  # a scorer that cannot read the answer
        return MatchResult.INCORRECT


@lru_cache(maxsize=8)
def _load_reasoning_gym_dataset(source: str) -> Any:
    import reasoning_gym

    config = json.loads(source)
    return reasoning_gym.create_dataset(config["name"], seed=config["seed"], size=config["size"], **config["options"])


# --- with computer algebra ---------------------------------------------------------------------------


def _match(predicted: str, gold: str) -> bool:
    """Compare two normalized answers: by text, then part by part, then by math-verify."""
    if _differ_in_marks(predicted, gold):
        return False
    if (is_equal := _match_texts(predicted, gold)) is not None:
        return is_equal
    parts, gold_parts = split_parts(predicted), split_parts(gold)
    if (is_equal := _match_parts(parts, gold_parts)) is not None:
        return is_equal
    chain, gold_chain = split_inequalities(predicted), split_inequalities(gold)
    if chain and gold_chain and len(chain[0]) == len(gold_chain[0]):
        return chain[1] == gold_chain[1] and all(map(_match, chain[0], gold_chain[0]))
    if (is_equal := _match_units(predicted, gold, _match)) is not None:
        return is_equal
    as_union, gold_as_union = write_as_union(predicted), write_as_union(gold)
    if (as_union or gold_as_union) and match_with_math_verify(as_union or predicted, gold_as_union or gold):
        return True
    return match_with_math_verify(predicted, gold)


def _differ_in_marks(predicted: str, gold: str) -> bool:
    r"""Return True if only one answer has a prime, or only one sine is of degrees. math-verify drops both marks."""
    primes, gold_primes = (len(_PRIME.findall(text)) for text in (predicted, gold))
    degrees, gold_degrees = (bool(_SINE_OF_DEGREES.search(text)) for text in (predicted, gold))
    has_sines = bool(_SINE.search(predicted) and _SINE.search(gold))
    return primes != gold_primes or (has_sines and degrees != gold_degrees)


def _match_parts(predicted: Parts, gold: Parts) -> bool | None:
    """Compare answers of several parts. Return None if one of them has a single part, or if algebra may find more."""
    if len(predicted.parts) != len(gold.parts):
        for parts, other in ((predicted, gold), (gold, predicted)):
            if parts.brackets == r"\{\}" and len(parts.parts) == 1 and (inner := split_parts(parts.parts[0])).brackets:
                return _match_parts(inner, other) if parts is predicted else _match_parts(other, inner)
    if len(gold.parts) == 1 and not gold.brackets and len(predicted.parts) > 1 and not predicted.brackets:
        return True if all(_match(part, gold.parts[0]) for part in predicted.parts) else None
    if len(predicted.parts) != len(gold.parts):
        # math-verify compares lists as sets, in which a part that comes twice counts once.
        is_list = min(len(predicted.parts), len(gold.parts)) > 1 and predicted.brackets == gold.brackets == ""
        return False if is_list and all(map(parse_number, predicted.parts + gold.parts)) else None
    if len(gold.parts) < 2 and not gold.brackets:
        return None
    is_ordered = _is_ordered(predicted, gold)
    if is_ordered is None:
        return False
    names, values = zip(*map(split_name, predicted.parts), strict=True)
    gold_names, gold_values = zip(*map(split_name, gold.parts), strict=True)
    has_names, gold_has_names = all(names), all(gold_names)
    if has_names and not gold_has_names and not any(gold_names):
        is_ordered = is_ordered or len(set(names)) > 1
        predicted = Parts("", list(values))
    elif gold_has_names and not any(names):
        is_ordered = is_ordered or len(set(gold_names)) > 1
        gold = Parts("", list(gold_values))
    elif gold_names[0] and not any(gold_names[1:]) and len(set(names) - {gold_names[0]}) <= 1:  # n = 1, 2, 3
        predicted, gold = Parts("", list(values)), Parts("", list(gold_values))
    if is_ordered:
        is_equal = all(map(_match, predicted.parts, gold.parts))
    elif len(gold.parts) > _MAX_PARTS_WITH_ALGEBRA:
        is_equal = _match_in_any_order(predicted.parts, gold.parts, lambda one, other: bool(_match_texts(one, other)))
    else:
        is_equal = _match_in_any_order(predicted.parts, gold.parts, _match)
    if is_equal:
        return True
    # What text alone decides for every pair of parts is certain.
    is_decided = all(_match_texts(one, other) is not None for one in predicted.parts for other in gold.parts)
    return False if is_decided or gold.in_order else None


def _is_ordered(predicted: Parts, gold: Parts) -> bool | None:
    """Return whether the order of the parts matters, or None if the brackets say that the answers differ."""
    brackets, gold_brackets, is_long = predicted.brackets, gold.brackets, len(gold.parts) > 2
    if gold.in_order:
        return True
    if gold_brackets == "":  # a plain list
        return False if brackets in ("", r"\{\}", "()") or is_long else None if brackets != "[]" else False
    if gold_brackets == r"\{\}":
        return False if brackets in ("", r"\{\}") else None
    if brackets == gold_brackets or (gold_brackets == "()" and brackets == ""):
        return True
    return True if is_long and {brackets, gold_brackets} <= {"", "()", "[]"} else None


def _match_in_any_order(parts: list[str], gold_parts: list[str], match: Callable[[str, str], bool]) -> bool:
    remaining = list(gold_parts)
    for part in parts:
        # Identical parts first, so that the others are rarely compared.
        partner = next((gold for gold in remaining if _is_identical(part, gold)), None)
        if partner is None:
            partner = next((gold for gold in remaining if match(part, gold)), None)
        if partner is None:
            return False
        remaining.remove(partner)
    return True
