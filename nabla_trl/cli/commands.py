"""What the subcommands of `nabla-trl` do. Rooms that load torch are imported once a command needs them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from rich.console import Console

from nabla_trl.cli.arguments import (
    DEFAULT_ADAPTER_EVAL_METHODS,
    DEFAULT_EVAL_METHODS,
    EvalArguments,
    ModelArguments,
    ReportArguments,
    SolveArguments,
    TracesArguments,
)
from nabla_trl.cli.audit_command import run_audit
from nabla_trl.cli.export_command import run_export
from nabla_trl.cli.parsing import Parser, UsageError
from nabla_trl.cli.serve_command import run_serve
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.tasks.problem import filter_with_gold_answer
from nabla_trl.tasks.registry import get_task_settings, load_problems
from nabla_trl.utils.locks import lock_folder

# --- solve --------------------------------------------------------------------------------------------


SOLVE_HELP = """--json prints one object:
  problem_id, task, method, seed, prompt, response, answer, gold, correct, error
  initial, prompt_ids, initial_ids, response_ids   the first response; token ids
  reward_initial, reward      null where they are not finite
  revisions                   [{round, position, old, new, suffix, old_text,
                              new_text, suffix_text, reward_before,
                              reward_after, accepted, flops}]; position indexes
                              the response, flops are those spent until then
  pull                        by how much the gradient promised to raise the
                              reward, at most, by position of each response kept
  cost                        {flops, seconds, tokens}, rejected work included
  stop, finished              why the search ended; whether the response did
  meta                        models, versions, hash of the configuration"""


def run_solve(argv: Sequence[str]) -> int:
    from nabla_trl.search.config import PRESETS, SearchConfig

    parser = Parser(
        [ModelArguments, SolveArguments, SearchConfig],
        presets=PRESETS,
        prog="nabla-trl solve",
        usage="nabla-trl solve QUESTION --policy P --reward R [options]",
        description="Refine the answer to one question and show how it changed.",
        epilog=SOLVE_HELP,
    )
    parser.add_argument("question", help='the question; "-" reads it from stdin, "--" goes before one like "-3+4"')
    parser.add_argument("--json", action="store_true", help="print the trace as one JSON object, see below")
    models, args, config, extra = parser.parse_options(argv)
    question = (sys.stdin.read() if extra.question == "-" else extra.question).strip()
    if not question:
        raise ValueError("the question is empty")
    if any("\ud800" <= character <= "\udfff" for character in question):  # what a terminal sent was no UTF-8
        raise ValueError("the question is no UTF-8 text")

    from nabla_trl.audit.overoptimization import warn_past_limits
    from nabla_trl.cli.console import print_trace, trace_to_json
    from nabla_trl.cli.live import LiveView
    from nabla_trl.search.reasoner import NablaReasoner

    console = Console(file=sys.stdout)
    with redirect_stdout(sys.stderr):  # what a library prints must not get into the JSON
        policy, reward = models.load(4 * config.batch_size)
        warn_past_limits(reward, config)
        reasoner = NablaReasoner(policy, reward, config)
        if extra.json or not console.is_terminal or console.is_dumb_terminal:
            trace = reasoner.solve(question, seed=args.seed)
        else:
            with LiveView(policy.decode, console) as view:
                trace = reasoner.solve(question, seed=args.seed, on_round=view)
    if extra.json:
        print(json.dumps(trace_to_json(trace, policy.decode), allow_nan=False))
    elif trace.error is None:
        print_trace(trace, question, policy.decode, console)
    if trace.error is not None:
        raise ValueError(trace.error)
    return 0


# --- traces -------------------------------------------------------------------------------------------


def run_traces(argv: Sequence[str]) -> int:
    from nabla_trl.search.config import PRESETS, SearchConfig

    parser = Parser(
        [ModelArguments, TracesArguments, SearchConfig],
        presets=PRESETS,
        prog="nabla-trl traces",
        usage="nabla-trl traces --policy P --reward R --dataset D --output_dir DIR [options]",
        description="Refine the answers to many problems and store them as parquet shards, for one process; "
        "recipes/distill.py\nmakes the same traces on several devices and goes on to train on them.",
    )
    models, args, config = parser.parse_options(argv)[:3]

    from nabla_trl.audit.overoptimization import warn_past_limits
    from nabla_trl.search.generate_traces import find_unfinished_problems, generate_traces, get_search_settings
    from nabla_trl.utils.identity import claim_settings, identify_adapter

    problems = load_problems(args.dataset, split=args.split, max_problems=args.limit or None)
    models.prompting().check(problems)
    output = Path(args.output_dir)
    folder = output / "traces"
    settings = models.settings() | {
        "adapter": identify_adapter(models.adapter) if models.adapter else "",
        **get_task_settings(args.dataset),
        "split": args.split,
    }
    with lock_folder(output):
        todo = find_unfinished_problems(problems, folder, args.seed)
        if todo:
            policy, reward = models.load(4 * config.batch_size)  # first: a mistyped model must not claim the folder
        claim_settings(output / "traces.settings.json", settings | get_search_settings(config))
        there = len(problems) - len(todo)
        if todo:
            warn_past_limits(reward, config)
            with AnswerChecker() as checker:
                tally = generate_traces(
                    todo,
                    folder,
                    policy=policy,
                    reward=reward,
                    config=config,
                    seed=args.seed,
                    checker=checker,
                    num_done=there,
                )
            print(tally)
    print(f"{len(todo)} traces made, {there} were there: {folder}")
    return 0


# --- eval and report ----------------------------------------------------------------------------------


def run_eval(argv: Sequence[str]) -> int:
    from nabla_trl.baselines.step_config import StepSearchConfig
    from nabla_trl.search.config import PRESETS, SearchConfig

    parser = Parser(
        [ModelArguments, EvalArguments, SearchConfig, StepSearchConfig],
        presets=PRESETS,
        prog="nabla-trl eval",
        usage="nabla-trl eval --policy P --reward R --dataset D --output_dir DIR [options]",
        description="Run methods on held-out problems and print their accuracy and cost. --adapter is the policy of "
        "the\ndistilled_ methods; all others use the policy without it, and so does the reward.",
    )
    models, args, config, step_search_config = parser.parse_options(argv)[:4]

    from nabla_trl.audit.overoptimization import warn_past_limits
    from nabla_trl.evaluation.method import get_max_selection_size, has_search, parse_methods
    from nabla_trl.evaluation.plan import EvaluationSetup
    from nabla_trl.evaluation.results import list_remarks, store_results
    from nabla_trl.evaluation.runner import Evaluation
    from nabla_trl.models.loading import load_policy
    from nabla_trl.report.summary import summarize
    from nabla_trl.report.text import print_summary_table
    from nabla_trl.search.generate_traces import get_search_settings
    from nabla_trl.utils.identity import identify_adapter

    default_methods = [DEFAULT_EVAL_METHODS, *[DEFAULT_ADAPTER_EVAL_METHODS] * bool(models.adapter)]
    names = parse_methods(args.eval_methods or ",".join(default_methods))
    problems = filter_with_gold_answer(
        load_problems(args.dataset, split=args.split, max_problems=args.max_problems or None)
    )
    models.get_prompt_options().check_problems(problems)
    folder = Path(args.output_dir)
    settings = models.get_settings() | get_task_settings(args.dataset)
    settings |= {"split": args.split} | get_search_settings(config)
    with lock_folder(folder):
        policy, reward = models.load_policy_and_reward(4 * config.batch_size, use_adapter=False)
        trained_policies = {}
        if models.adapter:
            trained_policies["distilled"] = load_policy(
                models.policy,
                dtype=models.dtype,
                device=models.device,
                adapter=models.adapter,
                prompt_options=policy.prompt_options,
            )
        evaluation = Evaluation(folder, settings, problems)
        if models.adapter:  # apart, so that an adapter trained later can join the rows of the base policy
            evaluation.claim("adapter", {"adapter": identify_adapter(models.adapter)})
        setup = EvaluationSetup(policy, reward, config, tuple(args.seeds), step_search=step_search_config)
        jobs = evaluation.plan(names, setup, trained_policies)
        warn_past_limits(reward, config if has_search(names) else None, get_max_selection_size(names))
        with AnswerChecker() as checker:
            evaluation.run(jobs, checker, keep_traces=True)
        facts = models.build_run_facts(
            title=args.title,
            command=shlex.join(["nabla-trl", "eval", *argv]),
            task=args.dataset,
            seeds=args.seeds,
            sampling=config.get_sampling(),
            problems=problems,
        )
        facts["files"] = {"rows": "rows.jsonl", "facts": "facts.json"}
        rows, left_out = evaluation.select_rows()
        store_results(folder, rows, facts)
    print_summary_table(summarize(rows, facts))
    for remark in filter(None, [left_out, *list_remarks(folder, rows)]):
        print(remark)
    print(f"rows: {folder / 'rows.jsonl'}; nabla-trl report {folder} writes a page with plots")
    return 0


def run_report(argv: Sequence[str]) -> int:
    parser = Parser(
        [ReportArguments],
        prog="nabla-trl report",
        usage="nabla-trl report FOLDER",
        description="Write report.md, report.html, summary.json and plots/ again from rows.jsonl and facts.json.\n"
        "Needs no models.",
    )
    parser.add_argument(
        "folder", nargs="?", metavar="FOLDER", help="of an evaluation by nabla-trl eval or recipes/distill.py"
    )
    args, extra = parser.parse_options(argv)
    if bool(args.output_dir) == bool(extra.folder):
        raise UsageError("give one folder, as in nabla-trl report outputs/tiny")

    from nabla_trl.evaluation.results import load_results
    from nabla_trl.report.text import print_summary_table, write_report

    folder = Path(args.output_dir or extra.folder)
    rows, facts = load_results(folder)
    print_summary_table(write_report(folder, rows, facts))
    print(f"report: {folder / 'report.md'}; the same as a page, with the traces: {folder / 'report.html'}")
    return 0


COMMAND_FUNCTIONS = {
    "solve": run_solve,
    "traces": run_traces,
    "eval": run_eval,
    "report": run_report,
    "audit": run_audit,
    "serve": run_serve,
    "ship": run_export,
}
