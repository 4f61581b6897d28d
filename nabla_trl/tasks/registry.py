r"""Problems and where they come from, by the name of a task.

    load_problems("gsm8k", split="train", limit=200, seed=0)      # from the hub, or its local cache
    load_problems("chains", split="test")                         # procedural, needs no file
    load_problems("svamp.yaml", split="test")                     # any data set, read as a YAML says
    load_problems("reasoning_gym:chain_sum")                      # a procedural family of reasoning-gym
    load_problems("my_problems.jsonl")                            # one JSON object per line

What a YAML holds: `nabla_trl.tasks.yaml_task.Task`. A line of a JSONL file holds `question` (or `problem`, or `prompt`) and
may hold
- `answer`: the gold final answer; where it ends in a line "#### n", n is the answer, the text the solution,
- `solution`, `id`, `level`,
- `instruction`, appended to the question in the chat, or `messages`, the whole chat. Without either the
  question is sent as it is: a small model with a format of its own must not be told about \boxed{}.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

from nabla_trl.tasks.problem import Problem

REASONING_GYM_PREFIX = "reasoning_gym:"


def load_problems(
    name_or_path: str, *, split: str = "test", max_problems: int | None = None, seed: int | None = None
) -> list[Problem]:
    """Problems of a task by name, or as a local file holds or describes them.

    Args:
        name_or_path: one of `task_files.benchmarks()`, "chains", "reasoning_gym:FAMILY", or the path of a `.jsonl`
            or `.yaml` file.
        split: "train" or "test" where the task has it. A JSONL file is one split, so it does not apply there.
        limit: how many problems to keep, at least 1; None keeps all (procedural ones: their default number).
        seed: shuffle before `limit`; None keeps the order of the data. Procedural tasks draw other problems instead.

    Raises:
        ValueError: unknown task or split, hub out of reach, or a bad line or description, which is named.
    """
    if max_problems is not None and max_problems < 1:
        raise ValueError(f"limit must be at least 1, got {max_problems}")
    # The rooms of the tasks build on `Problem`, so they are imported here.
    if name_or_path == "chains":
        from nabla_trl.tasks.digit_chains import make_digit_chain_problems

        return make_digit_chain_problems(split, max_problems, 0 if seed is None else seed)
    if name_or_path.startswith(REASONING_GYM_PREFIX):
        from nabla_trl.tasks.reasoning_gym_task import make_reasoning_gym_problems as make_procedural

        return make_procedural(name_or_path, split, max_problems, seed)
    if Path(name_or_path).suffix == ".jsonl":
        from nabla_trl.tasks.jsonl_task import load_jsonl_problems

        problems = load_jsonl_problems(Path(name_or_path))
    else:
        from nabla_trl.tasks.yaml_task import load_task_config, load_task_problems

        problems = load_task_problems(load_task_config(name_or_path), split)
    if seed is not None:
        random.Random(seed).shuffle(problems)
    return problems[:max_problems]


def compute_task_version(name_or_path: str) -> str:
    """What rows must have in common to be of the same task: of the data, the prompt and the way gold answers are read.

    Of a JSONL file a hash of its content; of a benchmark or YAML the number and a hash of the description, and the
    data set's revision; of procedural tasks the version of the generator. Every problem carries it.

    Raises:
        ValueError: as `load_problems`.
    """
    if name_or_path == "chains":
        from nabla_trl.tasks.digit_chains import GENERATOR_VERSION

        return GENERATOR_VERSION
    if name_or_path.startswith(REASONING_GYM_PREFIX):
        from nabla_trl.tasks.reasoning_gym_task import get_generator_version

        return get_generator_version(name_or_path)
    if Path(name_or_path).suffix == ".jsonl":
        from nabla_trl.tasks.jsonl_task import hash_file

        return hash_file(Path(name_or_path))
    from nabla_trl.tasks.yaml_task import load_task_config

    return load_task_config(name_or_path).compute_version()


def get_task_settings(name_or_path: str) -> dict[str, str]:
    """A task's name and version, for `tracing.claim_settings`: an output of one version is not added to by another.

    A JSONL file may grow: its problems are told apart one by one (`content_hash`).
    """
    if Path(name_or_path).suffix == ".jsonl":
        return {"dataset": name_or_path}
    return {"dataset": name_or_path, "task_version": compute_task_version(name_or_path)}


def collect_problem_facts(problems: Iterable[Problem]) -> dict[str, dict[str, str | None]]:
    """Id -> question and level: what a report says of held-out problems."""
    return {problem.id: {"question": problem.question, "level": problem.level} for problem in problems}
