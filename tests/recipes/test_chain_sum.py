"""The data of recipes/chain_sum."""

from __future__ import annotations

import json
from pathlib import Path

import make_problems
import pytest
import select_correct
import worlds

from nabla_trl.models.loading import load_tokenizer
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import load_problems


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


def test_one_correct_answer_of_each_problem_is_kept(tmp_path: Path) -> None:
    """A second correct answer, a wrong one, one that is cut off, and one to a problem that is not asked for."""
    tokenizer = load_tokenizer("data/tiny/policy")
    write_rows(
        tmp_path / "problems.jsonl", [{"id": str(n), "question": f"1+{n}", "answer": str(1 + n)} for n in (1, 2, 3)]
    )
    end = tokenizer.eos_token_id
    answers = [
        ("1", "1+1=2;#2", end),
        ("1", "2;#2", end),
        ("2", "1+2=4;#4", end),
        ("3", "1+3=4;#4", None),
        ("9", "#1", end),
    ]
    ids = [
        tokenizer(text, add_special_tokens=False)["input_ids"] + [last] * (last is not None)
        for _, text, last in answers
    ]
    rows = [{"problem_id": number, "response_ids": row} for (number, _, _), row in zip(answers, ids, strict=True)]
    write_rows(tmp_path / "answers" / "round-0.0" / "000000.jsonl", rows)
    argv = ["--policy", "data/tiny/policy", "--problems", str(tmp_path / "problems.jsonl")]
    output = ["--output_file", str(tmp_path / "correct.jsonl")]
    select_correct.main([*argv, "--answers", str(tmp_path / "answers"), *output])
    [problem] = load_problems(str(tmp_path / "correct.jsonl"))
    assert (problem.id, problem.question, problem.solution) == ("1", "1+1", "1+1=2;#2")
    worlds.refused(lambda: select_correct.main([*argv, "--answers", str(tmp_path / "none"), *output]), "no answers")


def write_rows(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
