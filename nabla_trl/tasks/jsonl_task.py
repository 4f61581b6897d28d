r"""Problems of a local JSONL file, one object per line (`nabla_trl.tasks.registry` tells the fields)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from nabla_trl.grading.extraction import detect_answer_format
from nabla_trl.tasks.gold_answers import parse_hashes
from nabla_trl.tasks.problem import Problem, append_instruction, get_question_identity
from nabla_trl.utils.files import read_jsonl_file

QUESTION_FIELDS = ("question", "problem", "prompt")


def hash_file(path: Path) -> str:
    """A hash of a file's content; ValueError where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def load_jsonl_problems(path: Path) -> list[Problem]:
    """The problems of a file.

    Raises:
        ValueError: a file that cannot be read, no problems, a bad line or a duplicate, which is named.
    """
    problems: list[Problem] = []
    line_of_id: dict[str, int] = {}
    line_of_question: dict[tuple[str, ...], int] = {}
    version = hash_file(path)
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
    messages = _read_messages_field(row, where)
    question = next((_read_text_field(row, name, where) for name in QUESTION_FIELDS if name in row), None)
    if question is None and messages is not None:
        question = messages[-1]["content"]
    if question is None or not question.strip():
        raise ValueError(f"{where}: no question; give one of {', '.join(QUESTION_FIELDS)}, or messages")
    instruction = _read_text_field(row, "instruction", where)
    if instruction is not None:
        if messages is not None:
            raise ValueError(f"{where}: give either instruction or messages, not both")
        messages = append_instruction(question, instruction)
    answer, solution = parse_hashes(_read_text_field(row, "answer", where, integer=True) or "")
    return Problem(
        id=_read_text_field(row, "id", where, integer=True) or default_id,
        question=question,
        answer=answer,
        solution=_read_text_field(row, "solution", where) or solution,
        messages=messages,
        task=task,
        level=_read_text_field(row, "level", where, integer=True),
        task_version=version,
        answer_format=detect_answer_format(instruction or ""),
    )


def _read_text_field(row: dict[str, Any], name: str, where: str, integer: bool = False) -> str | None:
    """A string field, or None where absent or null; a whole number is taken where `integer` allows it."""
    value = row.get(name)
    if integer and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # other numbers have no one spelling: 0.1, 1e-1
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, found {type(value).__name__}")
    return value


def _read_messages_field(row: dict[str, Any], where: str) -> tuple[dict[str, str], ...] | None:
    value = row.get("messages")
    if value is None:
        return None
    is_chat = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not is_chat or not value or value[-1]["role"] != "user":
        raise ValueError(
            f'{where}: messages must be a list of {{"role", "content"}} strings that ends with a user turn'
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in value)
