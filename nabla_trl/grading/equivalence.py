"""Compare a final answer with the gold answer. Neither torch nor sympy is imported with this module.

`match_without_worker` returns the results that are certain at once. `match_answers` asks math-verify, which may hang,
so it runs in the workers of `nabla_trl.grading.checker`.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from typing import Any

from nabla_trl.grading.extraction import extract_answer, trim_answer


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
_FLOAT_TOLERANCE = Decimal("0.000002")  # math-verify rounds floats to 6 decimals
_PLAIN_NUMBER = re.compile(r"([-+]?)((?:[1-9]\d{0,2}(?:,\d{3})+|\d+)(?:\.(\d+))?|\.(\d+))", re.ASCII)
_ONLY_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z]+(?: [A-Za-z]+)*")
# Keywords of math-verify, which have a meaning in text too.
_NOT_A_WORD = re.compile(r"\b(?:and|or|pct|percent\w*)\b", re.IGNORECASE)
_UNIT_WORDS = r"(?!(?:dozen|hundred|thousand|[mb]illion)\b)[A-Za-z]{3,}(?: [A-Za-z]+)*"
_WITH_UNIT = re.compile(rf"([-+]?[\d.,]*\d) ?({_UNIT_WORDS})")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\{(.*)\}", re.DOTALL)


@lru_cache(maxsize=1 << 16)
def normalize_answer(answer: str) -> str:
    r"""Return an answer in a normal form: trimmed, with single spaces, without `$`, `\!`, currency and unary plus."""
    if _PLAIN_NUMBER.fullmatch(answer):
        return answer.removeprefix("+")
    text = re.sub(r"\\!\s*|\\?[$£€]|(?<!\\)\\[()\[\]]", "", trim_answer(answer))
    text = re.sub(r"\s*\bpercent\b", "%", text.replace("−", "-"))
    text = trim_answer(re.sub(r"\s+", " ", text)).rstrip("\\ ")
    return re.sub(r"^\+\s?(?=[\d.])", "", text)


@lru_cache(maxsize=1 << 16)
def parse_plain_number(text: str) -> tuple[Decimal, bool] | None:
    """Return (exact value, has decimals) of a plain number. Return None for other text and too many digits."""
    match = _PLAIN_NUMBER.fullmatch(text)
    decimals = match and (match[3] or match[4])
    if not match or len(text) > (16 if decimals else 300):
        return None
    return Decimal(text.replace(",", "")), bool(decimals)


def _match_fast(predicted: str, gold: str) -> MatchResult | None:
    """Compare two normalized answers if math-verify is certain to give the same result. Else return None."""
    if (number := parse_plain_number(predicted)) and (gold_number := parse_plain_number(gold)):
        gap = abs(number[0] - gold_number[0])
        if 0 < gap < _FLOAT_TOLERANCE and (number[1] or gold_number[1]):
            return None
        return MatchResult.INCORRECT if gap else MatchResult.CORRECT
    # Other text may be identical and still not parse. An answer must not match such a gold answer.
    if predicted == gold and _ONLY_WORDS.fullmatch(gold) and not _NOT_A_WORD.search(gold):
        return MatchResult.CORRECT
    return None


@lru_cache(maxsize=1 << 16)
def _normalize_gold(gold: str) -> str | None:
    """Return the normalized gold answer, also of a worked solution with a box or ####, or None if there is none."""
    is_solution = re.search(r"\\boxed|\\fbox|####", gold)
    return normalize_answer((extract_answer(gold) or "") if is_solution else gold) or None


def match_without_worker(predicted: str | None, gold: str | None) -> MatchResult | tuple[str, str]:
    """Return the result if it needs no worker, or else the normalized (predicted, gold) pair for a worker."""
    if gold is None or not gold.strip():
        return MatchResult.NO_GOLD
    if gold.startswith(VERIFIER_PREFIX):  # its scorer reads the answer without normalization
        return (predicted.strip(), gold) if predicted and predicted.strip() else MatchResult.NO_ANSWER
    if (gold := _normalize_gold(gold)) is None:
        return MatchResult.BAD_GOLD
    if not predicted or not (predicted := normalize_answer(predicted)):
        return MatchResult.NO_ANSWER
    return _match_fast(predicted, gold) or (predicted, gold)


def match_answers(predicted: str, gold: str) -> str:
    """Return the `MatchResult` value of two normalized answers by math-verify. For workers, because it may hang."""
    if gold.startswith(VERIFIER_PREFIX):
        return _score_with_reasoning_gym(predicted, gold).value
    from math_verify import verify

    try:
        parsed = _parse_with_math_verify(gold)
        if not parsed:
            return MatchResult.BAD_GOLD.value
        is_equal = verify(parsed, _parse_with_math_verify(predicted), timeout_seconds=None, raise_on_error=True)
    except (MemoryError, RecursionError):
        return MatchResult.ERROR.value
    except Exception:  # a comparison that math-verify cannot make does not show that the answers are equal
        return MatchResult.INCORRECT.value
    return (MatchResult.CORRECT if is_equal else MatchResult.INCORRECT).value


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


def _parse_with_math_verify(answer: str) -> list:
    """Parse a whole answer with math-verify and return its expressions. The list is empty if it is not mathematics."""
    from math_verify import LatexExtractionConfig, parse

    if _ONLY_WORDS.fullmatch(answer):  # else letters are factors, and "Paris" equals "pairs"
        answer = rf"\text{{{answer}}}"
    elif match := _WITH_UNIT.fullmatch(answer):
        answer = rf"{match[1]}\text{{ {match[2]}}}"
    # LaTeX only, because the plain reader takes any number of a text that it cannot parse.
    config = [LatexExtractionConfig()]
    return parse(f"${answer}$", config, fallback_mode="no_fallback", parsing_timeout=None)
