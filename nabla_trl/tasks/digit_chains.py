"""The embedded task: chains of 5 to 7 operations (+ - *) on digits modulo 10, computed from left to right.

The question "9-5*4+7*2-6" has the solution "9-5=4;4*4=6;6+7=3;3*2=6;6-6=0;#0" and the answer "0". Any step but the
last may end in a comma instead of a semicolon. So, as in prose, a model can be unsure of the next token without being
about to make a mistake.

A hash of its text decides which split a question belongs to, so the splits cannot overlap. Problem ids and random
streams keep the task's first name, `chains`. Other ids would change every response that is sampled.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

from nabla_trl.tasks.problem import DEFAULT_NUM_PROBLEMS, Problem, check_generated_split

GENERATOR_VERSION = "1"  # increase it whenever the same arguments would give other problems
OPERATORS = "+-*"
SEPARATORS = ";,"  # both may end a step, and the gold solution has the first
MIN_OPERATIONS, MAX_OPERATIONS = 5, 7
TEST_MODULUS = 8  # one question in 8 belongs to the test split

# The committed policy was trained with these values. Other values need other models.
GAP_SEED = 1234
GAP_FRACTION = 0.25
GAP_ERROR_PROBABILITIES = (0.35, 0.70)

_QUESTION = re.compile(rf"[0-9](?:[{re.escape(OPERATORS)}][0-9])+")

Fact = tuple[int, str, int]  # left operand, operator, right operand


@dataclass(frozen=True)
class WrongFact:
    """A wrong result of one fact, and the probability of it in the policy's training data."""

    wrong_result: int
    probability: float


def compute_result(left: int, operator: str, right: int) -> int:
    """Return the correct result, 0 to 9, of one step."""
    if operator == "+":
        return (left + right) % 10
    if operator == "-":
        return (left - right) % 10
    return (left * right) % 10


def assign_digit_chain_split(question: str) -> str:
    """Return the split, "train" or "test", that a question belongs to, which depends on its text alone."""
    digest = hashlib.sha256(question.encode()).digest()
    return "test" if int.from_bytes(digest[:4], "big") % TEST_MODULUS == 0 else "train"


def generate_questions(split: str, rng: random.Random) -> Iterator[str]:
    """Yield questions of one split without end. Rare repeats are possible.

    Raises:
        ValueError: if the split is unknown.
    """
    check_generated_split("digit_chains", split)
    while True:
        operations = rng.randint(MIN_OPERATIONS, MAX_OPERATIONS)
        first = str(rng.randrange(10))
        question = first + "".join(rng.choice(OPERATORS) + str(rng.randrange(10)) for _ in range(operations))
        if assign_digit_chain_split(question) == split:
            yield question


def make_digit_chain_problems(split: str, num_problems: int | None = None, seed: int = 0) -> list[Problem]:
    """Generate the first distinct problems of a split. Fewer problems are a prefix of more problems.

    Args:
        num_problems: None means 1000 for train and 300 for test.
        seed: another seed gives other problems of the same split. Their ids hold the seed, so that an id always means
            the same question.

    Raises:
        ValueError: if the split is unknown or `num_problems` is negative.
    """
    check_generated_split("digit_chains", split)
    num_problems = DEFAULT_NUM_PROBLEMS[split] if num_problems is None else num_problems
    if num_problems < 0:
        raise ValueError(f"num_problems must not be negative, got {num_problems}")
    source = generate_questions(split, random.Random(f"chains/{split}/{seed}"))
    questions: dict[str, None] = {}
    while len(questions) < num_problems:
        questions[next(source)] = None
    prefix = f"chains/{split}/" if seed == 0 else f"chains/{split}/seed{seed}-"
    solutions = {question: make_gold_solution(question) for question in questions}
    return [
        Problem(
            id=f"{prefix}{index}",
            question=question,
            answer=solution[-1],
            solution=solution,
            task="digit_chains",
            level=str(len(question) // 2),
            task_version=GENERATOR_VERSION,
            answer_format="hash",
        )
        for index, (question, solution) in enumerate(solutions.items())
    ]


def make_gold_solution(question: str) -> str:
    """Return the worked solution without mistakes.

    Raises:
        ValueError: if the question is not a chain.
    """
    return _write_solution(question, compute_result)


def make_styled_solution(question: str, rng: random.Random) -> str:
    """Return a correct solution with random separators.

    Raises:
        ValueError: if the question is not a chain.
    """
    return _write_solution(question, compute_result, rng)


def make_noisy_solution(question: str, rng: random.Random) -> str:
    """Return a solution in which each fact of the knowledge gap is wrong with its own probability.

    Later steps use the wrong result. Separators are random.

    Raises:
        ValueError: if the question is not a chain.
    """
    gap = get_knowledge_gap()

    def recall(left: int, operator: str, right: int) -> int:
        wrong_fact = gap.get((left, operator, right))
        if wrong_fact is not None and rng.random() < wrong_fact.probability:
            return wrong_fact.wrong_result
        return compute_result(left, operator, right)

    return _write_solution(question, recall, rng)


@cache
def get_knowledge_gap() -> Mapping[Fact, WrongFact]:
    """Return the quarter of the 300 facts that the policy half knows, the same number of each operator."""
    rng = random.Random(GAP_SEED)
    gap: dict[Fact, WrongFact] = {}
    for operator in OPERATORS:
        facts = [(left, operator, right) for left in range(10) for right in range(10)]
        for fact in sorted(rng.sample(facts, round(GAP_FRACTION * len(facts)))):
            wrong = (compute_result(*fact) + rng.choice((1, 2, 5, -1, -2))) % 10
            gap[fact] = WrongFact(wrong, rng.uniform(*GAP_ERROR_PROBABILITIES))
    return MappingProxyType(gap)


def find_first_error(problem: Problem, response_text: str) -> int | None:
    """Return the index of the first wrong character of a response, or None if the response is correct.

    Any separator may end a step. The first error of a response that stops early is at its own length, and that of a
    response that is too long is at the length of the solution.

    Raises:
        ValueError: if the problem has no solution.
    """
    allowed = list_allowed_characters(problem)
    for index, (character, options) in enumerate(zip(response_text, allowed, strict=False)):
        if character not in options:
            return index
    return None if len(response_text) == len(allowed) else min(len(response_text), len(allowed))


def list_allowed_characters(problem: Problem) -> list[str]:
    """Return the characters that are correct at each position of the gold solution, such as both separators.

    Raises:
        ValueError: if the problem has no solution.
    """
    if problem.solution is None:
        raise ValueError(f"problem {problem.id} has no solution to compare with")
    last = problem.solution.rfind(SEPARATORS[0])
    return [SEPARATORS if char == SEPARATORS[0] and at != last else char for at, char in enumerate(problem.solution)]


def is_correct(problem: Problem, response_text: str) -> bool:
    """Return True if the text after the last "#" is the gold answer. A response without "#" is wrong."""
    return "#" in response_text and response_text.rpartition("#")[2] == problem.answer


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
