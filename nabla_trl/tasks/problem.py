"""A problem: a question and what is known about its answer."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nabla_trl.utils.formatting import pluralize
from nabla_trl.utils.identity import hash_json

logger = logging.getLogger(__name__)

BOXED_INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
DEFAULT_NUM_PROBLEMS = {"train": 1000, "test": 300}  # of each split of a generated task
# Fields of a problem that no result on it depends on.
_UNHASHED_FIELDS = ("id", "solution", "level", "task_version")


@dataclass(frozen=True)
class Problem:
    """A question and what is known about its answer.

    Attributes:
        id: unique within a task and split, such as "gsm8k/test/17".
        question: the question in plain text, without any instruction.
        answer: the gold final answer, or None if there is none.
        solution: a worked gold solution, if the data has one.
        messages: the chat to send. None means one user turn that holds `question`.
        task: name of the task. For a JSONL file, its name without the ending.
        level: difficulty label of the data set, if any.
        task_version: version of the data that the problem was made from (see `compute_task_version`).
        answer_format: the format that the prompt asks for (see `extract_strict_answer`). None means no certain format.
        few_shot_examples: worked (question, answer) pairs for models without a chat template.
        stop_strings: strings that end a response, besides the model's stop tokens.
        verifier: names the scorer that replaces the comparison with the gold answer (see `reasoning_gym_task`).
        prompt_ids: the prompt in the policy's tokens. None means that it is written from the messages.
        columns: further columns of the data, for a reward that is a function. None means none.
    """

    id: str
    question: str
    answer: str | None = None
    solution: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    task: str = "custom"
    level: str | None = None
    task_version: str = ""
    answer_format: str | None = None
    few_shot_examples: tuple[tuple[str, str], ...] = ()
    stop_strings: tuple[str, ...] = ()
    verifier: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    columns: Mapping[str, Any] | None = None

    def build_messages(self) -> list[dict[str, str]]:
        """Return the chat as new `{"role", "content"}` dicts for a tokenizer's chat template."""
        if self.messages is None:
            return [{"role": "user", "content": self.question}]
        return [dict(message) for message in self.messages]

    @property
    def grading_target(self) -> str | None:
        """What `AnswerChecker` compares an answer with: the verifier if there is one, else the gold answer."""
        return self.verifier or self.answer


def filter_with_gold_answer(problems: list[Problem], *, verbose: bool = True) -> list[Problem]:
    """Return the problems with a gold answer.

    Args:
        verbose: print on stderr how many problems are left out.

    Raises:
        ValueError: if no problem has a gold answer.
    """
    with_gold = [problem for problem in problems if problem.answer]
    if not with_gold:
        raise ValueError(
            "no problem has a gold answer, so nothing could be compared: give the data a column named answer, or name "
            "its column in a YAML file"
        )
    if verbose and len(with_gold) < len(problems):
        count = pluralize(len(problems) - len(with_gold), "problem")
        logger.warning("%s without a gold answer left out", count)
    return with_gold


def select_problems(problems: list[Problem], max_problems: int | None, seed: int | None) -> list[Problem]:
    """Return the first `max_problems` problems, shuffled before if there is a seed. None returns all problems."""
    problems = list(problems)
    if seed is not None:
        random.Random(seed).shuffle(problems)
    return problems[:max_problems]


def check_generated_split(task: str, split: str) -> None:
    """Check the name of a split of a generated task."""
    if split not in DEFAULT_NUM_PROBLEMS:
        raise ValueError(f"{task} has the splits {', '.join(DEFAULT_NUM_PROBLEMS)}, not {split!r}")


def compute_content_hash(problem: Problem) -> str:
    """Return a hash of everything that a result on a problem can depend on, such as its question and gold answer."""
    content = {name: value for name, value in asdict(problem).items() if name not in _UNHASHED_FIELDS}
    if problem.prompt_ids is None:  # as it was hashed before there were prompts in tokens
        del content["prompt_ids"]
    columns = content.pop("columns")
    if columns:
        content["columns"] = json.loads(json.dumps(columns, default=str))
    return hash_json(content)


def check_disjoint(train_problems: list[Problem], held_out_problems: list[Problem]) -> None:
    """Check that no held-out problem is also a training problem. Case and white space of questions are ignored.

    Raises:
        ValueError: if problems overlap. The message has their number and the first three pairs of ids.
    """
    train_ids = {_normalize_question(problem): problem.id for problem in train_problems}
    keys = [(_normalize_question(problem), problem.id) for problem in held_out_problems]
    if overlaps := [(train_ids[key], problem_id) for key, problem_id in keys if key in train_ids]:
        first = ", ".join(f"{train_id!r} = {held_out_id!r}" for train_id, held_out_id in overlaps[:3])
        raise ValueError(
            f"{pluralize(len(overlaps), 'held-out problem is', 'held-out problems are')} also trained on "
            f"(train = held out: {first}); "
            "use another split or remove them"
        )


def divide_problems(
    problems: list[Problem], test_fraction: float, seed: int = 0
) -> tuple[list[Problem], list[Problem]]:
    """Divide problems into training and test problems by a hash of each question.

    A question keeps its side when others are added or removed. If a side would be empty, as may happen with a handful
    of problems, it gets the problem that is next to it.

    Args:
        test_fraction: expected share of test problems, between 0 and 1.
        seed: another seed gives another division.

    Raises:
        ValueError: there is only one problem, or the fraction is out of range.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, not {test_fraction:g}")
    if len(problems) < 2:
        raise ValueError(f"{len(problems)} problem cannot be divided into training and test problems: add more")
    places = [hash_to_unit_interval("\n".join(_normalize_question(problem)), seed) for problem in problems]
    border = min(max(test_fraction, min(places) + 1e-12), max(places))
    train = [problem for problem, place in zip(problems, places, strict=True) if place >= border]
    return train, [problem for problem, place in zip(problems, places, strict=True) if place < border]


def hash_to_unit_interval(text: str, seed: int = 0) -> float:
    """Return a number in [0, 1) that depends on a text and a seed alone."""
    return int(hash_json(f"{seed}:{text}" if seed else text, 8), 16) / 16**8


def get_question_identity(problem: Problem) -> tuple[str, ...]:
    """Return what makes two problems the same: the earlier user turns, and the question without its instruction."""
    turns = [message["content"] for message in problem.messages or () if message["role"] == "user"]
    return (*turns[:-1], problem.question)


def _normalize_question(problem: Problem) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).casefold() for text in get_question_identity(problem))


def append_instruction(question: str, instruction: str) -> tuple[dict[str, str], ...]:
    """Return one user turn with the question and, on the next line, how to answer."""
    return ({"role": "user", "content": f"{question}\n{instruction}"},)
