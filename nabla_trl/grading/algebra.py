"""Compare answers by math-verify, with relative instead of absolute precision. It may hang, so it runs in workers.

math-verify calls two numbers equal if they differ by less than an absolute bound, so 2^-80 equals 2^-81. Its function
for this is replaced in the process of the worker by one that also compares the values relative to their size.
"""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache
from typing import Any

_ONLY_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z]+(?: [A-Za-z]+)*")
_DIGITS, _MAX_DIGITS = 15, 300
_FLOAT_TOLERANCE = 1e-4  # of answers with decimals, which are written to a few digits
# Expressions with variables are compared at so many points. Unequal ones agree at all of them by accident only.
_NUM_POINTS = 2


def match_with_math_verify(predicted: str, gold: str) -> bool:
    """Return True if math-verify finds two normalized answers equal. What it cannot compare is not equal.

    Raises:
        MemoryError: if an expression is too large.
        RecursionError: if an expression is nested too deeply.
    """
    from math_verify import verify

    load_math_verify()
    parsed, gold_parsed = parse_with_math_verify(predicted), parse_with_math_verify(gold)
    # A doubled backslash ends a line, so what follows it may not be the sign of a relation that it looks like.
    as_sets = "\\\\" not in predicted
    try:
        return verify(gold_parsed, parsed, allow_set_relation_comp=as_sets, timeout_seconds=None, raise_on_error=True)
    except (MemoryError, RecursionError):
        raise
    except Exception:  # a comparison that math-verify cannot make does not show that the answers are equal
        return False


def parse_with_math_verify(answer: str) -> list:
    """Return the expressions of a whole normalized answer. The list is empty if it is not mathematics."""
    from math_verify import LatexExtractionConfig, parse

    if _ONLY_WORDS.fullmatch(answer):  # else letters are factors, and "Paris" equals "pairs"
        answer = rf"\text{{{answer}}}"
    # Units were split before. math-verify would take the variable of `2d` for one.
    normalization = dataclasses.replace(LatexExtractionConfig().normalization_config, units=False)
    # LaTeX only, because the plain reader takes any number of a text that it cannot parse.
    config = [LatexExtractionConfig(normalization_config=normalization)]
    return parse(f"${answer}$", config, fallback_mode="no_fallback", parsing_timeout=None)


@lru_cache(maxsize=1)
def load_math_verify() -> None:
    """Import math-verify and replace its numerical comparison in this process.

    Raises:
        ImportError: if math-verify is not installed.
    """
    from math_verify import grader

    absolutely_equal = grader.sympy_numeric_eq

    def equal_values(one: Any, other: Any, float_rounding: int, numeric_precision: int) -> bool:
        return absolutely_equal(one, other, float_rounding, numeric_precision) and not _differ(one, other)

    grader.sympy_numeric_eq = equal_values


def _differ(one: Any, other: Any) -> bool:
    """Return True if two expressions certainly have different values. Elements of matrices are compared one by one."""
    from math_verify.grader import get_pct_val
    from sympy import Expr, Float, Rational
    from sympy.core.evalf import PrecisionExhausted

    if not (isinstance(one, Expr) and isinstance(other, Expr)):
        return False
    if (get_pct_val(one) is None) != (get_pct_val(other) is None):  # 25% equals 25 and 0.25
        return False
    is_exact = not (one.has(Float) or other.has(Float))
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    for point in range(_NUM_POINTS):
        values = {symbol: Rational(2 * k + 5 * point + 7, k + point + 3) for k, symbol in enumerate(symbols)}
        first, second = (side.doit().subs(values) for side in (one, other))
        try:
            # strict: all digits of the difference are right, so that it is not zero.
            difference = abs((first - second).evalf(_DIGITS, maxn=_MAX_DIGITS, strict=is_exact))
            scale = 0 if is_exact else _FLOAT_TOLERANCE * max(abs(first.evalf()), abs(second.evalf()))
            if bool(difference > scale):
                return True
        except PrecisionExhausted:  # the difference is zero as far as so many digits show
            continue
        except (TypeError, ValueError, AttributeError, ArithmeticError):  # no numbers, so nothing is known
            return False
    return False
