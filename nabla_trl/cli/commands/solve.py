"""`nabla-trl solve`: refine the answer to one question and show how it changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass

from nabla_trl.cli.arguments import ModelArguments
from nabla_trl.cli.parsing import Parser
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.utils.fields import option
from nabla_trl.utils.progress import PrintableConsole

SOLVE_HELP = """--json prints one object:
  problem_id, task, method, seed, prompt, response, answer, gold, correct, error
  initial, prompt_ids, initial_ids, response_ids   first response, token ids
  reward_initial, reward      null if they are not finite
  revisions                   [{round, position, old_token, new_token, suffix,
                              old_text, new_text, suffix_text, reward_before,
                              reward_after, accepted, cumulative_flops}].
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
        0,
        "Random seed. The same seed and options give the same answer. Change it to get another answer.",
        common=True,
    )


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        [ModelArguments, SolveArguments, SearchConfig],
        presets=PRESETS,
        prog="nabla-trl solve",
        usage="nabla-trl solve QUESTION --policy P --reward R [options]",
        description="Refine the answer to one question and show how it changed.",
        epilog=SOLVE_HELP,
    )
    parser.add_argument(
        "question",
        help='The question. "-" reads it from standard input. Write "--" before a question that begins with a dash, '
        'such as "-3+4".',
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Print the trace as one JSON object, described below. Use it in scripts (default: print readable text).",
    )
    models, args, config, extra = parser.parse_options(argv)
    question = (sys.stdin.read() if extra.question == "-" else extra.question).strip()
    if not question:
        raise ValueError("the question is empty")
    if any("\ud800" <= character <= "\udfff" for character in question):  # the terminal sent bytes that are not UTF-8
        raise ValueError("the question is not UTF-8 text")

    from nabla_trl.audit.overoptimization import warn_past_limits
    from nabla_trl.cli.console import print_trace, trace_to_json
    from nabla_trl.cli.live import LiveView
    from nabla_trl.search.reasoner import NablaReasoner

    console = PrintableConsole(file=sys.stdout)
    with redirect_stdout(sys.stderr):  # libraries must not print into the JSON
        policy, reward = models.load_policy_and_reward(4 * config.batch_size)
        warn_past_limits(reward, config)
        reasoner = NablaReasoner(policy, reward, config)
        if extra.json or not console.is_terminal or console.is_dumb_terminal:
            trace = reasoner.solve(question, seed=args.seed)
        else:
            with LiveView(policy.decode, console) as view:
                trace = reasoner.solve(question, seed=args.seed, on_round=view)
    if extra.json:
        text = json.dumps(trace_to_json(trace, policy.decode), allow_nan=False)
        print(text.replace("\x7f", "\\u007f"))  # the only control character that json.dumps does not escape
    elif trace.error is None:
        print_trace(trace, question, policy.decode, console)
    if trace.error is not None:
        raise ValueError(trace.error)
    return 0
