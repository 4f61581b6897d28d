r"""Load problems by the name of a task.

    load_problems("gsm8k", split="train", max_problems=200, seed=0)  # from the hub or its local cache
    load_problems("digit_chains", split="test")                      # generated, needs no file
    load_problems("svamp.yaml", split="test")                        # any data set, read as a YAML file says
    load_problems("reasoning_gym:chain_sum")                         # a generated family of reasoning-gym
    load_problems("my_problems.jsonl")                               # one JSON object per line; .csv, .json, .parquet
    load_problems([{"question": "1+1", "answer": "2"}])              # rows in memory, also a datasets.Dataset

See `nabla_trl.tasks.yaml_task.TaskConfig` for the YAML file. A line of a JSONL file holds `question` (or `problem`, or
`prompt`). It may also hold

- `answer`: the gold final answer. If the text ends in a line "#### n", n is the answer and the text the solution.
- `solution`, `id`, `level`.
- `instruction`, which is appended to the question in the chat, or `messages`, the whole chat. Without either the
  question is sent as it is, because a small model with an answer format of its own must not be told about \boxed{}.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_trl.tasks.digit_chains import GENERATOR_VERSION, make_digit_chain_problems
from nabla_trl.tasks.jsonl_task import FILE_SUFFIXES, build_problems, load_file_problems
from nabla_trl.tasks.problem import Problem, select_problems
from nabla_trl.tasks.reasoning_gym_task import REASONING_GYM_PREFIX, get_generator_version, make_reasoning_gym_problems
from nabla_trl.tasks.yaml_task import load_task_config, load_task_problems
from nabla_trl.utils.fields import check_whole_number
from nabla_trl.utils.identity import hash_files


@dataclass(frozen=True)
class TaskSource:
    """A kind of task.

    Attributes:
        load: returns the problems of a name, a split, a maximum number of problems (or None) and a seed (or None).
        compute_version: returns the version of a name.
    """

    load: Callable[[str, str, int | None, int | None], list[Problem]]
    compute_version: Callable[[str], str]


# Pattern of a task's name → its source. The first pattern that matches counts.
TASK_SOURCES = {
    "digit_chains": TaskSource(
        lambda name, split, max_problems, seed: make_digit_chain_problems(split, max_problems, seed or 0),
        lambda name: GENERATOR_VERSION,
    ),
    f"{REASONING_GYM_PREFIX}.*": TaskSource(make_reasoning_gym_problems, get_generator_version),
    r".*\.(jsonl|json|csv|parquet)": TaskSource(
        lambda name, split, max_problems, seed: select_problems(load_file_problems(Path(name)), max_problems, seed),
        lambda name: hash_files([Path(name)]),
    ),
    ".*": TaskSource(
        lambda name, split, max_problems, seed: select_problems(
            load_task_problems(load_task_config(name), split), max_problems, seed
        ),
        lambda name: load_task_config(name).compute_version(),
    ),
}
_RENAMED_TASKS = {"chains": "digit_chains"}


# Problems themselves, questions as dicts, a `datasets.Dataset`, a table of pandas, or the name of a task.
Problems = str | Path | Iterable[Problem] | Iterable[Mapping[str, Any]]


def load_problems(
    name_or_rows: Problems,
    *,
    split: str = "test",
    max_problems: int | None = None,
    seed: int | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Problem]:
    """Load the problems of a task, or build them from rows in memory.

    Args:
        name_or_rows: one of `list_benchmarks()`, "digit_chains", "reasoning_gym:FAMILY", or the path of a `.jsonl` or
            `.yaml` file. Or rows in memory with the fields of a JSONL file: a list of dicts, a `datasets.Dataset` or
            a table of pandas. Or a list of `Problem`.
        split: "train" or "test", if the task has it. A JSONL file is one split, so its split is ignored, and so are
            rows. Of a `datasets.DatasetDict` it is the key.
        max_problems: maximum number of problems, at least 1. None means all, and for generated tasks their default.
        seed: shuffle the problems before `max_problems` are taken. None keeps the order of the data. For a generated
            task another seed gives other problems.
        columns: field → name of the column, for rows with other names, as {"question": "Problem"}.

    Raises:
        ValueError: if the task or split is unknown, the hub cannot be reached, a line, row or description is wrong, or
            there are no rows.
    """
    if max_problems is not None:
        check_whole_number("max_problems", max_problems, 1)
    if not isinstance(name_or_rows, str | Path):
        return select_problems(_build_from_rows(name_or_rows, split, columns), max_problems, seed)
    if columns:
        raise ValueError(f"columns are of rows in memory: describe the data set {name_or_rows} in a YAML file")
    return _find_source(str(name_or_rows)).load(str(name_or_rows), split, max_problems, seed)


def _build_from_rows(rows: Any, split: str, columns: Mapping[str, str] | None) -> list[Problem]:
    """Return the problems of rows in memory."""
    if isinstance(rows, Mapping) and not isinstance(rows.get("question", ""), str | None):
        raise ValueError("problems are rows, one dict for each, and not a dict of columns")
    if isinstance(rows, Mapping):
        if all(isinstance(value, str | int | float | None) for value in rows.values()):
            raise ValueError("one problem is a dict in a list: [problem]")
        if split not in rows:
            raise ValueError(f"the data set has the splits {', '.join(map(str, rows))}, and not {split!r}: set split")
        rows = rows[split]
    if hasattr(rows, "to_dict") and hasattr(rows, "iterrows"):
        rows = rows.to_dict("records")
    if isinstance(rows, Problem) or not isinstance(rows, Iterable):
        raise ValueError(f"expected a list of problems, not {type(rows).__name__}")
    items = list(rows)
    if not items:
        raise ValueError("there are no problems")
    if all(isinstance(item, Problem) for item in items):
        if columns:
            raise ValueError("columns are of rows, and these are problems already")
        return items
    if others := {type(item).__name__ for item in items if not isinstance(item, Mapping)}:
        raise ValueError(f"problems are Problem objects or dicts with a question, and not {', '.join(sorted(others))}")
    return build_problems(items, columns=columns)


def compute_task_version(name_or_path: str) -> str:
    """Return the version of a task's data, prompt and gold answers. Results are comparable if they have the same one.

    The version of a JSONL file is a hash of its content. That of a benchmark or YAML file is a number, a hash of the
    description and the data set's revision. That of a generated task is the version of its generator.

    Raises:
        ValueError: see `load_problems`.
    """
    return _find_source(name_or_path).compute_version(name_or_path)


def _find_source(name_or_path: str) -> TaskSource:
    if name_or_path in _RENAMED_TASKS:
        raise ValueError(f"unknown task {name_or_path!r}: it is now {_RENAMED_TASKS[name_or_path]!r}")
    return next(source for pattern, source in TASK_SOURCES.items() if re.fullmatch(pattern, name_or_path, re.DOTALL))


def get_task_settings(name_or_path: str | Path) -> dict[str, str]:
    """Return a task's name and version for `claim_settings`, so that an output never mixes two versions.

    A JSONL file may grow. Its version is left out, because its problems are compared one by one by their hashes.
    """
    name_or_path = str(name_or_path)
    if Path(name_or_path).suffix in FILE_SUFFIXES:
        return {"dataset": name_or_path}
    return {"dataset": name_or_path, "task_version": compute_task_version(name_or_path)}


def is_one_split(name_or_path: str) -> bool:
    """Return whether a data set is one file without splits, so that training and test problems are to be divided."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        task = load_task_config(name_or_path)
        return task.test_fraction is None and Path(task.path).is_file()
    return path.suffix in FILE_SUFFIXES
