r"""Write ASDiv's problems as short worked answers and as problems to train and audit a reward on.

    python recipes/svamp/prepare.py --asdiv_file ASDiv.xml --output_dir outputs/svamp/data

`ASDiv.xml` is the file of github.com/chaochun/nlu-asdiv-dataset (Miao et al. 2020, CC BY-NC 4.0). Its formulas become
answers with one operation a line, such as "6 + 2 = 8\n8 * 8 = 64\n#### 64". Problems without a formula in plain
arithmetic are left out, as are formulas that do not give the answer. The problems are shuffled and written to

- sft.jsonl: the policy is trained on their solutions,
- reward.jsonl: the problems of sft.jsonl and all others, in another order. A reward is trained on answers to them,
- audit.jsonl: the policy and the rewards never see them. Every choice is made on them.

SVAMP is for the evaluation alone. With `--svamp FILE` the script checks that no question of it is trained on. But
SVAMP's authors wrote their problems as variations of problems of ASDiv.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from arithmetic import OPERATORS, compute, format_number, parse_expression

from nabla_trl.cli.parsing import parse_dataclasses, run_main
from nabla_trl.tasks.problem import Problem, check_disjoint
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.files import write_atomic

TAGS = ("Body", "Question", "Formula", "Answer", "Solution-Type")


@dataclass
class PrepareArguments:
    """Files of the data."""

    asdiv_file: str = required_option("ASDiv.xml of github.com/chaochun/nlu-asdiv-dataset")
    output_dir: str = option("outputs/svamp/data", "folder of the JSONL files")
    svamp: str = option("", "problems to evaluate on (.jsonl or .yaml), to check that none of them is trained on")
    num_sft_problems: int = option(1100, "problems that the policy is trained on")
    num_audit_problems: int = option(200, "problems that nothing is trained on")
    seed: int = option(0, "seed of the shuffle")


def main(argv: Sequence[str]) -> None:
    (args,) = parse_dataclasses([PrepareArguments], argv)
    rows = read_asdiv(Path(args.asdiv_file))
    random.Random(args.seed).shuffle(rows)
    num_train = len(rows) - args.num_audit_problems
    if not 0 < args.num_sft_problems <= num_train:
        raise ValueError(f"{len(rows)} problems are too few for these numbers of problems")
    if args.svamp:
        check_disjoint([Problem(row["id"], row["question"]) for row in rows], load_problems(args.svamp))
    parts = {
        "sft": rows[: args.num_sft_problems],
        "reward": random.Random(args.seed + 1).sample(rows[:num_train], num_train),
        "audit": rows[num_train:],
    }
    for name, part in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_atomic(Path(args.output_dir, f"{name}.jsonl"), text)
        print(f"{name}.jsonl: {len(part)} problems")


def read_asdiv(path: Path) -> list[dict[str, str]]:
    """Return a row of id, question, solution, answer and level for each problem with a formula in plain arithmetic."""
    rows: dict[str, dict[str, str]] = {}
    for problem in ElementTree.parse(path).getroot().iter("Problem"):
        texts = {tag: " ".join((problem.findtext(tag) or "").split()) for tag in TAGS}
        solution = write_solution(texts["Formula"], texts["Answer"].split(" ")[0])
        question = f"{texts['Body']} {texts['Question']}"
        if solution is not None:
            rows.setdefault(
                question.casefold(),
                {
                    "id": problem.attrib["ID"],
                    "question": question,
                    "solution": solution,
                    "answer": solution.rpartition("#### ")[2],
                    "level": texts["Solution-Type"],
                },
            )
    return list(rows.values())


def write_solution(formula: str, answer: str) -> str | None:
    r"""Return a worked answer with one operation a line, or None if the formula is no arithmetic or gives no answer.

    Args:
        formula: equations with ";" between them, such as "(6+2)*8=64".
        answer: the last equation's right side, such as "64".
    """
    if re.fullmatch(r"[\d.+\-*/() =;]+", formula) is None:
        return None
    lines: list[str] = []
    value = None
    for equation in formula.rstrip("; ").split(";"):
        left, _, right = equation.partition("=")
        try:
            value = write_steps(parse_expression(left), lines)
            if value is None or value != Fraction(right.strip()):
                return None
        except (ValueError, ZeroDivisionError):
            return None
    try:
        if value is None or not lines or value != Fraction(answer.replace(",", "")):
            return None
    except ValueError:
        return None
    return "\n".join([*lines, f"#### {format_number(value)}"])


def write_steps(node: ast.expr, lines: list[str]) -> Fraction | None:
    """Append a line for each operation of an expression and return its value, or None for a number without a form.

    Raises:
        ValueError: the expression holds something else than numbers and the four operations.
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return Fraction(str(node.value))
    if not isinstance(node, ast.BinOp) or type(node.op) not in OPERATORS:
        raise ValueError("no arithmetic")
    left, right = write_steps(node.left, lines), write_steps(node.right, lines)
    if left is None or right is None:
        return None
    value = compute(left, OPERATORS[type(node.op)], right)
    numbers = [format_number(number) for number in (left, right, value)]
    if "" in numbers:
        return None
    lines.append(f"{numbers[0]} {OPERATORS[type(node.op)]} {numbers[1]} = {numbers[2]}")
    return value


if __name__ == "__main__":
    sys.exit(run_main(main))
