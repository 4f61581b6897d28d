"""One problem: a question with what is known about its answer."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass

BOXED_INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass(frozen=True)
class Problem:
    """One question with what is known about its answer.

    Attributes:
        id: unique within a task and split, such as "gsm8k/test/17".
        question: the user's question in plain text, without any instruction.
        answer: the gold final answer; None where there is none.
        solution: a worked gold solution if the data has one.
        messages: the chat to send; None means one user turn that holds `question`.
        task: name of the task; for a file its name without the ending.
        level: difficulty label of the data set, if any.
        version: what the problem was made from (`task_version`).
        form: how the prompt asks for the answer, as `answers.strict_answer` takes it; None: in no certain form.
        examples: worked (question, answer) pairs to show a model without a chat template.
        stop: strings at whose end a response is over, besides the model's stop tokens.
        verifier: names what judges an answer where comparing with the gold one would not do (`reasoning_gym_task`).
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

    def build_messages(self) -> list[dict[str, str]]:
        """The chat as fresh `{"role", "content"}` dicts, ready for a tokenizer's chat template."""
        if self.messages is None:
            return [{"role": "user", "content": self.question}]
        return [dict(message) for message in self.messages]

    @property
    def grading_target(self) -> str | None:
        """What an answer is checked against by `checker.AnswerChecker`: the verifier, or else the gold answer."""
        return self.verifier or self.answer


def filter_with_gold_answer(problems: list[Problem], *, verbose: bool = True) -> list[Problem]:
    """The problems with a gold answer; how many have none is said on stderr, where it is to be `told`.

    Raises:
        ValueError: none has one.
    """
    found = [problem for problem in problems if problem.answer]
    if not found:
        raise ValueError("no problem has a gold answer: nothing could be compared")
    if verbose and len(found) < len(problems):
        print(f"{len(problems) - len(found)} problems have no gold answer and are left out", file=sys.stderr)
    return found


_UNHASHED_FIELDS = ("id", "solution", "level", "version")  # of a problem: what no result on it depends on


def compute_content_hash(problem: Problem) -> str:
    """Of all that a result on a problem can depend on: what is asked, and the answer it is compared with."""
    content = {name: value for name, value in asdict(problem).items() if name not in _UNHASHED_FIELDS}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def check_disjoint(train_problems: list[Problem], held_out_problems: list[Problem]) -> None:
    """Refuse held-out problems that are also trained on, comparing questions without case and white space.

    Raises:
        ValueError: naming how many overlap and the first three pairs of ids.
    """
    seen = {_normalize_question(problem): problem.id for problem in train_problems}
    pairs = [(seen[_normalize_question(p)], p.id) for p in held_out_problems if _normalize_question(p) in seen]
    if pairs:
        first = ", ".join(f"{a!r} = {b!r}" for a, b in pairs[:3])
        raise ValueError(
            f"{len(pairs)} held-out problem(s) are also trained on (train = held out: {first}); "
            "use another split or remove them"
        )


def get_question_identity(problem: Problem) -> tuple[str, ...]:
    """What makes two problems the same: the earlier user turns and the question without instruction."""
    turns = [message["content"] for message in problem.messages or () if message["role"] == "user"]
    return (*turns[:-1], problem.question)


def _normalize_question(problem: Problem) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).casefold() for text in get_question_identity(problem))


def append_instruction(question: str, instruction: str) -> tuple[dict[str, str], ...]:
    """One user turn: the question, and below it how to answer."""
    return ({"role": "user", "content": f"{question}\n{instruction}"},)
