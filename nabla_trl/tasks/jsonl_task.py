r"""Problems of a local JSONL file, one object per line. `nabla_trl.tasks.registry` lists the fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nabla_trl.grading.extraction import detect_answer_format
from nabla_trl.tasks.gold_answers import parse_hashes
from nabla_trl.tasks.problem import Problem, append_instruction, get_question_identity
from nabla_trl.utils.files import read_jsonl_file
from nabla_trl.utils.identity import hash_files

QUESTION_FIELDS = ("question", "problem", "prompt")


def load_jsonl_problems(path: Path) -> list[Problem]:
    """Load the problems of a file.

    Raises:
        ValueError: if the file cannot be read, is empty, or has a wrong line or a duplicate, which the message names.
    """
    problems: list[Problem] = []
    line_of_id: dict[str, int] = {}
    line_of_question: dict[tuple[str, ...], int] = {}
    version = hash_files([path])
    for line, row in read_jsonl_file(path):
        where = f"{path}, line {line}"
        problem = _parse_problem(row, f"{path.stem}/{len(problems)}", path.stem, version, where)
        earlier = line_of_id.setdefault(problem.id, line)
        if earlier != line:
            raise ValueError(f"{where}: id {problem.id!r} is already on line {earlier}; ids must be unique")
        earlier = line_of_question.setdefault(get_question_identity(problem), line)
        if earlier != line:
            raise ValueError(f"{where}: the question is already on line {earlier}; remove one of the two")
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path} holds no problems: write one JSON object per line")
    return problems


def _parse_problem(row: dict[str, Any], default_id: str, task: str, version: str, where: str) -> Problem:
    messages = _read_messages(row, where)
    question = next((_read_text(row, name, where) for name in QUESTION_FIELDS if name in row), None)
    if question is None and messages is not None:
        question = messages[-1]["content"]
    if question is None or not question.strip():
        raise ValueError(f"{where}: no question; give one of {', '.join(QUESTION_FIELDS)}, or messages")
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
