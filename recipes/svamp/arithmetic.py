"""Arithmetic of short worked answers: evaluate it, write it in steps, and compute it again as a calculator does."""

from __future__ import annotations

import ast
import re
from fractions import Fraction

OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
MAX_EXPRESSION = 200  # characters
_EQUATION = re.compile(r"^(?P<left>[\d.+\-*/() ]*\d[\d.+\-*/() ]*?)\s*=\s*(?P<right>-?\d+(?:\.\d+)?)\s*$")
_NUMBER = re.compile(r"^-?\d+(?:\.\d+)?|\d+(?:\.\d+)?")  # a sign belongs to the first number alone
_FINAL = re.compile(r"^(#### *|\\boxed\{)(-?\d+(?:\.\d+)?)(\}?)\s*$", re.MULTILINE)


def compute(left: Fraction, operator: str, right: Fraction) -> Fraction:
    """Return the value of an operation.

    Raises:
        ZeroDivisionError: a division by zero.
    """
    if operator == "/":
        return left / right
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def format_number(number: Fraction) -> str:
    """Return a number with at most four decimals, or an empty text if it has more."""
    if number.denominator == 1:
        return str(number.numerator)
    scaled = number * 10_000
    return f"{float(number):.4f}".rstrip("0") if scaled.denominator == 1 else ""


def parse_expression(text: str) -> ast.expr:
    """Return the tree of an expression.

    Raises:
        ValueError: no expression, or a longer one than `MAX_EXPRESSION`.
    """
    if len(text) > MAX_EXPRESSION:
        raise ValueError("the expression is too long")
    try:
        return ast.parse(re.sub(r"(?<![\d.])0+(?=\d)", "", text.strip()), mode="eval").body
    except (SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text!r} is no expression") from error


def evaluate(node: ast.expr) -> Fraction:
    """Return the value of an expression of numbers and the four operations.

    Raises:
        ValueError: something else, or a division by zero.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -evaluate(node.operand)
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
        raise ValueError("no arithmetic")
    try:
        return compute(evaluate(node.left), OPERATORS[type(node.op)], evaluate(node.right))
    except ZeroDivisionError as error:
        raise ValueError("a division by zero") from error


def has_false_equation(response: str) -> bool:
    """Tell whether a line of a response states an equation that is not true."""
    return find_false_equation(response) is not None


def find_false_equation(response: str) -> tuple[int, str] | None:
    """Return where the first false equation states its result, and the result that is right.

    Returns:
        The index of a character, and the number (empty if it has no short form). None: no line is a false equation.
    """
    begin = 0
    for line in response.splitlines(keepends=True):
        if match := _EQUATION.match(line):
            try:
                value = evaluate(parse_expression(match["left"]))
                if value != Fraction(match["right"]):
                    return begin + match.start("right"), format_number(value)
            except ValueError:
                pass
        begin += len(line)
    return None


def compute_response(response: str) -> str:
    """Return a response with every equation computed, and each later use of a false result replaced.

    The final answer follows if it is the result of an equation. Where two results are equal, the later one counts.
    """
    values: dict[str, str] = {}  # stated result -> its value
    lines = []
    for line in response.splitlines():
        match = _EQUATION.match(line)
        if match is None:
            lines.append(line)
            continue
        left = _NUMBER.sub(lambda number: values.get(number[0], number[0]), match["left"].strip())
        try:
            value = format_number(evaluate(parse_expression(left)))
        except ValueError:
            value = ""
        if value:
            values[match["right"]] = value
        lines.append(f"{left} = {value or match['right']}")
    text = "\n".join(lines)
    return _FINAL.sub(lambda final: f"{final[1]}{values.get(final[2], final[2])}{final[3]}", text)
