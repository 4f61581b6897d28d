"""Votes over answers."""

from __future__ import annotations

import math

import pytest

from nabla_trl.grading.voting import vote


@pytest.mark.parametrize(
    ("answers", "log_weights", "winners"),
    [
        (["1", "2", "2"], None, [1, 2]),
        (["1", "2", "2", "1"], None, [0, 3]),  # a tie goes to the answer seen first
        (["1", " 1 ", "2"], None, [0, 1]),  # compared as normalized answers
        ([None, None, "3"], None, [2]),
        ([None], None, []),
        ([], None, []),
        (["1", "2", "2"], [1.0, 0.0, 0.0], [0]),  # e > 2
        (["1", "2", "2"], [0.5, 0.0, 0.0], [1, 2]),  # e^0.5 < 2
        (["1", "2"], [-1e5, -1e5 - 1], [0]),  # no underflow
        (["1", "2"], [1e5, 1e5 + 1], [1]),  # no overflow
        (["1", "2"], [-math.inf, 0.0], [1]),
        (["1"], [-math.inf], []),
    ],
)
def test_the_answer_with_the_largest_weight_wins(answers, log_weights, winners) -> None:
    assert vote(answers, log_weights) == winners
