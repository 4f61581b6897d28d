"""Compare a final answer with the gold answer."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from typing import Any

from nabla_trl.grading.extraction import extract_answer, trim_answer


class MatchResult(str, Enum):
    """What came of one comparison. Only RIGHT is correct; the others are told apart to be counted."""

    CORRECT = "right"
    INCORRECT = "wrong"
    NO_ANSWER = "no_answer"  # nothing was predicted
    NO_GOLD = "no_gold"  # nothing to compare with
    BAD_GOLD = "bad_gold"  # the gold answer cannot be parsed
    TIMEOUT = "timeout"
    ERROR = "error"  # the comparison ended its worker, or ran out of memory

    @property
    def is_correct(self) -> bool:
        """True for RIGHT alone."""
        return self is MatchResult.CORRECT


_PLAIN_NUMBER = re.compile(r"([-+]?)((?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.(\d+))?|\.(\d+))", re.ASCII)


_ONLY_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z]+(?: [A-Za-z]+)*")


# Keywords of math-verify, which mean something in running text too.
_NOT_A_WORD = re.compile(r"\b(?:and|or|pct|percent\w*)\b", re.IGNORECASE)


_UNIT_WORDS = r"(?!(?:dozen|hundred|thousand|[mb]illion)\b)[A-Za-z]{3,}(?: [A-Za-z]+)*"


_WITH_UNIT = re.compile(rf"([-+]?[\d.,]*\d) ?({_UNIT_WORDS})")


# A gold answer that begins so names a question of reasoning-gym, whose family judges the answer: JSON follows.
VERIFIER_PREFIX = "reasoning_gym:"


_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\{(.*)\}", re.DOTALL)


_FLOAT_TOLERANCE = Decimal("0.000002")  # math-verify rounds floats to 6 decimals


@lru_cache(maxsize=1 << 16)
def normalize_answer(answer: str) -> str:
    r"""`answer` in one writing: trimmed, single spaces, no currency or `$` signs, no `\!`, no unary plus."""
    if _PLAIN_NUMBER.fullmatch(answer):
        return answer.removeprefix("+")
    text = re.sub(r"\\!\s*|\\?[$£€]|(?<!\\)\\[()\[\]]", "", trim_answer(answer))
    text = re.sub(r"\s*\bpercent\b", "%", text.replace("−", "-"))
    text = trim_answer(re.sub(r"\s+", " ", text)).rstrip("\\ ")
    return re.sub(r"^\+\s?(?=[\d.])", "", text)


@lru_cache(maxsize=1 << 16)
def parse_plain_number(text: str) -> tuple[Decimal, bool] | None:
    """(exact value, has decimals) of a plain number; None for other text and beyond a float's digits."""
    match = _PLAIN_NUMBER.fullmatch(text)
    decimals = match and (match[3] or match[4])
    if not match or len(text) > (16 if decimals else 300):
        return None
    return Decimal(text.replace(",", "")), bool(decimals)


def _match_fast(predicted: str, gold: str) -> MatchResult | None:
    """The verdict on two normalised answers where math-verify is certain to give the same; else None."""
    if (one := parse_plain_number(predicted)) and (other := parse_plain_number(gold)):
        gap = abs(one[0] - other[0])
        if 0 < gap < _FLOAT_TOLERANCE and (one[1] or other[1]):
            return None
        return MatchResult.INCORRECT if gap else MatchResult.CORRECT
    # Other text may be identical and yet not parse, and such a gold answer must not count as met.
    if predicted == gold and _ONLY_WORDS.fullmatch(gold) and not _NOT_A_WORD.search(gold):
        return MatchResult.CORRECT
    return None


@lru_cache(maxsize=1 << 16)
def _normalize_gold(gold: str) -> str | None:
    """The normalised gold answer, also out of a worked solution (with a box or ####); None: none in it."""
    marked = re.search(r"\\boxed|\\fbox|####", gold)
    return normalize_answer((extract_answer(gold) or "") if marked else gold) or None


def match_without_worker(predicted: str | None, gold: str | None) -> MatchResult | tuple[str, str]:
    """A verdict that needs no worker, or the normalised pair that needs one."""
    if gold is None or not gold.strip():
        return MatchResult.NO_GOLD
    if gold.startswith(VERIFIER_PREFIX):  # its scorer reads the answer as it was written
        return (predicted.strip(), gold) if predicted and predicted.strip() else MatchResult.NO_ANSWER
    if (gold := _normalize_gold(gold)) is None:
        return MatchResult.BAD_GOLD
    if not predicted or not (predicted := normalize_answer(predicted)):
        return MatchResult.NO_ANSWER
    return _match_fast(predicted, gold) or (predicted, gold)


def match_answers(predicted: str, gold: str) -> str:
    """The `Verdict` value of two normalised answers by math-verify, however long it takes; for workers."""
    if gold.startswith(VERIFIER_PREFIX):
        return _score_with_reasoning_gym(predicted, gold).value
    from math_verify import verify

    try:
        parsed = _parse_with_math_verify(gold)
        if not parsed:
            return MatchResult.BAD_GOLD.value
        right = verify(parsed, _parse_with_math_verify(predicted), timeout_seconds=None, raise_on_error=True)
    except (MemoryError, RecursionError):
        return MatchResult.ERROR.value
    except Exception:  # math-verify's own reading of a comparison it cannot make: not shown equal
        return MatchResult.INCORRECT.value
    return (MatchResult.CORRECT if right else MatchResult.INCORRECT).value


def _score_with_reasoning_gym(predicted: str, gold: str) -> MatchResult:
    """RIGHT where a family of reasoning-gym gives the answer its full score, 1. An empty one only loads the package.

    Raises ImportError where the package is missing, which ends the worker.
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
        return (
            MatchResult.CORRECT
            if family.score_answer(predicted, family[source["index"]]) == 1
            else MatchResult.INCORRECT
        )
    except (MemoryError, RecursionError):
        return MatchResult.ERROR
    except Exception:  # a scorer that chokes on the answer
        return MatchResult.INCORRECT


@lru_cache(maxsize=8)
def _load_reasoning_gym_dataset(source: str) -> Any:
    import reasoning_gym

    made = json.loads(source)
    return reasoning_gym.create_dataset(made["name"], seed=made["seed"], size=made["size"], **made["options"])


def _parse_with_math_verify(answer: str) -> list:
    """`answer`, the whole of it, as math-verify's expressions; empty if it is not mathematics."""
    from math_verify import LatexExtractionConfig, parse

    if _ONLY_WORDS.fullmatch(answer):  # or letters become a product, and "Paris" equals "pairs"
        answer = rf"\text{{{answer}}}"
    elif match := _WITH_UNIT.fullmatch(answer):
        answer = rf"{match[1]}\text{{ {match[2]}}}"
    # LaTeX only: the plain reader would take any number it can find in text that it cannot parse.
    config = [LatexExtractionConfig()]
    return parse(f"${answer}$", config, fallback_mode="no_fallback", parsing_timeout=None)
