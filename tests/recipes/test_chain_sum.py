"""The worked answers of recipes/chain_sum."""

from __future__ import annotations

import make_problems
import pytest
import worlds

from nabla_trl.tasks.problem import Problem


def make_sum(expression: str, answer: str) -> Problem:
    return Problem("1", f"State the final answer to the following arithmetic problem: {expression} =", answer)


@pytest.mark.parametrize(
    ("expression", "answer", "solution"),
    [
        ("4 - 1 - 7", "-4", "4 - 1 = 3\n3 - 7 = -4\n\\boxed{-4}"),
        ("57 + 87 + 70", "214", "57 + 87 = 144\n144 + 70 = 214\n\\boxed{214}"),
        ("8 - 3", "5", "8 - 3 = 5\n\\boxed{5}"),
    ],
)
def test_a_sum_as_a_worked_answer(expression: str, answer: str, solution: str) -> None:
    assert make_problems.write_solution(make_sum(expression, answer)) == solution


def test_a_sum_that_is_not_the_gold_answer_is_refused() -> None:
    worlds.refused(lambda: make_problems.write_solution(make_sum("4 - 1", "4")), "do not give 4")
