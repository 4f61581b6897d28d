"""Procedural families of reasoning-gym: splits apart, golds right by the family's own scorer, mistakes in one line."""

import importlib.metadata
import json

import pytest
import worlds

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.equivalence import SCORED, Verdict
from nabla_trl.tasks.problem import INSTRUCTION, check_disjoint
from nabla_trl.tasks.reasoning_gym_task import parse_name, split_of
from nabla_trl.tasks.registry import load_problems, task_version

COUNTDOWN = "reasoning_gym:countdown,min_numbers=3,max_numbers=3"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    for action in (load_problems, task_version):
        worlds.refused(
            lambda action=action: action("reasoning_gym:gcd"), "reasoning_gym:gcd", "nabla-trl[reasoning-gym]"
        )


def test_names_hold_a_family_and_its_options() -> None:
    assert parse_name("reasoning_gym:gcd") == ("gcd", {})
    assert parse_name("reasoning_gym:gcd,max_value=9,seed=7") == ("gcd", {"max_value": 9, "seed": 7})
    for name in ("reasoning_gym:", "reasoning_gym:gcd,", "reasoning_gym:gcd,max_value"):
        worlds.refused(lambda name=name: parse_name(name), repr(name), "key=value")
    for option in ("seed=abc", "seed=1.5", "seed=-3", "max_value={"):
        worlds.refused(lambda name=f"reasoning_gym:gcd,{option}": parse_name(name), f"gcd,{option}: ")


@pytest.fixture(scope="module")
def gym() -> None:
    pytest.importorskip("reasoning_gym")


@pytest.mark.usefixtures("gym")
def test_problems_are_repeatable_and_their_splits_disjoint() -> None:
    # Of three small numbers there are few: the splits would share questions, were they told apart by seeds alone.
    name = "reasoning_gym:gcd,max_value=20"
    train, test = (load_problems(name, split=split, limit=60) for split in ("train", "test"))
    assert test == load_problems(name, limit=60) and test[:5] == load_problems(name, limit=5)
    check_disjoint(train, test)
    assert {split_of(one.question) for one in test} == {"test"} and len({one.id for one in train + test}) == 120
    assert load_problems(name, limit=5, seed=3) == load_problems(name, limit=60, seed=3)[:5] != test[:5]
    [seeded] = load_problems(f"{name},seed=3", limit=1)
    assert seeded.question == load_problems(name, limit=1, seed=3)[0].question
    assert seeded.version == task_version(name) == importlib.metadata.version("reasoning-gym")
    assert seeded.chat()[0]["content"].endswith(INSTRUCTION) and seeded.form == "boxed"


@pytest.mark.usefixtures("gym")
def test_numbers_are_compared_and_all_else_is_judged_by_the_family() -> None:
    [number] = load_problems("reasoning_gym:gcd", limit=1)
    assert number.verifier is None and number.judge == number.answer
    [sums, *others] = load_problems(COUNTDOWN, limit=3)
    matrix = load_problems("reasoning_gym:rotate_matrix", limit=1)[0]
    for problem in (sums, matrix):
        assert problem.judge == problem.verifier and problem.judge.startswith(SCORED)
    with AnswerChecker(timeout=30) as checker:
        verdicts = checker.check(
            [
                (sums.answer, sums.judge),
                (f"({sums.answer})", sums.judge),  # another writing that the gold answer's text does not tell of
                (rf"\text{{{sums.answer}}}", sums.judge),
                (matrix.answer, matrix.judge),
                *((one.answer, sums.judge) for one in others),
                ("", sums.judge),
                ("what?", sums.judge),
            ]
        )
    right, wrong = Verdict.RIGHT, Verdict.WRONG
    assert verdicts == [right] * 4 + [wrong] * 2 + [Verdict.NO_ANSWER, wrong]


@pytest.mark.usefixtures("gym")
def test_a_scorer_that_cannot_be_had_costs_its_rows_alone() -> None:
    unknown = SCORED + json.dumps({"name": "no_such", "options": {}, "seed": 0, "index": 0, "size": 10})
    with AnswerChecker(timeout=30) as checker:
        assert checker.check([("1", unknown), ("2", "2")]) == [Verdict.WRONG, Verdict.RIGHT]


@pytest.mark.usefixtures("gym")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reasoning_gym:no_such", ["no_such"]),
        ("reasoning_gym:gcd,max_valu=3", ["max_valu"]),
        ("reasoning_gym:graph_color", ["no gold answer"]),
        ("reasoning_gym:gcd,max_value=3", ["only", "lower limit"]),
    ],
)
def test_what_a_family_cannot_give_is_named_in_one_line(name: str, words: list[str]) -> None:
    worlds.refused(lambda: load_problems(name), name, *words)
    worlds.refused(lambda: load_problems(name, split="dev"), name, "train, test", "'dev'")
