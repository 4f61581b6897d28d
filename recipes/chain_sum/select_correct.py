"""Write one correct answer of the policy to each problem that has one: the data of expert iteration (RAFT).

    python recipes/chain_sum/select_correct.py --policy outputs/chain_sum/policy

The answers are those that recipes/reward.py drew for the reward (`--samples_dir`). recipes/svamp/make_policy.py trains
on the file that is written. The likelihood of the model that it makes is a reward too: logratio:MODEL,none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.models.loading import load_tokenizer
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.files import read_jsonl_file, write_atomic


@dataclass
class SelectArguments:
    """Answers and problems."""

    policy: str = required_option("policy that drew the answers, for its tokenizer")
    problems: str = option("outputs/chain_sum/data/reward.jsonl", "problems of the answers")
    answers: str = option("outputs/chain_sum/answers", "folder of the answers (--samples_dir of recipes/reward.py)")
    output_file: str = option("outputs/chain_sum/data/correct.jsonl", "problems with one correct answer each")


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    (args,) = parse_dataclasses([SelectArguments], argv)
    tokenizer = load_tokenizer(args.policy)
    problems = {problem.id: problem for problem in load_problems(args.problems)}
    files = sorted(Path(args.answers, "round-0.0").glob("*.jsonl"))
    answers = [row for file in files for _, row in read_jsonl_file(file) if row["problem_id"] in problems]
    if not answers:
        raise ValueError(f"{args.answers} holds no answers to the problems of {args.problems}")
    texts = [tokenizer.decode(row["response_ids"], skip_special_tokens=True) for row in answers]
    targets = [problems[row["problem_id"]].answer for row in answers]
    with AnswerChecker() as checker:
        results = checker.check([(extract_answer(text), gold) for text, gold in zip(texts, targets, strict=True)])
    rows: dict[str, dict[str, object]] = {}
    for answer, text, result in zip(answers, texts, results, strict=True):
        if result.is_correct and answer["response_ids"][-1] == tokenizer.eos_token_id:
            problem = problems[answer["problem_id"]]
            row = {"id": problem.id, "messages": problem.build_messages(), "answer": problem.answer, "solution": text}
            rows.setdefault(problem.id, row)
    write_atomic(Path(args.output_file), "".join(json.dumps(row) + "\n" for row in rows.values()))
    num_correct = sum(result.is_correct for result in results)
    num_problems = len({answer["problem_id"] for answer in answers})
    print(
        f"{args.output_file}: {len(rows)} of {num_problems} problems ({num_correct} of {len(answers)} answers correct)"
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
