"""Problems: every local schema and error, the hub out of reach, determinism, and the package's door."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import worlds
from pyarrow import parquet

from nabla_trl.tasks.problem import BOXED_INSTRUCTION, Problem, check_disjoint, divide_problems
from nabla_trl.tasks.registry import compute_task_version, get_task_settings, is_one_split, load_problems
from nabla_trl.tasks.yaml_task import assign_split

SOLVED = "He sells 9 - 2 = 7 apples.\n#### 7"
CHAT = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And doubled?"},
]


def write_lines(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def bare(problem: Problem) -> Problem:
    """Without the version, a hash of the file."""
    assert problem.task_version
    return dataclasses.replace(problem, task_version="")


def numbered(path: Path, count: int) -> str:
    return write_lines(path, *({"question": f"What is {n}+1?", "answer": str(n + 1)} for n in range(count)))


def python(code: str, environment: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, **(environment or {})}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


# --- chat -----------------------------------------------------------------------------------------


def test_chat_is_one_user_turn_without_messages() -> None:
    assert Problem("p", "2+2?").build_messages() == [{"role": "user", "content": "2+2?"}]


def test_chat_returns_copies_of_the_messages() -> None:
    problem = Problem("p", "And doubled?", messages=tuple(CHAT))
    problem.build_messages()[0]["content"] = "changed"
    assert problem.build_messages() == CHAT


# --- local files ----------------------------------------------------------------------------------


def test_reads_questions_with_worked_solutions(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "gsm.jsonl", {"question": "How many?", "answer": SOLVED})
    [problem] = load_problems(path)
    assert bare(problem) == Problem("gsm/0", "How many?", answer="7", solution=SOLVED, task="gsm")


def test_reads_problems_with_ids(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "contest.jsonl", {"id": "0", "problem": "Find $x$.", "answer": "025"})
    assert [bare(one) for one in load_problems(path)] == [Problem("0", "Find $x$.", answer="025", task="contest")]


def test_reads_every_optional_field(tmp_path: Path) -> None:
    row = {"prompt": "9-5=?", "answer": 4, "solution": "9-5=4", "id": 12, "level": 5, "unknown": [1]}
    path = write_lines(tmp_path / "own.jsonl", row)
    expected = Problem("12", "9-5=?", "4", "9-5=4", task="own", level="5", columns={"unknown": [1]})
    assert [bare(one) for one in load_problems(path)] == [expected]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_files_of_other_kinds_hold_the_same_problems(tmp_path: Path, suffix: str) -> None:
    rows = [{"question": "1+1, please", "answer": "2", "level": "007"}, {"question": "open", "answer": None}]
    path = tmp_path / f"mine.{suffix}"
    if suffix == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = {
            "jsonl": "\n".join(map(json.dumps, rows)),
            "json": json.dumps(rows),
            "csv": 'question,answer,level\n"1+1, please",2,007\nopen,,\n',
        }
        path.write_text(lines[suffix], encoding="utf-8")
    first, second = load_problems(str(path))
    assert (first.id, first.question, first.answer, first.level) == ("mine/0", "1+1, please", "2", "007")
    assert (second.id, second.answer, second.level) == ("mine/1", None, None)
    assert is_one_split(str(path)) and get_task_settings(str(path)) == {"dataset": str(path)}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "q,a\n1,2\n", ["a.csv, row 0: no question", "Its columns are q, a"]),
        ("a.csv", "question,answer\n1,2,3\n", ["a.csv: line 2 has 3 cells, and the header names 2"]),
        ("a.csv", "question,answer\n", ["a.csv holds no problems: write one row per problem"]),
        ("a.json", '{"question": "1"}', ["a.json must hold a list of JSON objects"]),
        ("a.json", "[", ["a.json: "]),
        ("a.parquet", "no parquet", ["a.parquet: "]),
        ("nowhere/a.csv", None, ["nowhere/a.csv", "No such file"]),
    ],
)
def test_a_bad_file_of_another_kind_is_named_in_one_line(
    tmp_path: Path, name: str, text: str | None, words: list[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    worlds.refused(lambda: load_problems(str(tmp_path / name)), *words)


def test_messages_are_the_chat_and_their_last_turn_the_question(tmp_path: Path) -> None:
    (problem,) = load_problems(write_lines(tmp_path / "chats.jsonl", {"messages": CHAT, "answer": "4"}))
    assert problem.question == "And doubled?"
    assert problem.build_messages() == CHAT


def test_chats_that_differ_before_their_last_turn_are_no_duplicates(tmp_path: Path) -> None:
    other = [{"role": "user", "content": "What is 2+2?"}, *CHAT[1:]]
    path = write_lines(tmp_path / "chats.jsonl", {"messages": CHAT}, {"messages": other})
    assert len(load_problems(path)) == 2


def test_instruction_goes_into_the_chat_only(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"question": "2+2?", "instruction": BOXED_INSTRUCTION})
    (problem,) = load_problems(path)
    assert problem.question == "2+2?"
    assert problem.build_messages() == [{"role": "user", "content": f"2+2?\n{BOXED_INSTRUCTION}"}]
    assert problem.answer_format == "boxed"


@pytest.mark.parametrize("answer", [{}, {"answer": None}, {"answer": ""}, {"answer": " \n"}])
def test_a_missing_or_empty_gold_answer_is_none(tmp_path: Path, answer: dict[str, Any]) -> None:
    (problem,) = load_problems(write_lines(tmp_path / "a.jsonl", {"question": "Why?", **answer}))
    assert problem.answer is None


def test_blank_lines_and_line_separators_in_text_do_not_count_as_lines(tmp_path: Path) -> None:
    row = json.dumps({"question": "a\u2028b"}, ensure_ascii=False)
    path = write_lines(tmp_path / "a.jsonl", "", row, "", {"question": "c"})
    assert [p.question for p in load_problems(path)] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('["a"]', "does not hold a JSON object"),
        ({"answer": "1"}, "no question"),
        ({"question": "  "}, "no question"),
        ({"question": None}, "no question"),
        ({"question": ["a"]}, "question must be a string, found list"),
        ({"question": 3}, "question must be a string, found int"),
        ({"question": "a", "answer": 0.5}, "answer must be a string, found float"),
        ({"question": "a", "answer": True}, "answer must be a string, found bool"),
        ({"question": "a", "solution": 1}, "solution must be a string, found int"),
        ({"question": "a", "id": {}}, "id must be a string, found dict"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": ["a"]}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, "messages must be a list"),
        ({"messages": CHAT[:2]}, "ends with a user turn"),
        ({"messages": CHAT, "instruction": "Think."}, "either instruction or messages"),
    ],
)
def test_a_bad_line_is_named_in_one_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write_lines(tmp_path / "bad.jsonl", {"question": "fine"}, "", row)
    with pytest.raises(ValueError, match=message) as caught:
        load_problems(path)
    assert f"{path}, line 3" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"id": "a", "question": "x"}, {"id": "a", "question": "y"}, "line 3: id 'a' is already on line 1"),
        ({"question": "x"}, {"problem": "x"}, "line 3: the question is already on line 1"),
    ],
)
def test_duplicates_name_both_lines(tmp_path: Path, first: Any, second: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_problems(write_lines(tmp_path / "twice.jsonl", first, "", second))


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*none\.jsonl: No such file"):
        load_problems(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="holds no problems"):
        load_problems(write_lines(tmp_path / "empty.jsonl", ""))


# --- choosing -------------------------------------------------------------------------------------


def test_limit_keeps_the_order_and_seed_shuffles_before_it(tmp_path: Path) -> None:
    path = numbered(tmp_path / "n.jsonl", 40)
    everything = load_problems(path)
    assert load_problems(path, max_problems=5) == everything[:5]
    assert load_problems(path, max_problems=100) == everything
    shuffled = load_problems(path, seed=1)
    assert shuffled != everything
    assert sorted(shuffled, key=everything.index) == everything
    assert load_problems(path, max_problems=5, seed=1) == shuffled[:5]
    assert load_problems(path, max_problems=5, seed=2) != shuffled[:5]


def test_unknown_names_splits_and_limits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown task 'gsm9k': use one of .*gsm8k, .*digit_chains, .*\.jsonl, .* or \.yaml"
    ):
        load_problems("gsm9k")
    for action in (load_problems, compute_task_version):
        with pytest.raises(ValueError, match="unknown task 'chains': it is now 'digit_chains'"):
            action("chains")
    with pytest.raises(ValueError, match="'math500' has no split 'train': it has test"):
        load_problems("math500", split="train")
    with pytest.raises(ValueError, match="max_problems must be at least 1, got 0"):
        load_problems(numbered(tmp_path / "n.jsonl", 2), max_problems=0)


def test_chains_are_repeatable_and_their_splits_disjoint() -> None:
    train = load_problems("digit_chains", split="train", max_problems=30)
    test = load_problems("digit_chains", max_problems=30)
    assert test == load_problems("digit_chains", max_problems=30)
    assert test != load_problems("digit_chains", max_problems=30, seed=1)
    check_disjoint(train, test)


def test_overlap_of_train_and_held_out_ignores_case_and_white_space() -> None:
    train = [Problem("a/0", "What is\n 2+2?"), Problem("a/1", "Why?")]
    check_disjoint(train, [Problem("b/0", "What is 2+3?")])
    asked = Problem("b/1", "what is 2+2? ", messages=({"role": "user", "content": "what is 2+2?\nThink."},))
    with pytest.raises(ValueError, match=r"1 held-out problem is .* 'a/0' = 'b/1'"):
        check_disjoint(train, [Problem("b/0", "What is 2+3?"), asked])


# --- the hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 10, 400])
def test_problems_are_divided_by_their_questions_alone(count: int) -> None:
    problems = [Problem(id=f"p/{n}", question=f"What is {n} + 1?") for n in range(count)]
    train, test = divide_problems(problems, 0.2)
    assert train and test and sorted(train + test, key=problems.index) == problems
    assert divide_problems(problems[::-1], 0.2) == (train[::-1], test[::-1])
    shouted = [dataclasses.replace(problem, question=problem.question.upper() + " ") for problem in problems]
    assert [problem.id for problem in divide_problems(shouted, 0.2)[1]] == [problem.id for problem in test]
    if count == 400:
        assert 50 < len(test) < 110
        assert divide_problems(problems[:300], 0.2)[1] == [problem for problem in test if problem in problems[:300]]
        assert divide_problems(problems, 0.2, seed=1)[1] != test
        assert {assign_split(problem.question, 0.2) for problem in test} == {"test"}, "as a task's test_fraction does"


def test_what_cannot_be_divided_is_refused() -> None:
    worlds.refused(lambda: divide_problems([Problem("p", "1+1")], 0.2), "1 problem cannot be divided")
    worlds.refused(
        lambda: divide_problems([Problem("p", "1"), Problem("q", "2")], 1.0), "test_fraction must be between"
    )


def test_an_unreachable_hub_is_one_line_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"task 'gsm8k'.*'openai/gsm8k'.*local \.jsonl file") as caught:
        load_problems("gsm8k")
    assert "\n" not in str(caught.value)


def test_the_real_hub_client_says_offline(tmp_path: Path) -> None:
    """In a process of its own: the hub client reads its switches when it is imported."""
    code = "from nabla_trl.tasks.registry import load_problems; load_problems('math500')"
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = python(code, offline)
    assert run.returncode != 0
    assert run.stderr.splitlines()[-1].startswith("ValueError: task 'math500' could not be loaded")


# --- the package's door ---------------------------------------------------------------------------


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'trl', 'transformers', 'datasets', 'vllm', 'matplotlib', 'numpy', 'pyarrow'}"
    run = python(f"import sys, nabla_trl; nabla_trl.Problem; print(sorted({heavy} & set(sys.modules)))")
    assert run.stdout == "[]\n", run.stderr


def test_the_door_opens_on_the_rooms() -> None:
    import nabla_trl

    assert nabla_trl.load_problems is load_problems
    assert set(nabla_trl.__all__) <= set(dir(nabla_trl))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nabla_trl.nothing
    for name in nabla_trl.__all__:
        assert getattr(nabla_trl, name) is not None
