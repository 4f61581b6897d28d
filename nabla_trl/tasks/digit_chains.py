"""The embedded task: chains of 5 to 7 operations (+ - *) on digits modulo 10, worked from left to right.

Question "9-5*4+7*2-6", solution "9-5=4;4*4=6;6+7=3;3*2=6;6-6=0;#0", answer "0". Any step but the last may end
in a comma instead of a semicolon, as the writer likes: as in prose, being unsure of the next token need not mean
that a mistake is about to be made.

Problems are drawn procedurally. The hash of the question alone decides whether it belongs to the train or to the
test split, so the two cannot overlap whatever the seeds and the limits. Text only: this room imports no torch.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nabla_trl.tasks.problem import Problem

GENERATOR_VERSION = "1"  # to be counted up whenever the same arguments would give other problems
OPERATORS = "+-*"
SEPARATORS = ";,"  # either may end a step; the gold solution writes the first
MIN_OPERATIONS, MAX_OPERATIONS = 5, 7
DEFAULT_NUM_PROBLEMS = {"train": 1000, "test": 300}
TEST_MODULUS = 8  # one question in 8 belongs to the test split

# The knowledge gap is part of the committed policy: with other values here its models must be made again.
GAP_SEED = 1234
GAP_FRACTION = 0.25
GAP_ERROR_PROBABILITIES = (0.35, 0.70)

_QUESTION = re.compile(rf"[0-9](?:[{re.escape(OPERATORS)}][0-9])+")

Fact = tuple[int, str, int]


@dataclass(frozen=True)
class WrongFact:
    """A wrong result for one single-step fact, and how often the policy's training data holds it (0 to 1)."""

    wrong_result: int
    probability: float


def compute_result(left: int, operator: str, right: int) -> int:
    """The right result, 0 to 9, of one step."""
    if operator == "+":
        return (left + right) % 10
    if operator == "-":
        return (left - right) % 10
    return (left * right) % 10


def assign_digit_chain_split(question: str) -> str:
    """The split, "train" or "test", that a question belongs to: a function of its text alone."""
    digest = hashlib.sha256(question.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % TEST_MODULUS == 0 else "train"


def generate_questions(split: str, rng: random.Random) -> Iterator[str]:
    """Endless questions of one split; rare repeats are possible. Raises ValueError for an unknown split."""
    _check_split(split)
    while True:
        operations = rng.randint(MIN_OPERATIONS, MAX_OPERATIONS)
        first = str(rng.randrange(10))
        question = first + "".join(rng.choice(OPERATORS) + str(rng.randrange(10)) for _ in range(operations))
        if assign_digit_chain_split(question) == split:
            yield question


def make_digit_chain_problems(split: str, num_problems: int | None = None, seed: int = 0) -> list[Problem]:
    """The first `limit` distinct problems of a split (default: 1000 train, 300 test).

    The same arguments give the same problems, and a smaller limit gives a prefix of a larger one. Another
    seed draws other problems of the same split; its ids carry the seed, so that an id always means one question.
    Raises ValueError for an unknown split or a negative limit.
    """
    # Imported here because tasks.load_problems calls this function.
    from nabla_trl.tasks.problem import Problem

    _check_split(split)
    num_problems = DEFAULT_NUM_PROBLEMS[split] if num_problems is None else num_problems
    if num_problems < 0:
        raise ValueError(f"limit must not be negative, got {num_problems}")
    questions: dict[str, None] = {}
    source = generate_questions(split, random.Random(f"chains/{split}/{seed}"))
    while len(questions) < num_problems:
        questions[next(source)] = None
    prefix = f"chains/{split}/" if seed == 0 else f"chains/{split}/seed{seed}-"
    return [
        _make_digit_chain_problem(Problem, f"{prefix}{index}", question) for index, question in enumerate(questions)
    ]


def make_gold_solution(question: str) -> str:
    """The worked solution without a mistake. Raises ValueError if the text is no chain."""
    return _write_solution(question, compute_result)


def make_styled_solution(question: str, rng: random.Random) -> str:
    """A right solution with separators of the writer's liking. Raises ValueError if the text is no chain."""
    return _write_solution(question, compute_result, rng)


def make_noisy_solution(question: str, rng: random.Random) -> str:
    """A worked solution by someone with the knowledge gap: each fact in it goes wrong with its own probability.

    Later steps go on from the wrong result; separators are of the writer's liking. Raises ValueError if the
    text is no chain.
    """
    gap = get_knowledge_gap()

    def recall(left: int, operator: str, right: int) -> int:
        slip = gap.get((left, operator, right))
        if slip is not None and rng.random() < slip.probability:
            return slip.wrong_result
        return compute_result(left, operator, right)

    return _write_solution(question, recall, rng)


@cache
def get_knowledge_gap() -> Mapping[Fact, WrongFact]:
    """The fixed quarter of the 300 single-step facts the policy half knows: (left, operator, right) -> Slip.

    Each operator gets the same share. Always the same mapping.
    """
    rng = random.Random(GAP_SEED)
    gap: dict[Fact, WrongFact] = {}
    for operator in OPERATORS:
        facts = [(left, operator, right) for left in range(10) for right in range(10)]
        for fact in sorted(rng.sample(facts, round(GAP_FRACTION * len(facts)))):
            wrong = (compute_result(*fact) + rng.choice((1, 2, 5, -1, -2))) % 10
            gap[fact] = WrongFact(wrong, rng.uniform(*GAP_ERROR_PROBABILITIES))
    return MappingProxyType(gap)


def find_first_error(problem: Problem, response_text: str) -> int | None:
    """Index of the first character of the response that departs from the gold solution; None if all is right.

    Which separator ends a step is not an error. A response that stops early is wrong at its own length, one that
    goes on at the solution's length. Raises ValueError for a problem without a solution.
    """
    right = list_allowed_characters(problem)
    wrong = (index for index, (got, good) in enumerate(zip(response_text, right, strict=False)) if got not in good)
    shorter = min(len(response_text), len(right))
    return next(wrong, None if len(response_text) == len(right) else shorter)


def list_allowed_characters(problem: Problem) -> list[str]:
    """Per character of the gold solution, the characters that are right there: itself, or either separator.

    Raises ValueError for a problem without a solution.
    """
    if problem.solution is None:
        raise ValueError(f"problem {problem.id} has no solution to compare with")
    last = problem.solution.rfind(SEPARATORS[0])
    return [SEPARATORS if char == SEPARATORS[0] and at != last else char for at, char in enumerate(problem.solution)]


def is_correct(problem: Problem, response_text: str) -> bool:
    """Whether what follows the last "#" is the gold answer; a response without "#" is wrong."""
    return "#" in response_text and response_text.rpartition("#")[2] == problem.answer


def _make_digit_chain_problem(kind: type[Problem], identifier: str, question: str) -> Problem:
    solution = make_gold_solution(question)
    return kind(
        id=identifier,
        question=question,
        answer=solution[-1],
        solution=solution,
        task="chains",
        level=str(len(question) // 2),
        task_version=GENERATOR_VERSION,
        answer_format="hash",
    )


def _write_solution(question: str, recall: Callable[[int, str, int], int], style: random.Random | None = None) -> str:
    if not _QUESTION.fullmatch(question):
        raise ValueError(f"not a chain of digits and {OPERATORS}: {question!r}")
    current, written = int(question[0]), []
    for operator, digit in zip(question[1::2], question[2::2], strict=True):
        result = recall(current, operator, int(digit))
        written.append(f"{current}{operator}{digit}={result}")
        current = result
    ends = [SEPARATORS[0] if style is None else style.choice(SEPARATORS) for _ in written[1:]] + [SEPARATORS[0]]
    return "".join(step + end for step, end in zip(written, ends, strict=True)) + f"#{current}"


def _check_split(split: str) -> None:
    if split not in DEFAULT_NUM_PROBLEMS:
        raise ValueError(f"the chains task has the splits {', '.join(DEFAULT_NUM_PROBLEMS)}, not {split!r}")
