r"""Write sums of reasoning-gym as a few worked answers, and as problems to train and audit a reward on.

    python recipes/chain_sum/make_problems.py --output_dir outputs/chain_sum/data

The problems are those of `reasoning_gym:chain_sum,max_digits=1`: two to six numbers of one digit, with + and − between
them. All are of the split train, in this order:

- sft.jsonl: the policy is trained on their worked answers, such as "4 - 1 = 3\n3 - 7 = -4\n\boxed{-4}",
- audit.jsonl: nothing is trained on them. Every choice is made on them,
- reward.jsonl: a reward is trained on the policy's own answers to them. They have no worked answers.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nabla_trl.cli.parsing import parse_dataclasses, run_main
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.fields import option
from nabla_trl.utils.files import write_atomic

_TERM = re.compile(r"([+-]?) ?(\d+)")


@dataclass
class ProblemArguments:
    """The family and the sizes of the parts."""

    task: str = option("reasoning_gym:chain_sum,max_digits=1", "chain_sum, with options of its configuration")
    output_dir: str = option("outputs/chain_sum/data", "folder of the JSONL files")
    num_sft_problems: int = option(160, "problems with worked answers")
    num_audit_problems: int = option(200, "problems that nothing is trained on")
    num_reward_problems: int = option(1024, "problems that a reward is trained on")


def main(argv: Sequence[str]) -> None:
    (args,) = parse_dataclasses([ProblemArguments], argv)
    sizes = {"sft": args.num_sft_problems, "audit": args.num_audit_problems, "reward": args.num_reward_problems}
    problems = load_problems(args.task, split="train", max_problems=sum(sizes.values()))
    begin = 0
    for name, size in sizes.items():
        part = problems[begin : begin + size]
        if name == "sft":
            part = [replace(problem, solution=write_solution(problem)) for problem in part]
        begin += size
        write_problems(Path(args.output_dir, f"{name}.jsonl"), part)
        print(f"{name}.jsonl: {size} problems")


def write_problems(file: Path, problems: Sequence[Problem]) -> None:
    rows = [
        {
            "id": problem.id,
            "messages": problem.build_messages(),
            "answer": problem.answer,
        }
        | ({"solution": problem.solution} if problem.solution else {})
        for problem in problems
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_solution(problem: Problem) -> str:
    r"""Return a worked answer with one operation a line, which ends in \boxed{value}.

    Raises:
        ValueError: the operations do not give the problem's answer.
    """
    terms = _TERM.findall(problem.question.rpartition(":")[2])
    value, lines = int(terms[0][1]), []
    for operator, number in terms[1:]:
        result = value + int(operator + number)
        lines.append(f"{value} {operator} {number} = {result}")
        value = result
    if str(value) != problem.answer:
        raise ValueError(f"{problem.id}: {lines} do not give {problem.answer}")
    return "\n".join([*lines, rf"\boxed{{{value}}}"])


if __name__ == "__main__":
    sys.exit(run_main(main))
