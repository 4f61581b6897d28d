"""`nabla-trl solve`: refine the answer to one question and show how it changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

from nabla_trl.cli.arguments import DATASET_HELP, ModelArguments
from nabla_trl.cli.parsing import Parser, UsageError
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option
from nabla_trl.utils.progress import PrintableConsole

SOLVE_HELP = """--json prints one object:
  problem_id, task, method, seed, prompt, response, answer, gold, correct, error
  initial, prompt_ids, initial_ids, response_ids   first response, token ids
  reward_initial, reward      null where the reward has no finite value, as for a
                              response that it cannot read
  revisions                   [{round, position, old_token, new_token, suffix,
                              old_text, new_text, prefix_text, suffix_text,
                              reward_before, reward_after, accepted,
                              cumulative_flops}].
                              position is an index of the response. FLOPs count
                              from the start of the search.
  predicted_gain              largest reward increase that the gradient
                              predicted, by position of each accepted response
  cost                        {flops, seconds, tokens}, with rejected proposals
  stop_reason, finished       why the search ended, if the response has an end
  meta                        models, versions, hash of the configuration"""


@dataclass
class SolveArguments:
    """Options of `nabla-trl solve`."""

    seed: int = option(
        0, "Random seed. The same seed and options give the same answer. Change it to get another answer.", common=True
    )
    answer: str | None = option(
        None,
        "Gold answer of the question. The answer found is then compared with it (default: not compared).",
        common=True,
    )
    dataset: str | None = option(
        None,
        f"Solve a problem of this data set instead of a QUESTION, and compare the answer with its gold answer. "
        f"{DATASET_HELP}",
    )
    split: str = option("test", "Split of --dataset.")
    index: int = option(0, "Number of the problem in the split of --dataset, counted from 0.")

    def __post_init__(self) -> None:
        checks = Checks()
        checks.require(
            self.answer is None or self.dataset is None,
            "give --answer with a question of your own: a problem of --dataset has its gold answer",
        )
        checks.require(self.index >= 0, f"index must be at least 0, not {self.index}")
        checks.raise_faults()

    def build_problem(self, question: str) -> Problem:
        """Return the problem to solve: the question with its gold answer, or one of the data set.

        Raises:
            ValueError: both a question and a data set, neither, a text that is not UTF-8, or an index past the end.
        """
        if self.dataset is not None:
            if question:
                raise ValueError("give either a question or --dataset, not both")
            problems = load_problems(self.dataset, split=self.split, max_problems=self.index + 1)
            if self.index >= len(problems):
                raise ValueError(f"{self.dataset} has {len(problems)} problems, so there is no index {self.index}")
            return problems[self.index]
        if not question:
            raise ValueError("the question is empty")
        for name, text in (("question", question), ("answer", self.answer or "")):
            if any("\ud800" <= character <= "\udfff" for character in text):  # bytes that are not UTF-8
                raise ValueError(f"the {name} is not UTF-8 text")
        return Problem(id="question/0", question=question, answer=self.answer)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        [ModelArguments, SolveArguments, SearchConfig],
        presets=PRESETS,
        prog="nabla-trl solve",
        usage="nabla-trl solve QUESTION --policy P --reward R [options]\n"
        "       nabla-trl solve --dataset D --index N --policy P --reward R [options]",
        description="Refine the answer to one question and show how it changed.",
        epilog=SOLVE_HELP,
    )
    parser.add_argument(
        "question",
        nargs="?",
        help='The question. "-" reads it from standard input. Write "--" before a question that begins with a dash, '
        'such as "-3+4".',
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Print the trace as one JSON object, described below. Use it in scripts (default: print readable text).",
    )
    checks = Checks()
    models, args, config, extra = parser.parse_options(argv, checks)
    problems = []
    if extra.question is None and args.dataset is None:
        checks.add(["the following arguments are required: question"])
    else:
        question = (sys.stdin.read() if extra.question == "-" else extra.question or "").strip()
        with checks.collect():
            problems = [args.build_problem(question)]
    # A question that cannot be asked is an error of the JSON object.
    models.preflight(checks, problems=[] if extra.json else problems, max_new_tokens=config.max_new_tokens)
    checks.raise_faults(UsageError)
    [problem] = problems

    from nabla_trl.audit.overoptimization import warn_past_limits
    from nabla_trl.cli.console import print_trace
    from nabla_trl.cli.live import LiveView
    from nabla_trl.grading.checker import AnswerChecker
    from nabla_trl.search.reasoner import NablaReasoner
    from nabla_trl.traces.build import grade_traces

    console = PrintableConsole(file=sys.stdout)
    with redirect_stdout(sys.stderr):  # libraries must not print into the JSON
        policy, reward = models.load_policy_and_reward(4 * config.batch_size)
        warn_past_limits(reward, config)
        reasoner = NablaReasoner(policy, reward, config)
        if extra.json or not console.is_terminal or console.is_dumb_terminal:
            trace = reasoner.solve(problem, seed=args.seed)
        else:
            with LiveView(policy.decode, console) as view:
                trace = reasoner.solve(problem, seed=args.seed, on_round=view)
        if problem.grading_target and trace.error is None:
            with AnswerChecker() as checker:
                [trace] = grade_traces([trace], checker)
    if extra.json:
        text = json.dumps(trace.to_dict(infinite_as_none=True), allow_nan=False)
        print(text.replace("\x7f", "\\u007f"))  # the only control character that json.dumps does not escape
    elif trace.error is None:
        print_trace(trace, problem.question, policy.decode, console)
    if trace.error is not None:
        raise ValueError(trace.error)
    return 0
