"""The problems of a stage, with what names them in the settings of an output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nabla_trl.models.options import PromptOptions
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import Problems, get_task_settings, load_problems


@dataclass(frozen=True)
class ProblemSet:
    """Problems and where they come from.

    Attributes:
        name: of the task, or the names of the tasks of problems in memory.
        settings: task, version and split, which an output is claimed with.
    """

    problems: list[Problem]
    name: str
    settings: dict[str, str]


def collect_problems(
    source: Problems, *, split: str, max_problems: int | None, prompt_options: PromptOptions | None = None
) -> ProblemSet:
    """Return the problems of a task's name or of rows in memory (see `load_problems`).

    Problems in memory are compared one by one with those of an output, so they may grow.

    Args:
        prompt_options: how the problems are written as prompts. None: that is checked elsewhere.

    Raises:
        ValueError: as `load_problems`, or problems that cannot be written as prompts.
    """
    problems = load_problems(source, split=split, max_problems=max_problems)
    if prompt_options is not None:
        prompt_options.check_problems(problems)
    if isinstance(source, str | Path):
        return ProblemSet(problems, str(source), get_task_settings(source) | {"split": split})
    name = ", ".join(sorted({problem.task for problem in problems}))
    return ProblemSet(problems, name, {"dataset": f"{name} (in memory)"})
