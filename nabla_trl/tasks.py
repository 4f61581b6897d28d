r"""Problems and where they come from: benchmark tasks on the hub, local JSONL files, the procedural chains.

    load_problems("gsm8k", split="train", limit=200, seed=0)      # from the hub, or its local cache
    load_problems("chains", split="test")                         # procedural, needs no file
    load_problems("my_problems.jsonl")                            # one JSON object per line

A line of a JSONL file holds `question` (or `problem`, or `prompt`) and may hold
- `answer`: the gold final answer; where it ends in a line "#### n", n is the answer, the text the solution,
- `solution`, `id`, `level`,
- `instruction`, appended to the question in the chat, or `messages`, the whole chat. Without either the
  question is sent as it is: a small model with a format of its own must not be told about \boxed{}.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
QUESTION_FIELDS = ("question", "problem", "prompt")


@dataclass(frozen=True)
class Problem:
    """One question with what is known about its answer.

    Attributes:
        id: unique within a task and split, such as "gsm8k/test/17".
        question: the user's question in plain text, without any instruction.
        answer: the gold final answer; None where there is none.
        solution: a worked gold solution if the data has one.
        messages: the chat to send; None means one user turn that holds `question`.
        task: name of the task; for a JSONL file its name without the ending.
        level: difficulty label of the data set, if any.
    """

    id: str
    question: str
    answer: str | None = None
    solution: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    task: str = "custom"
    level: str | None = None

    def chat(self) -> list[dict[str, str]]:
        """The chat as fresh `{"role", "content"}` dicts, ready for a tokenizer's chat template."""
        if self.messages is None:
            return [{"role": "user", "content": self.question}]
        return [dict(message) for message in self.messages]


def load_problems(
    name_or_path: str, *, split: str = "test", limit: int | None = None, seed: int | None = None
) -> list[Problem]:
    """Problems of a task by name, or of a local JSONL file.

    Args:
        name_or_path: a key of `HUB_TASKS`, "chains", or the path of a `.jsonl` file.
        split: "train" or "test" where the task has it. A file is one split, so it does not apply there.
        limit: how many problems to keep, at least 1; None keeps all (chains: its default number).
        seed: shuffle before `limit`; None keeps the order of the data. Chains draws other problems instead.

    Raises:
        ValueError: unknown task or split, hub out of reach, or a bad line of a file, which is named.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if name_or_path == "chains":
        from nabla_trl.chains import make_problems

        return make_problems(split, limit, 0 if seed is None else seed)
    if name_or_path in HUB_TASKS:
        problems = _load_hub(name_or_path, HUB_TASKS[name_or_path], split)
    elif Path(name_or_path).suffix == ".jsonl":
        problems = _load_jsonl(Path(name_or_path))
    else:
        known = ", ".join([*HUB_TASKS, "chains"])
        raise ValueError(f"unknown task {name_or_path!r}: use one of {known}, or the path of a .jsonl file")
    if seed is not None:
        random.Random(seed).shuffle(problems)
    return problems[:limit]


def graded(problems: list[Problem], *, told: bool = True) -> list[Problem]:
    """The problems with a gold answer; how many have none is said on stderr, where it is to be `told`.

    Raises:
        ValueError: none has one.
    """
    found = [problem for problem in problems if problem.answer]
    if not found:
        raise ValueError("no problem has a gold answer: nothing could be compared")
    if told and len(found) < len(problems):
        print(f"{len(problems) - len(found)} problems have no gold answer and are left out", file=sys.stderr)
    return found


def problem_facts(problems: Iterable[Problem]) -> dict[str, dict[str, str | None]]:
    """Id -> question and level: what a report says of held-out problems."""
    return {problem.id: {"question": problem.question, "level": problem.level} for problem in problems}


def data_identity(name_or_path: str) -> str:
    """A task's name; for a file its path and a hash of its content, since ids are line numbers there."""
    path = Path(name_or_path)
    if path.suffix != ".jsonl" or not path.is_file():
        return name_or_path
    return f"{name_or_path} ({hashlib.sha256(path.read_bytes()).hexdigest()[:12]})"


def content_hash(problem: Problem) -> str:
    """Of all that a result on a problem can depend on: what is asked, and the answer it is compared with."""
    content = {name: value for name, value in asdict(problem).items() if name not in ("id", "solution", "level")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def check_disjoint(train: list[Problem], held_out: list[Problem]) -> None:
    """Refuse held-out problems that are also trained on, comparing questions without case and white space.

    Raises:
        ValueError: naming how many overlap and the first three pairs of ids.
    """
    seen = {_normalized(problem): problem.id for problem in train}
    pairs = [(seen[_normalized(p)], p.id) for p in held_out if _normalized(p) in seen]
    if pairs:
        first = ", ".join(f"{a!r} = {b!r}" for a, b in pairs[:3])
        raise ValueError(
            f"{len(pairs)} held-out problem(s) are also trained on (train = held out: {first}); "
            "use another split or remove them"
        )


def _identity(problem: Problem) -> tuple[str, ...]:
    """What makes two problems the same: the earlier user turns and the question without instruction."""
    turns = [message["content"] for message in problem.messages or () if message["role"] == "user"]
    return (*turns[:-1], problem.question)


def _normalized(problem: Problem) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).casefold() for text in _identity(problem))


def _with_instruction(question: str, instruction: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": f"{question}\n{instruction}"},)


# --- tasks on the hub -----------------------------------------------------------------------------


def split_solution(text: str) -> tuple[str | None, str | None]:
    """Final answer and worked solution of a gold text in GSM8K's form (a last line "#### n").

    Without such a line the text is itself the answer and there is no solution. An empty answer is None.
    """
    match = re.search(r"^####(.*)\Z", text.strip(), flags=re.MULTILINE)
    if match is None:
        return text.strip() or None, None
    return match[1].strip().replace(",", "") or None, text


def plain_integer(text: str) -> tuple[str | None, str | None]:
    """An integer as one writes it: "025" and "25.0" give "25". Other text stays; empty text is None."""
    return re.sub(r"^(-?)0*(\d+)(?:\.0+)?$", r"\1\2", text.strip()) or None, None


@dataclass(frozen=True)
class HubTask:
    """Where a benchmark lies on the hub and how its rows are read.

    Attributes:
        path: hub id of the data set.
        revision: commit to load; None would follow the data set's main branch and is not reproducible.
        splits: our split names to the data set's own.
        question, answer, level: column names; a level of None means that the data has none.
        parse: the answer column as text to (gold answer or None, worked solution or None).
        solution: column of the worked solution where it is apart from the answer.
        config: the data set's configuration name.
        instruction: added to the user turn after the question.
    """

    path: str
    revision: str | None
    splits: Mapping[str, str]
    question: str = "problem"
    answer: str = "answer"
    parse: Callable[[str], tuple[str | None, str | None]] = split_solution
    solution: str | None = None
    level: str | None = None
    config: str | None = None
    instruction: str = INSTRUCTION


HUB_TASKS: dict[str, HubTask] = {
    "gsm8k": HubTask(
        "openai/gsm8k",
        "740312add88f781978c0658806c59bc2815b9866",
        {"train": "train", "test": "test"},
        question="question",
        config="main",
    ),
    "math500": HubTask(
        "HuggingFaceH4/MATH-500",
        "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
        {"test": "test"},
        solution="solution",
        level="level",
    ),
    # The three contests are held-out sets whatever their authors called the only split.
    "amc": HubTask(
        "AI-MO/aimo-validation-amc",
        "69d78a4a2c840e82d69af6bc742bda09005f6316",
        {"test": "train"},
        parse=plain_integer,
    ),
    "aime24": HubTask(
        "HuggingFaceH4/aime_2024",
        "2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
        {"test": "train"},
        parse=plain_integer,
        solution="solution",
    ),
    "aime25": HubTask(
        "math-ai/aime25",
        "563bb8404243c5f09de6ec262f2db674fe5bce9b",
        {"test": "test"},
        parse=plain_integer,
    ),
}


def _load_hub(name: str, task: HubTask, split: str) -> list[Problem]:
    if split not in task.splits:
        raise ValueError(f"task {name!r} has no split {split!r}: it has {', '.join(task.splits)}")
    import datasets  # a second to import, and files or chains do not need it

    try:
        rows = datasets.load_dataset(task.path, task.config, split=task.splits[split], revision=task.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"task {name!r} could not be loaded from the hub data set {task.path!r} ({reason}); "
            f"go online once to cache it, or pass the path of a local .jsonl file in place of {name!r}"
        ) from error
    return [_hub_problem(f"{name}/{split}/{index}", name, task, row) for index, row in enumerate(rows)]


def _hub_problem(problem_id: str, name: str, task: HubTask, row: Mapping[str, Any]) -> Problem:
    question = row[task.question].strip()
    answer, solution = task.parse(str(row[task.answer]))
    return Problem(
        id=problem_id,
        question=question,
        answer=answer,
        solution=row[task.solution] if task.solution else solution,
        messages=_with_instruction(question, task.instruction),
        task=name,
        level=str(row[task.level]) if task.level else None,
    )


# --- local JSONL ----------------------------------------------------------------------------------


def _load_jsonl(path: Path) -> list[Problem]:
    problems: list[Problem] = []
    line_of_id: dict[str, int] = {}
    line_of_question: dict[tuple[str, ...], int] = {}
    for line, row in _json_lines(path):
        where = f"{path}, line {line}"
        problem = _local_problem(row, default_id=f"{path.stem}/{len(problems)}", task=path.stem, where=where)
        earlier = line_of_id.setdefault(problem.id, line)
        if earlier != line:
            raise ValueError(f"{where}: id {problem.id!r} is already on line {earlier}; ids must be unique")
        earlier = line_of_question.setdefault(_identity(problem), line)
        if earlier != line:
            raise ValueError(f"{where}: the question is already on line {earlier}; remove one of the two")
        problems.append(problem)
    if not problems:
        raise ValueError(f"{path} holds no problems: write one JSON object per line")
    return problems


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of every line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        yield number, row


def _local_problem(row: dict[str, Any], *, default_id: str, task: str, where: str) -> Problem:
    messages = _messages(row, where)
    question = next((_text(row, name, where) for name in QUESTION_FIELDS if name in row), None)
    if question is None and messages is not None:
        question = messages[-1]["content"]
    if question is None or not question.strip():
        raise ValueError(f"{where}: no question; give one of {', '.join(QUESTION_FIELDS)}, or messages")
    instruction = _text(row, "instruction", where)
    if instruction is not None:
        if messages is not None:
            raise ValueError(f"{where}: give either instruction or messages, not both")
        messages = _with_instruction(question, instruction)
    answer, solution = split_solution(_text(row, "answer", where, integer=True) or "")
    return Problem(
        id=_text(row, "id", where, integer=True) or default_id,
        question=question,
        answer=answer,
        solution=_text(row, "solution", where) or solution,
        messages=messages,
        task=task,
        level=_text(row, "level", where, integer=True),
    )


def _text(row: dict[str, Any], name: str, where: str, integer: bool = False) -> str | None:
    """A string field, or None where absent or null; a whole number is taken where `integer` allows it."""
    value = row.get(name)
    if integer and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # other numbers have no one spelling: 0.1, 1e-1
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, found {type(value).__name__}")
    return value


def _messages(row: dict[str, Any], where: str) -> tuple[dict[str, str], ...] | None:
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
