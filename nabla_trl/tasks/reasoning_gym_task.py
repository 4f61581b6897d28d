"""Generated families of reasoning-gym as tasks: `reasoning_gym:chain_sum`, `reasoning_gym:gcd,max_value=99,seed=7`.

reasoning-gym is Stojanovski et al., arXiv 2505.24760, and needs `pip install 'nabla-trl[reasoning-gym]'`. The name of
a task holds the family, options of its configuration and the seed. The splits are generated from different seeds, and
a hash of its text decides which split a question belongs to, as in `nabla_trl.tasks.digit_chains`.

A gold number is compared as in any other task if the family has no scorer of its own. All other answers are scored by
the family's `score_answer` in a worker of `nabla_trl.grading.checker`. An answer is correct if its score is 1.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from typing import Any

from nabla_trl.grading.equivalence import VERIFIER_PREFIX, parse_plain_number
from nabla_trl.tasks.problem import (
    BOXED_INSTRUCTION,
    DEFAULT_NUM_PROBLEMS,
    Problem,
    append_instruction,
    check_generated_split,
)
from nabla_trl.utils.files import parse_yaml
from nabla_trl.utils.formatting import format_error

REASONING_GYM_PREFIX = "reasoning_gym:"
_DATASET_SIZE = 10_000  # questions that a family is created for. Some families generate all of them at once.
_TASK_NAME_PATTERN = re.compile(rf"{REASONING_GYM_PREFIX}(?P<family>\w+)(?P<options>(?:,\w+=[^,]+)*)")


def get_generator_version(name: str) -> str:
    """Return the version of reasoning-gym, which decides what a seed generates.

    Args:
        name: name of the task, for the error message.

    Raises:
        ValueError: if reasoning-gym is not installed.
    """
    try:
        return importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"{name} needs an extra: pip install 'nabla-trl[reasoning-gym]'") from error


def make_reasoning_gym_problems(
    name: str, split: str, num_problems: int | None = None, seed: int | None = None
) -> list[Problem]:
    """Generate the first distinct problems of a split.

    Args:
        name: see the module's docstring.
        num_problems: None means 1000 for train and 300 for test.
        seed: replaces the seed in the name.

    Raises:
        ValueError: if name or split is unknown, the family refuses the options, there are too few distinct questions,
            or the questions have no gold answer.
    """
    version = get_generator_version(name)
    check_generated_split(name, split)
    family, options = parse_task_name(name)
    name_seed = options.pop("seed", 0)
    seed = name_seed if seed is None else seed
    num_problems = DEFAULT_NUM_PROBLEMS[split] if num_problems is None else num_problems
    source = {"name": family, "options": options, "seed": (2 * seed + (split == "test")) << 24}
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(family, seed=source["seed"], size=_DATASET_SIZE, **options)
    except Exception as error:  # families raise errors of any kind
        raise ValueError(f"{name}: {type(error).__name__} {format_error(error)}") from error
    problems: dict[str, Problem] = {}
    for index in range(_DATASET_SIZE):
        if len(problems) == num_problems:
            break
        entry = dataset[index]
        question = entry["question"].strip()
        if assign_reasoning_gym_split(question) == split and question not in problems:
            problem_id = f"{name}/{split}/{seed}-{index}"
            problems[question] = _make_problem(problem_id, name, entry, source | {"index": index}, version)
    if len(problems) < num_problems:
        raise ValueError(
            f"{name} gives only {len(problems)} distinct {split} questions in {_DATASET_SIZE}: lower --max_problems"
        )
    return list(problems.values())


def parse_task_name(name: str) -> tuple[str, dict[str, Any]]:
    """Return the family and the options in the name of a task.

    Raises:
        ValueError: if the name has another form, or an option's value cannot be read.
    """
    match = _TASK_NAME_PATTERN.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} must be {REASONING_GYM_PREFIX}FAMILY, with options as in {REASONING_GYM_PREFIX}FAMILY,key=value"
        )
    assignments = [option.partition("=") for option in match["options"].split(",") if option]
    try:
        options = {key: parse_yaml(value) for key, _, value in assignments}
    except ValueError as error:
        raise ValueError(f"{name}: cannot read its options: {format_error(error)}") from error
    seed = options.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:  # a generator takes −1 for 1
        raise ValueError(f"{name}: seed must be a whole number of at least 0, not {seed!r}")
    return match["family"], options


def assign_reasoning_gym_split(question: str) -> str:
    """Return the split that a question belongs to, which depends on its text alone."""
    return "test" if hashlib.sha256(question.encode()).digest()[0] % 2 else "train"


def _make_problem(problem_id: str, name: str, entry: dict[str, Any], source: dict[str, Any], version: str) -> Problem:
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

    question, answer = entry["question"].strip(), entry["answer"]
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{name}: its questions have no gold answer to compare with; choose another family")
    has_scorer = DATASETS[source["name"]][0].score_answer is not ProceduralDataset.score_answer
    is_compared = not has_scorer and parse_plain_number(answer) is not None
    return Problem(
        id=problem_id,
        question=question,
        answer=answer,
        messages=append_instruction(question, BOXED_INSTRUCTION),
        task=name,
        task_version=version,
        answer_format="boxed",
        verifier=None if is_compared else VERIFIER_PREFIX + json.dumps({**source, "size": _DATASET_SIZE}),
    )
