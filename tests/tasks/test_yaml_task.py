"""Tasks by YAML: the benchmarks' columns, rows of any shape to problems, every mistake in one line, versions."""

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import pytest
import worlds
import yaml

from nabla_trl.grading.extraction import extract_answer, extract_strict_answer
from nabla_trl.tasks.gold_answers import make_regex_parser, parse_boxed, parse_hashes, parse_integer, parse_plain
from nabla_trl.tasks.problem import BOXED_INSTRUCTION, Problem
from nabla_trl.tasks.registry import compute_task_version, get_task_settings, load_problems
from nabla_trl.tasks.yaml_task import find_hub_task_config, list_benchmarks, load_task_config, read_task_config

SOLVED = "He sells 9 - 2 = 7 apples.\n#### 7"


def bare(problem: Problem) -> Problem:
    """Without version and chat, which tests of their own look at."""
    assert problem.task_version
    return dataclasses.replace(problem, task_version="", messages=None)


# --- benchmarks -----------------------------------------------------------------------------------

HUB_ROWS: dict[str, tuple[dict[str, Any], Problem]] = {
    "gsm8k": ({"question": "How many? ", "answer": SOLVED}, Problem("", "How many?", "7", SOLVED)),
    "math500": (
        {"problem": "Find $x$.", "solution": r"\boxed{p - q}", "answer": "p - q", "level": 2, "subject": "Algebra"},
        Problem("", "Find $x$.", "p - q", r"\boxed{p - q}", level="2"),
    ),
    "amc": ({"id": 0, "problem": "Find $x$.", "answer": 142.0, "url": ""}, Problem("", "Find $x$.", "142")),
    "aime24": (
        {"id": 60, "problem": "Find $x$.", "solution": "It is 25.", "answer": "025", "year": "2024"},
        Problem("", "Find $x$.", "25", "It is 25."),
    ),
    "aime25": ({"problem": "Find $x$.", "answer": "70", "id": "0"}, Problem("", "Find $x$.", "70")),
}


@pytest.mark.parametrize("name", list_benchmarks())
def test_hub_rows_become_problems(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    row, expected = HUB_ROWS[name]
    calls = []

    def load_dataset(path: str, config: str | None, **options: Any) -> Any:
        calls.append((path, config, options))
        return datasets.Dataset.from_list([row, row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    problems = load_problems(name)
    task = load_task_config(name)
    assert calls == [(task.path, task.config, {"split": task.splits["test"], "revision": task.revision})]
    assert [p.id for p in problems] == [f"{name}/test/0", f"{name}/test/1"]
    first = problems[0]
    about = {"task": name, "answer_format": "boxed", "few_shot_examples": first.few_shot_examples}
    assert dataclasses.replace(bare(first), id="") == dataclasses.replace(expected, **about)
    assert first.task_version == task.compute_version() == compute_task_version(name)
    assert first.build_messages() == [{"role": "user", "content": f"{expected.question}\n{BOXED_INSTRUCTION}"}]


@pytest.mark.parametrize("name", list_benchmarks())
def test_benchmarks_are_pinned_and_their_examples_end_as_asked(name: str) -> None:
    task = load_task_config(name)
    assert task.revision is not None and len(task.revision) == 40
    assert task.name == name and task.compute_version().endswith("@" + task.revision[:12])
    assert len(task.few_shot) == 4
    for example in task.few_shot:
        assert extract_strict_answer(example["answer"], "boxed") == extract_answer(example["answer"])


def test_the_data_sets_of_a_model_card_are_those_on_the_hub(tmp_path: Path) -> None:
    gsm8k = find_hub_task_config("gsm8k")
    assert gsm8k is not None and gsm8k.path == "openai/gsm8k"
    assert (
        find_hub_task_config("digit_chains")
        is find_hub_task_config("gone.yaml")
        is find_hub_task_config(described(tmp_path))
        is None
    )


@pytest.mark.parametrize(
    ("text", "answer"), [("025", "25"), ("142.0", "142"), ("-4.0", "-4"), ("000", "0"), ("2.5", "2.5"), (" ", None)]
)
def test_an_integer_is_read_as_one_writes_it(text: str, answer: str | None) -> None:
    assert parse_integer(text) == (answer, None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a\n#### 1,234", "1234"),
        ("#### 5", "5"),
        ("#### 1\n#### 2", "2"),
        ("a\n####", None),
        ("#### (1, 2)", "(1, 2)"),
    ],
)
def test_hashes_take_the_last_line(text: str, answer: str | None) -> None:
    assert parse_hashes(text) == (answer, text)


def test_a_text_without_hashes_is_the_answer_itself() -> None:
    assert parse_hashes(" 3/4 ") == parse_plain(" 3/4 ") == ("3/4", None)
    assert parse_hashes("####5 is\nno answer line") == ("####5 is\nno answer line", None)
    assert parse_plain(" ") == (None, None)


def test_boxes_and_patterns_give_the_answer_and_the_text_as_solution() -> None:
    assert parse_boxed(r"so \boxed{\frac{1}{2}}.") == (r"\frac{1}{2}", r"so \boxed{\frac{1}{2}}.")
    assert parse_boxed("so 3") == (None, "so 3")
    assert make_regex_parser(r"Answer: (\w+)")("Answer: B\nAnswer: C.") == ("C", "Answer: B\nAnswer: C.")
    assert make_regex_parser(r"\d+")("4 and 5")[0] == "5"
    assert make_regex_parser(r"(x)?\d")("4")[0] is None and make_regex_parser("z")("4")[0] is None
    worlds.refused(lambda: make_regex_parser("("), "'('", "no regular expression")
    worlds.refused(lambda: make_regex_parser("(a)(b)"), "2 groups")


# --- any data set ---------------------------------------------------------------------------------

ROWS = [{"Body": "Ann has 3 pens.", "Ask": "How many?", "Answer": 3.0, "Grade": 2, "Why": "three"}] * 2
SPEC: dict[str, Any] = {
    "path": "rows.jsonl",
    "question": "{{ Body }} {{ Ask }}",
    "answer": "Answer",
    "parse": "integer",
    "level": "Grade",
    "solution": "Why",
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def described(folder: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any) -> str:
    """A YAML beside its rows; a change to None takes a key out."""
    write_rows(folder / "rows.jsonl", rows)
    values = {key: value for key, value in (SPEC | changes).items() if value is not None}
    path = folder / "pens.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    return str(path)


def test_a_yaml_makes_problems_of_any_rows(tmp_path: Path) -> None:
    [problem] = load_problems(described(tmp_path), max_problems=1)
    asked = "Ann has 3 pens. How many?"
    assert bare(problem) == Problem("pens/test/0", asked, "3", "three", task="pens", level="2", answer_format="boxed")
    assert problem.build_messages() == [{"role": "user", "content": f"{asked}\n{BOXED_INSTRUCTION}"}]


def test_prompt_examples_and_stops_are_as_the_yaml_says(tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text("- {question: '1+1?', answer: \"It is 2.\\n#### 2\"}\n")
    path = described(
        tmp_path,
        prompt="Grade {{ Grade }}: {{ question }} {{ instruction }}",
        instruction="End with '#### n'.",
        few_shot="shown.yaml",
        stop_strings=["Ask:"],
        name="own",
    )
    [problem] = load_problems(path, max_problems=1)
    assert problem.build_messages()[0]["content"] == "Grade 2: Ann has 3 pens. How many? End with '#### n'."
    assert (problem.answer_format, problem.stop_strings, problem.task) == ("hashes", ("Ask:",), "own")
    assert problem.few_shot_examples == (("1+1?", "It is 2.\n#### 2"),)
    [silent] = load_problems(described(tmp_path, instruction=""), max_problems=1)
    assert silent.messages is None and silent.answer_format is None


def test_parquet_and_folders_of_splits_are_read_too(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "data" / "a.parquet")
    write_rows(tmp_path / "data" / "b.jsonl", [ROWS[0] | {"Body": "Bo has 5."}])
    path = described(tmp_path, path="data", splits={"train": "a.parquet", "test": "b.jsonl"})
    assert [p.id for p in load_problems(path, split="train")] == ["pens/train/0", "pens/train/1"]
    assert [p.question for p in load_problems(path)] == ["Bo has 5. How many?"]
    worlds.refused(lambda: load_problems(path, split="dev"), "'pens' has no split 'dev': it has", "train")


def test_splits_of_a_folder_may_lie_deeper_and_share_a_file(tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    write_rows(tmp_path / "data" / "sub" / "a.jsonl", [ROWS[0] | {"Grade": None, "Why": None}])
    path = described(tmp_path, path="data", splits={"train": "sub/a.jsonl", "test": "sub/a.jsonl"})
    [problem] = load_problems(path)
    assert (problem.id, problem.level, problem.solution) == ("pens/test/0", None, None)
    assert bare(problem) == dataclasses.replace(bare(load_problems(path, split="train")[0]), id="pens/test/0")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"splits": {"test": "rows.jsonl"}}, "rows.jsonl is a file, which is one split"),
        ({"path": "gone.jsonl"}, "there is no file gone.jsonl"),
        ({"path": "data"}, "splits are needed"),
        ({"path": "data", "splits": {"test": "gone.jsonl"}}, "gone.jsonl"),
        ({"path": "pens.yaml"}, "pens.yaml must end in one of"),
    ],
)
def test_local_data_that_are_not_there_are_named(changes: dict, words: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    message = worlds.refused(lambda: load_problems(described(tmp_path, **changes)), words)
    assert "unpack" not in message


def test_a_hub_task_by_yaml_asks_for_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    path = described(tmp_path, path="org/pens", revision="abc", config="main", splits={"test": "validation"})
    assert len(load_problems(path)) == 2
    assert calls == [(("org/pens", "main"), {"split": "validation", "revision": "abc"})]
    assert compute_task_version(path).endswith("@abc")


def test_an_answer_that_is_missing_is_none(tmp_path: Path) -> None:
    assert [p.answer for p in load_problems(described(tmp_path, [ROWS[0], ROWS[0] | {"Answer": None}]))] == ["3", None]


def test_a_lone_stop_string_is_a_list_of_one(tmp_path: Path) -> None:
    [problem, *_] = load_problems(described(tmp_path, stop_strings="Q: a, b"))
    assert problem.stop_strings == ("Q: a, b",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quesion": "Body"}, ["unknown key 'quesion'", "did you mean question"]),
        ({"form": "boxed"}, ["unknown key 'form': it is now 'answer_format'"]),
        ({"stop": ["Q:"]}, ["unknown key 'stop': it is now 'stop_strings'"]),
        ({"question": None}, ["question must be given"]),
        ({"stop_strings": 7}, ["stop_strings must be a list"]),
        ({"parse": "number"}, ["parse must be one of plain, hashes, boxed, integer, regex"]),
        ({"parse": "regex"}, ["pattern"]),
        ({"parse": "regex", "pattern": "("}, ["'('", "no regular expression"]),
        ({"pattern": "a"}, ["pattern belongs to parse: regex"]),
        ({"answer_format": "latex"}, ["answer_format must be one of boxed, hashes, hash"]),
        ({"question": "{{ Body"}, ["cannot read the template '{{ Body'"]),
        ({"splits": ["test"]}, ["splits must map"]),
        ({"path": "org/name"}, ["splits are needed"]),
        ({"few_shot": [{"question": "1+1?"}]}, ["few_shot, example 1", "a question and an answer"]),
        ({"few_shot": [{"question": "1+1?", "answer": "It is 2."}]}, ["example 1", "no answer", "boxed"]),
        ({"few_shot": "none.yaml"}, ["few_shot: cannot read", "none.yaml", "No such file"]),
        ({"stop_strings": [""]}, ["stop_strings must not hold an empty string"]),
        ({"version": "two"}, ["version must be a whole number"]),
    ],
)
def test_a_bad_description_is_named_in_one_line(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    path = described(tmp_path, **changes)
    worlds.refused(lambda: load_problems(path), path, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"level": "grade"}, ["'pens': no column grade; there are Body, Ask, Answer, Grade, Why"]),
        ({"question": "{{ Body }} {{ ask }}"}, ["no column ask"]),
        ({"prompt": "{{ question }} {{ hint }}"}, ["no column hint"]),
        ({"question": "{{ Body / 0 }}"}, ["row 0", "{{ Body / 0 }}", "fails"]),
        ({"question": "{{ Body.__class__.__mro__ }}"}, ["row 0", "unsafe"]),
        ({"question": "{% if Grade == 3 %}x{% endif %}"}, ["row 0", "the question is empty"]),
        ({"path": "rows.xlsx"}, ["must end in one of", ".jsonl"]),
    ],
)
def test_what_does_not_fit_the_rows_is_named_in_one_line(
    tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    (tmp_path / "rows.xlsx").write_text("no table")
    path = described(tmp_path, **changes)
    worlds.refused(lambda: load_problems(path), *words)


def test_files_that_describe_nothing(tmp_path: Path) -> None:
    worlds.refused(lambda: load_problems(str(tmp_path / "none.yaml")), "none.yaml", "No such file")
    (tmp_path / "list.yaml").write_text("- 1\n")
    worlds.refused(lambda: load_problems(str(tmp_path / "list.yaml")), "must hold a mapping")


def test_versions_change_with_data_prompt_and_number_and_with_nothing_else(tmp_path: Path) -> None:
    base = compute_task_version(described(tmp_path))
    assert [p.task_version for p in load_problems(described(tmp_path))] == [base, base]
    (tmp_path / "elsewhere").mkdir()
    assert compute_task_version(described(tmp_path / "elsewhere")) == base
    others = [
        compute_task_version(described(tmp_path, ROWS[:1])),
        compute_task_version(described(tmp_path, instruction="Think.")),
        compute_task_version(described(tmp_path, version=2)),
        compute_task_version(described(tmp_path, stop_strings=["Q:"])),
    ]
    assert len({base, *others}) == 5


def test_versions_of_files_and_chains(tmp_path: Path) -> None:
    lines = tmp_path / "n.jsonl"
    write_rows(lines, [{"question": "1+1?"}])
    before = compute_task_version(str(lines))
    assert load_problems(str(lines))[0].task_version == before
    write_rows(lines, [{"question": "1+2?"}])
    assert compute_task_version(str(lines)) != before
    [problem] = load_problems("digit_chains", max_problems=1)
    assert get_task_settings("digit_chains") == {"dataset": "digit_chains", "task_version": problem.task_version}
    worlds.refused(lambda: compute_task_version(str(tmp_path / "none.jsonl")), "none.jsonl", "No such file")


def test_the_example_among_the_recipes_can_be_read() -> None:
    task = read_task_config(Path(__file__).parents[2] / "recipes" / "tasks" / "svamp.yaml")
    assert task.resolve_answer_format() == "boxed" and task.few_shot and not task.is_local


# --- what a cell becomes ------------------------------------------------------------------------------


def table(folder: Path, values: list[Any], **changes: Any) -> str:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"q": [f"{n}+1" for n in range(len(values))], "a": values}).to_parquet(folder / "t.parquet")
    spec = {"path": "t.parquet", "question": "q", "answer": "a", "instruction": ""} | changes
    (folder / "t.yaml").write_text(yaml.safe_dump(spec))
    return str(folder / "t.yaml")


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1e-7, 1e15], ["0.0000001", "1000000000000000"]),
        ([25.0, -0.5], ["25", "-0.5"]),
        ([7, 2**60], ["7", str(2**60)]),
        (["None", "007"], ["None", "007"]),
        ([None, "x"], [None, "x"]),
    ],
)
def test_values_become_text_by_one_rule(values: list[Any], texts: list[str], tmp_path: Path) -> None:
    assert [problem.answer for problem in load_problems(table(tmp_path, values))] == texts


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([["2"], ["4", "5"]], "a list"),
        ([{"value": "2"}, {"value": "4"}], "a mapping"),
        ([b"2", b"4"], "bytes"),
        ([datetime.date(2020, 1, 2), datetime.date(2021, 3, 4)], "a date or time"),
        ([True, False], "true or false"),
        ([1.0, float("inf")], "holds inf, which is no number"),
    ],
)
def test_values_without_a_certain_text_are_refused_by_row(values: list[Any], kind: str, tmp_path: Path) -> None:
    row = "row 1" if "inf" in kind else "row 0"
    worlds.refused(lambda: load_problems(table(tmp_path, values)), row, "column 'a'", kind)


def test_a_template_says_what_a_list_means(tmp_path: Path) -> None:
    values = [["2"], ["4", "5"]]
    path = table(tmp_path, values, answer="{{ a | join(', ') }}")
    assert [problem.answer for problem in load_problems(path)] == ["2", "4, 5"]
    worlds.refused(lambda: load_problems(table(tmp_path, values, answer="{{ a }}")), "row 0", "holds a list")
    [problem, _] = load_problems(table(tmp_path, [0.25, 3.0], answer="{{ a }}"))
    assert problem.answer == "0.25"


def csv_task(folder: Path, text: str, **changes: Any) -> str:
    (folder / "t.csv").write_text(text, encoding="utf-8")
    spec = {"path": "t.csv", "question": "q", "answer": "a", "instruction": ""} | changes
    (folder / "t.yaml").write_text(yaml.safe_dump(spec))
    return str(folder / "t.yaml")


def test_cells_of_a_csv_stay_the_text_they_are(tmp_path: Path) -> None:
    words = ["None", "NA", "null", "NaN", "007", "1.50", "true", "2020-01-02"]
    path = csv_task(tmp_path, "\ufeffq,a\n" + "".join(f"which {n}?,{word}\n" for n, word in enumerate(words)))
    assert [problem.answer for problem in load_problems(path)] == words
    assert load_problems(csv_task(tmp_path, "q,a\nwho?,\n"))[0].answer is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q,a\nx,1\ny\n", ["line 3 has 1 cell,"]),
        ("q,a\nx,1,2\n", ["line 2 has 3 cells"]),
        ("q,q\n1,2\n", ["each once"]),
        ('q,a\n"x,1\n', ["could not be read"]),
        ("q,a\n,1\n", ["row 0", "question is empty"]),
    ],
)
def test_a_damaged_csv_is_named_by_row(text: str, words: list[str], tmp_path: Path) -> None:
    worlds.refused(lambda: load_problems(csv_task(tmp_path, text)), *words)


# --- train and test -----------------------------------------------------------------------------------


def test_a_fraction_divides_one_file_by_its_questions(tmp_path: Path) -> None:
    rows = "".join(f"{n}+1,{n}\n" for n in range(200)) + " 3+1 ,3\n"
    train, test = (
        load_problems(csv_task(tmp_path, "q,a\n" + rows, test_fraction=0.25), split=s) for s in ("train", "test")
    )
    assert len(train) + len(test) == 201 and 30 < len(test) < 70
    assert not {problem.question for problem in train} & {problem.question for problem in test}
    worlds.refused(lambda: load_problems(csv_task(tmp_path, rows, test_fraction=0.25), split="dev"), "train, test")
    worlds.refused(lambda: load_problems(csv_task(tmp_path, rows, test_fraction=1.0)), "test_fraction must be between")


def test_one_file_without_a_fraction_says_that_it_is_one_split(tmp_path: Path, caplog: Any) -> None:
    path = csv_task(tmp_path, "q,a\n1+1,2\n", name=f"one-{tmp_path.name}")
    for split in ("train", "test"):
        assert len(load_problems(path, split=split)) == 1
    assert caplog.text.count("train and test problems are the same") == 1 and "test_fraction" in caplog.text


def test_the_version_of_a_task_without_a_fraction_is_what_it_was(tmp_path: Path) -> None:
    path = csv_task(tmp_path, "q,a\n1+1,2\n")
    before, after = (
        compute_task_version(path),
        compute_task_version(csv_task(tmp_path, "q,a\n1+1,2\n", test_fraction=0.5)),
    )
    assert before != after


# --- whose file is it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../secret.yaml", "link.yaml"])
def test_examples_from_outside_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.yaml").write_text("- {question: hunter2, answer: '\\boxed{hunter2}'}\n")
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    message = worlds.refused(lambda: load_problems(described(folder, few_shot=name)), "leads out of the folder")
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "text",
    [
        "password: hunter2\n",
        "hunter2\n",
        "- hunter2\n",
        "hunter2: [\n",
        "a: !!hunter2 x\n",
        "? [hunter2]\n: x\n",
        "a: *hunter2\n",
        "hunter2: 1\nhunter2: 2\n",
        "a: !!int hunter2\n",
    ],
)
def test_what_is_in_a_file_that_is_no_task_is_not_said(text: str, tmp_path: Path) -> None:
    (tmp_path / "notes.yaml").write_text(text)
    assert "hunter2" not in worlds.refused(lambda: load_problems(str(tmp_path / "notes.yaml")), "notes.yaml")
    path = described(tmp_path, few_shot="notes.yaml")
    assert "hunter2" not in worlds.refused(lambda: load_problems(path), "few_shot")


def test_whole_numbers_that_lost_digits_are_refused(tmp_path: Path) -> None:
    rows = ['{"q": "a", "a": 9007199254740993}', '{"q": "b", "a": 0.5}']  # which makes floats of the column
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    (tmp_path / "t.yaml").write_text("path: d.jsonl\nquestion: q\nanswer: a\n")
    with pytest.raises(ValueError, match=r"row 0: column 'a' holds the float .* lost digits"):
        load_problems(str(tmp_path / "t.yaml"))


def test_a_pattern_that_backtracks_is_refused_in_time(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("q,a\nx," + "a" * 60 + "b\n")
    (tmp_path / "t.yaml").write_text("path: d.csv\nquestion: q\nanswer: a\nparse: regex\npattern: (a|aa)+$\n")
    with pytest.raises(ValueError, match=r"row 0: pattern .* takes more than 2 s"):
        load_problems(str(tmp_path / "t.yaml"))
