"""Procedural families of reasoning-gym: splits apart, golds right by the family's own scorer, mistakes in one line."""

import importlib.metadata
import json

import pytest
import worlds

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.equivalence import VERIFIER_PREFIX, MatchResult
from nabla_trl.tasks.problem import BOXED_INSTRUCTION, check_disjoint
from nabla_trl.tasks.reasoning_gym_task import assign_reasoning_gym_split, parse_task_name
from nabla_trl.tasks.registry import compute_task_version, load_problems

COUNTDOWN = "reasoning_gym:countdown,min_numbers=3,max_numbers=3"


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    for action in (load_problems, compute_task_version):
        worlds.refused(
            lambda action=action: action("reasoning_gym:gcd"), "reasoning_gym:gcd", "nabla-trl[reasoning-gym]"
        )


def test_names_hold_a_family_and_its_options() -> None:
    assert parse_task_name("reasoning_gym:gcd") == ("gcd", {})
    assert parse_task_name("reasoning_gym:gcd,max_value=9,seed=7") == ("gcd", {"max_value": 9, "seed": 7})
    for name in ("reasoning_gym:", "reasoning_gym:gcd,", "reasoning_gym:gcd,max_value"):
        worlds.refused(lambda name=name: parse_task_name(name), repr(name), "key=value")
    for option in ("seed=abc", "seed=1.5", "seed=-3", "max_value={"):
        worlds.refused(lambda name=f"reasoning_gym:gcd,{option}": parse_task_name(name), f"gcd,{option}: ")


@pytest.fixture(scope="module")
def gym() -> None:
    pytest.importorskip("reasoning_gym")


@pytest.mark.usefixtures("gym")
def test_problems_are_repeatable_and_their_splits_disjoint() -> None:
    # Of three small numbers there are few: the splits would share questions, were they told apart by seeds alone.
    name = "reasoning_gym:gcd,max_value=20"
    train, test = (load_problems(name, split=split, max_problems=60) for split in ("train", "test"))
    assert test == load_problems(name, max_problems=60) and test[:5] == load_problems(name, max_problems=5)
    check_disjoint(train, test)
    assert {assign_reasoning_gym_split(one.question) for one in test} == {"test"} and len(
        {one.id for one in train + test}
    ) == 120
    assert load_problems(name, max_problems=5, seed=3) == load_problems(name, max_problems=60, seed=3)[:5] != test[:5]
    [seeded] = load_problems(f"{name},seed=3", max_problems=1)
    assert seeded.question == load_problems(name, max_problems=1, seed=3)[0].question
    assert seeded.task_version == compute_task_version(name) == importlib.metadata.version("reasoning-gym")
    assert seeded.build_messages()[0]["content"].endswith(BOXED_INSTRUCTION) and seeded.answer_format == "boxed"


@pytest.mark.usefixtures("gym")
def test_numbers_are_compared_and_all_else_is_judged_by_the_family() -> None:
    [number] = load_problems("reasoning_gym:gcd", max_problems=1)
    assert number.verifier is None and number.grading_target == number.answer
    [sums, *others] = load_problems(COUNTDOWN, max_problems=3)
    matrix = load_problems("reasoning_gym:rotate_matrix", max_problems=1)[0]
    for problem in (sums, matrix):
        assert problem.grading_target == problem.verifier and problem.grading_target.startswith(VERIFIER_PREFIX)
    with AnswerChecker(timeout=30) as checker:
        verdicts = checker.check(
            [
                (sums.answer, sums.grading_target),
                (
                    f"({sums.answer})",
                    sums.grading_target,
                ),  # another writing that the gold answer's text does not tell of
                (rf"\text{{{sums.answer}}}", sums.grading_target),
                (matrix.answer, matrix.grading_target),
                *((one.answer, sums.grading_target) for one in others),
                ("", sums.grading_target),
                ("what?", sums.grading_target),
            ]
        )
    right, wrong = MatchResult.CORRECT, MatchResult.INCORRECT
    assert verdicts == [right] * 4 + [wrong] * 2 + [MatchResult.NO_ANSWER, wrong]


@pytest.mark.usefixtures("gym")
def test_a_scorer_that_cannot_be_had_costs_its_rows_alone() -> None:
    unknown = VERIFIER_PREFIX + json.dumps({"name": "no_such", "options": {}, "seed": 0, "index": 0, "size": 10})
    with AnswerChecker(timeout=30) as checker:
        assert checker.check([("1", unknown), ("2", "2")]) == [MatchResult.INCORRECT, MatchResult.CORRECT]


@pytest.mark.usefixtures("gym")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("reasoning_gym:no_such", ["no_such"]),
        ("reasoning_gym:gcd,max_valu=3", ["max_valu"]),
        ("reasoning_gym:graph_color", ["no gold answer"]),
        ("reasoning_gym:gcd,max_value=3", ["only", "lower --max_problems"]),
    ],
)
def test_what_a_family_cannot_give_is_named_in_one_line(name: str, words: list[str]) -> None:
    worlds.refused(lambda: load_problems(name), name, *words)
    worlds.refused(lambda: load_problems(name, split="dev"), name, "train, test", "'dev'")
