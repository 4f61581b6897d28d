r"""Problems and where they come from, by the name of a task.

    load_problems("gsm8k", split="train", limit=200, seed=0)      # from the hub, or its local cache
    load_problems("chains", split="test")                         # procedural, needs no file
    load_problems("svamp.yaml", split="test")                     # any data set, read as a YAML says
    load_problems("reasoning_gym:chain_sum")                      # a procedural family of reasoning-gym
    load_problems("my_problems.jsonl")                            # one JSON object per line

What a YAML holds: `nabla_trl.task_files.Task`. A line of a JSONL file holds `question` (or `problem`, or `prompt`) and
may hold
- `answer`: the gold final answer; where it ends in a line "#### n", n is the answer, the text the solution,
- `solution`, `id`, `level`,
- `instruction`, appended to the question in the chat, or `messages`, the whole chat. Without either the
  question is sent as it is: a small model with a format of its own must not be told about \boxed{}.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
PROCEDURAL = "reasoning_gym:"


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
    version: str = ""
    form: str | None = None
    examples: tuple[tuple[str, str], ...] = ()
    stop: tuple[str, ...] = ()
    verifier: str | None = None

    def chat(self) -> list[dict[str, str]]:
        """The chat as fresh `{"role", "content"}` dicts, ready for a tokenizer's chat template."""
        if self.messages is None:
            return [{"role": "user", "content": self.question}]
        return [dict(message) for message in self.messages]

    @property
    def judge(self) -> str | None:
        """What an answer is checked against by `checker.AnswerChecker`: the verifier, or else the gold answer."""
        return self.verifier or self.answer


def load_problems(
    name_or_path: str, *, split: str = "test", limit: int | None = None, seed: int | None = None
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
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    # The rooms of the tasks build on `Problem`, so they are imported here.
    if name_or_path == "chains":
        from nabla_trl.chains import make_problems

        return make_problems(split, limit, 0 if seed is None else seed)
    if name_or_path.startswith(PROCEDURAL):
        from nabla_trl.reasoning_gym_task import make_problems as make_procedural

        return make_procedural(name_or_path, split, limit, seed)
    if Path(name_or_path).suffix == ".jsonl":
        from nabla_trl.jsonl_task import load_jsonl

        problems = load_jsonl(Path(name_or_path))
    else:
        from nabla_trl.task_files import find_task, load_task

        problems = load_task(find_task(name_or_path), split)
    if seed is not None:
        random.Random(seed).shuffle(problems)
    return problems[:limit]


def task_version(name_or_path: str) -> str:
    """What rows must have in common to be of the same task: of the data, the prompt and the way gold answers are read.

    Of a JSONL file a hash of its content; of a benchmark or YAML the number and a hash of the description, and the
    data set's revision; of procedural tasks the version of the generator. Every problem carries it.

    Raises:
        ValueError: as `load_problems`.
    """
    if name_or_path == "chains":
        from nabla_trl.chains import VERSION

        return VERSION
    if name_or_path.startswith(PROCEDURAL):
        from nabla_trl.reasoning_gym_task import version

        return version(name_or_path)
    if Path(name_or_path).suffix == ".jsonl":
        from nabla_trl.jsonl_task import file_version

        return file_version(Path(name_or_path))
    from nabla_trl.task_files import find_task

    return find_task(name_or_path).identity()


def task_settings(name_or_path: str) -> dict[str, str]:
    """A task's name and version, for `tracing.claim_settings`: an output of one version is not added to by another.

    A JSONL file may grow: its problems are told apart one by one (`content_hash`).
    """
    if Path(name_or_path).suffix == ".jsonl":
        return {"dataset": name_or_path}
    return {"dataset": name_or_path, "task_version": task_version(name_or_path)}


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


_APART = ("id", "solution", "level", "version")  # of a problem: what no result on it depends on


def content_hash(problem: Problem) -> str:
    """Of all that a result on a problem can depend on: what is asked, and the answer it is compared with."""
    content = {name: value for name, value in asdict(problem).items() if name not in _APART}
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


def identity(problem: Problem) -> tuple[str, ...]:
    """What makes two problems the same: the earlier user turns and the question without instruction."""
    turns = [message["content"] for message in problem.messages or () if message["role"] == "user"]
    return (*turns[:-1], problem.question)


def _normalized(problem: Problem) -> tuple[str, ...]:
    return tuple(" ".join(text.split()).casefold() for text in identity(problem))


def with_instruction(question: str, instruction: str) -> tuple[dict[str, str], ...]:
    """One user turn: the question, and below it how to answer."""
    return ({"role": "user", "content": f"{question}\n{instruction}"},)
