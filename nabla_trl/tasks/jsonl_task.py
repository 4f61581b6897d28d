r"""Problems of rows: of a JSONL, JSON, CSV or Parquet file, or in memory. `tasks.registry` lists the fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nabla_trl.grading.extraction import detect_answer_format
from nabla_trl.tasks.gold_answers import parse_hashes
from nabla_trl.tasks.problem import Problem, append_instruction, get_question_identity
from nabla_trl.utils.fields import check_choices
from nabla_trl.utils.files import read_csv_file, read_json_rows, read_jsonl_file, refuse_unreadable
from nabla_trl.utils.identity import hash_files

QUESTION_FIELDS = ("question", "problem", "prompt")
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
FIELDS = (*QUESTION_FIELDS, "answer", "solution", "id", "level", "instruction", "messages")


def load_file_problems(path: Path) -> list[Problem]:
    """Load the problems of a file: .jsonl, .json (a list of objects), .csv (with a header) or .parquet.

    Raises:
        ValueError: if the file cannot be read, is empty, or has a wrong line or a duplicate, which the message names.
    """
    problems = parse_rows(_read_rows(path), path.stem, hash_files([path]))
    if not problems:
        content = "one JSON object per line" if path.suffix == ".jsonl" else "one row per problem"
        raise ValueError(f"{path} holds no problems: write {content}")
    return problems


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a file, each with its place for messages."""
    if path.suffix == ".jsonl":
        yield from ((f"{path}, line {line}", row) for line, row in read_jsonl_file(path))
        return
    if path.suffix == ".json":
        rows = read_json_rows(path)
    elif path.suffix == ".csv":
        with refuse_unreadable(str(path)):
            rows = [{name: cell or None for name, cell in row.items()} for row in read_csv_file(path)[1]]
    else:
        from pyarrow import parquet

        with refuse_unreadable(str(path)):
            rows = parquet.read_table(path).to_pylist()
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows))


def build_problems(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> list[Problem]:
    """Return the problems of dicts, or of the rows of a data set.

    Args:
        columns: field → name of the column that holds it, where the two differ.

    Raises:
        ValueError: an unknown field in `columns`, a row without a question or with a value of another type, or a
            duplicate.
    """
    columns = columns or {}
    check_choices("field of a problem in columns", columns, FIELDS)

    def rename(row: Mapping[str, Any], where: str) -> dict[str, Any]:
        if missing := [column for column in columns.values() if column not in row]:
            raise ValueError(f"{where} has no column {missing[0]!r}: it has {', '.join(map(str, row))}")
        renamed = {name: value for name, value in row.items() if name not in columns.values()}
        return renamed | {field: row[column] for field, column in columns.items()}

    numbered = ((f"row {number} of the problems", row) for number, row in enumerate(rows))
    return parse_rows(((where, rename(row, where)) for where, row in numbered), "custom", "")


def parse_rows(rows: Iterable[tuple[str, dict[str, Any]]], task: str, version: str) -> list[Problem]:
    """Return the problems of rows, each with its place for messages.

    Raises:
        ValueError: a wrong row, or a duplicate.
    """
    problems: list[Problem] = []
    place_of_id: dict[str, str] = {}
    place_of_question: dict[tuple[str, ...], str] = {}
    for where, row in rows:
        problem = _parse_problem(row, f"{task}/{len(problems)}", task, version, where)
        earlier = place_of_id.setdefault(problem.id, where)
        if earlier != where:
            raise ValueError(f"{where}: id {problem.id!r} is already on {_shorten(earlier)}; ids must be unique")
        earlier = place_of_question.setdefault(get_question_identity(problem), where)
        if earlier != where:
            raise ValueError(f"{where}: the question is already on {_shorten(earlier)}; remove one of the two")
        problems.append(problem)
    return problems


def _shorten(place: str) -> str:
    """Return a place without the name of its file."""
    return place.rpartition(", ")[2].removesuffix(" of the problems")


def _parse_problem(row: dict[str, Any], default_id: str, task: str, version: str, where: str) -> Problem:
    if isinstance(row.get("prompt"), list):  # a chat, as in the data sets of TRL
        row = {"messages": row["prompt"], **{name: value for name, value in row.items() if name != "prompt"}}
    messages = _read_messages(row, where)
    question = next((_read_text(row, name, where) for name in QUESTION_FIELDS if name in row), None)
    if question is None and messages is not None:
        question = messages[-1]["content"]
    if question is None or not question.strip():
        raise ValueError(
            f"{where}: no question; give one of {', '.join(QUESTION_FIELDS)}, or messages. Its columns are "
            f"{', '.join(map(str, row)) or 'none'}: load_problems(rows, columns={{'question': COLUMN, 'answer': "
            "COLUMN}) names others"
        )
    instruction = _read_text(row, "instruction", where)
    if instruction is not None:
        if messages is not None:
            raise ValueError(f"{where}: give either instruction or messages, not both")
        messages = append_instruction(question, instruction)
    answer, solution = parse_hashes(_read_text(row, "answer", where, allow_integer=True) or "")
    return Problem(
        id=_read_text(row, "id", where, allow_integer=True) or default_id,
        question=question,
        answer=answer,
        solution=_read_text(row, "solution", where) or solution,
        messages=messages,
        task=task,
        level=_read_text(row, "level", where, allow_integer=True),
        task_version=version,
        answer_format=detect_answer_format(instruction or ""),
        columns={str(name): value for name, value in row.items() if name not in FIELDS} or None,
    )


def _read_text(row: dict[str, Any], name: str, where: str, allow_integer: bool = False) -> str | None:
    """Return a string field, or None if it is absent or null."""
    value = row.get(name)
    if allow_integer and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # other numbers have several spellings, such as 0.1 and 1e-1
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, found {type(value).__name__}")
    return value


def _read_messages(row: dict[str, Any], where: str) -> tuple[dict[str, str], ...] | None:
    messages = row.get("messages")
    if messages is None:
        return None
    is_chat = isinstance(messages, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )
    if not is_chat or not messages or messages[-1]["role"] != "user":
        raise ValueError(
            f'{where}: messages must be a list of {{"role", "content"}} strings that ends with a user turn'
        )
    return tuple({key: message[key] for key in ("role", "content")} for message in messages)
