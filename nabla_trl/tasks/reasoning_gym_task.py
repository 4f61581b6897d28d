"""Procedural families of reasoning-gym as tasks: `reasoning_gym:chain_sum`, `reasoning_gym:gcd,max_value=99,seed=7`.

Stojanovski et al., arXiv 2505.24760; `pip install 'nabla-trl[reasoning-gym]'`. What follows the family are options of
its configuration and the seed. The splits are drawn from seeds apart, and a question belongs to one of them alone, by
its hash, as in `nabla_trl.tasks.digit_chains`. A gold number is compared as anywhere else, where the family has no scorer of its
own; all other answers are judged by the family's `score_answer`, in a worker of `nabla_trl.grading.checker`: 1 is right.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from typing import Any

import yaml

from nabla_trl.grading.equivalence import VERIFIER_PREFIX, parse_plain_number
from nabla_trl.tasks.problem import BOXED_INSTRUCTION, Problem, append_instruction
from nabla_trl.tasks.registry import REASONING_GYM_PREFIX

DEFAULT_NUM_PROBLEMS = {"train": 1000, "test": 300}
_DATASET_SIZE = 10_000  # questions that a family is made for; some make all of them at once
_TASK_NAME_PATTERN = re.compile(rf"{REASONING_GYM_PREFIX}(?P<family>\w+)(?P<options>(?:,\w+=[^,]+)*)")


def get_generator_version(name: str) -> str:
    """The version of the package, which decides what a seed gives.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"{name} needs an extra: pip install 'nabla-trl[reasoning-gym]'") from error


def make_reasoning_gym_problems(
    name: str, split: str, num_problems: int | None = None, seed: int | None = None
) -> list[Problem]:
    """The first `limit` distinct problems of a split (default: 1000 train, 300 test).

    Args:
        name: as the module tells; `seed` wins over a seed in it.

    Raises:
        ValueError: a name or split that is none, options that the family refuses, too few distinct questions, or a
            family whose questions have no gold answer.
    """
    made_by = get_generator_version(name)
    if split not in DEFAULT_NUM_PROBLEMS:
        raise ValueError(f"{name} has the splits {', '.join(DEFAULT_NUM_PROBLEMS)}, not {split!r}")
    family, options = parse_task_name(name)
    own = options.pop("seed", 0)
    seed = own if seed is None else seed
    source = {"name": family, "options": options, "seed": (2 * seed + (split == "test")) << 24}
    entries = _generate_entries(name, source)
    num_problems = DEFAULT_NUM_PROBLEMS[split] if num_problems is None else num_problems
    problems: dict[str, Problem] = {}
    for index, entry in enumerate(entries):
        if len(problems) == num_problems:
            break
        question = entry["question"].strip()
        if assign_reasoning_gym_split(question) == split and question not in problems:
            problems[question] = _make_reasoning_gym_problem(
                name, f"{split}/{seed}-{index}", entry, source | {"index": index}, made_by
            )
    if len(problems) < num_problems:
        raise ValueError(
            f"{name} gives only {len(problems)} distinct {split} questions in {_DATASET_SIZE}: set a lower limit"
        )
    return list(problems.values())


def parse_task_name(name: str) -> tuple[str, dict[str, Any]]:
    """Family and options of a task's name; ValueError where it is none, or an option has no value that can be read."""
    match = _TASK_NAME_PATTERN.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{name!r} must be {REASONING_GYM_PREFIX}FAMILY, with options as in {REASONING_GYM_PREFIX}FAMILY,key=value"
        )
    pairs = [one.partition("=") for one in match["options"].split(",") if one]
    try:
        options = {key: yaml.safe_load(value) for key, _, value in pairs}
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: cannot read its options: {' '.join(str(error).split())}") from error
    seed = options.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:  # a generator takes −1 for 1
        raise ValueError(f"{name}: seed must be a whole number of at least 0, not {seed!r}")
    return match["family"], options


def assign_reasoning_gym_split(question: str) -> str:
    """The split that a question belongs to: a function of its text alone."""
    return "test" if hashlib.sha256(question.encode()).digest()[0] % 2 else "train"


def _generate_entries(name: str, source: dict[str, Any]) -> Any:
    import reasoning_gym

    try:
        made = reasoning_gym.create_dataset(
            source["name"], seed=source["seed"], size=_DATASET_SIZE, **source["options"]
        )
        return (made[index] for index in range(_DATASET_SIZE))
    except Exception as error:  # families assert, and raise what they like
        raise ValueError(f"{name}: {type(error).__name__} {' '.join(str(error).split())}") from error


def _make_reasoning_gym_problem(
    name: str, place: str, entry: dict[str, Any], source: dict[str, Any], made_by: str
) -> Problem:
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

    answer = entry["answer"]
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{name}: its questions have no gold answer to compare with; choose another family")
    own_scorer = DATASETS[source["name"]][0].score_answer is not ProceduralDataset.score_answer
    compared = not own_scorer and parse_plain_number(answer) is not None
    return Problem(
        id=f"{name}/{place}",
        question=entry["question"].strip(),
        answer=answer,
        messages=append_instruction(entry["question"].strip(), BOXED_INSTRUCTION),
        task=name,
        task_version=made_by,
        answer_format="boxed",
        verifier=None if compared else VERIFIER_PREFIX + json.dumps({**source, "size": _DATASET_SIZE}),
    )
