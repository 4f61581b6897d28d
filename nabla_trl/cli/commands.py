"""What the subcommands of `nabla-trl` do. Rooms that load torch are imported once a command needs them."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from nabla_trl.cli.arguments import (
    DISTILLED,
    METHODS,
    EvalArguments,
    ModelArguments,
    ReportArguments,
    SolveArguments,
    TracesArguments,
)
from nabla_trl.cli.audit_command import audit
from nabla_trl.cli.export_command import ship
from nabla_trl.cli.parsing import Parser, UsageError
from nabla_trl.cli.serve_command import serve
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.tasks.problem import graded
from nabla_trl.tasks.registry import load_problems, problem_facts, task_settings
from nabla_trl.utils.locks import hold

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


def solve(argv: Sequence[str]) -> int:
    from nabla_trl.search.config import PRESETS, ReasonerConfig

    parser = Parser(
        [ModelArguments, SolveArguments, ReasonerConfig],
        presets=PRESETS,
        prog="nabla-trl solve",
        usage="nabla-trl solve QUESTION --policy P --reward R [options]",
        description="Refine the answer to one question and show how it changed.",
        epilog=SOLVE_HELP,
    )
    parser.add_argument("question", help='the question; "-" reads it from stdin, "--" goes before one like "-3+4"')
    parser.add_argument("--json", action="store_true", help="print the trace as one JSON object, see below")
    models, args, config, extra = parser.read(argv)
    question = (sys.stdin.read() if extra.question == "-" else extra.question).strip()
    if not question:
        raise ValueError("the question is empty")
    if any("\ud800" <= character <= "\udfff" for character in question):  # what a terminal sent was no UTF-8
        raise ValueError("the question is no UTF-8 text")

    from nabla_trl.audit.overoptimization import warn_past_trust
    from nabla_trl.cli.console import show_trace, trace_json
    from nabla_trl.cli.live import LiveView
    from nabla_trl.search.reasoner import NablaReasoner

    console = Console(file=sys.stdout)
    with redirect_stdout(sys.stderr):  # what a library prints must not get into the JSON
        policy, reward = models.load(4 * config.batch_size)
        warn_past_trust(reward, config)
        reasoner = NablaReasoner(policy, reward, config)
        if extra.json or not console.is_terminal or console.is_dumb_terminal:
            trace = reasoner.solve(question, seed=args.seed)
        else:
            with LiveView(policy.decode, console) as view:
                trace = reasoner.solve(question, seed=args.seed, watch=view)
    if extra.json:
        print(json.dumps(trace_json(trace, policy.decode), allow_nan=False))
    elif trace.error is None:
        show_trace(trace, question, policy.decode, console)
    if trace.error is not None:
        raise ValueError(trace.error)
    return 0


# --- traces -------------------------------------------------------------------------------------------


def traces(argv: Sequence[str]) -> int:
    from nabla_trl.search.config import PRESETS, ReasonerConfig

    parser = Parser(
        [ModelArguments, TracesArguments, ReasonerConfig],
        presets=PRESETS,
        prog="nabla-trl traces",
        usage="nabla-trl traces --policy P --reward R --dataset D --output_dir DIR [options]",
        description="Refine the answers to many problems and store them as parquet shards, for one process; "
        "recipes/distill.py\nmakes the same traces on several devices and goes on to train on them.",
    )
    models, args, config = parser.read(argv)[:3]

    from nabla_trl.audit.overoptimization import warn_past_trust
    from nabla_trl.search.generate_traces import search_settings, unfinished, write_traces
    from nabla_trl.utils.identity import adapter_identity, claim_settings

    problems = load_problems(args.dataset, split=args.split, limit=args.limit or None)
    models.prompting().check(problems)
    output = Path(args.output_dir)
    folder = output / "traces"
    settings = models.settings() | {
        "adapter": adapter_identity(models.adapter) if models.adapter else "",
        **task_settings(args.dataset),
        "split": args.split,
    }
    with hold(output):
        todo = unfinished(problems, folder, args.seed)
        if todo:
            policy, reward = models.load(4 * config.batch_size)  # first: a mistyped model must not claim the folder
        claim_settings(output / "traces.settings.json", settings | search_settings(config))
        there = len(problems) - len(todo)
        if todo:
            warn_past_trust(reward, config)
            with AnswerChecker() as checker:
                tally = write_traces(
                    todo,
                    folder,
                    policy=policy,
                    reward=reward,
                    config=config,
                    seed=args.seed,
                    checker=checker,
                    there=there,
                )
            print(tally)
    print(f"{len(todo)} traces made, {there} were there: {folder}")
    return 0


# --- eval and report ----------------------------------------------------------------------------------


def evaluate(argv: Sequence[str]) -> int:
    from nabla_trl.baselines.step_config import StepConfig
    from nabla_trl.search.config import PRESETS, ReasonerConfig

    parser = Parser(
        [ModelArguments, EvalArguments, ReasonerConfig, StepConfig],
        presets=PRESETS,
        prog="nabla-trl eval",
        usage="nabla-trl eval --policy P --reward R --dataset D --output_dir DIR [options]",
        description="Run methods on held-out problems and print their accuracy and cost. --adapter is the policy of "
        "the\ndistilled_ methods; all others use the policy without it, and so does the reward.",
    )
    models, args, config, stepwise = parser.read(argv)[:4]

    from nabla_trl.audit.overoptimization import warn_past_trust
    from nabla_trl.evaluation.plan import chosen_among, method_names, searches, steps, stepwise_settings
    from nabla_trl.evaluation.results import remarks, store_results
    from nabla_trl.evaluation.rows import RowStore, of_problems
    from nabla_trl.evaluation.runner import Bench, budget_flops, run_steps
    from nabla_trl.models.loading import load_policy
    from nabla_trl.report.summary import summarise
    from nabla_trl.report.text import terminal_table
    from nabla_trl.search.generate_traces import search_settings
    from nabla_trl.traces.storage import HELD_OUT
    from nabla_trl.utils.identity import adapter_identity, claim_settings

    names = method_names(args.methods or ",".join([METHODS, DISTILLED] if models.adapter else [METHODS]))
    problems = graded(load_problems(args.dataset, split=args.split, limit=args.limit or None))
    models.prompting().check(problems)
    folder = Path(args.output_dir)
    settings = models.settings() | task_settings(args.dataset) | {"split": args.split} | search_settings(config)
    with hold(folder):
        policy, reward = models.load(4 * config.batch_size, adapter=False)
        tuned = {}
        if models.adapter:
            tuned["distilled"] = load_policy(
                models.policy,
                dtype=models.dtype,
                device=models.device,
                adapter=models.adapter,
                prompting=policy.prompting,
            )
        claim_settings(folder / "eval.settings.json", settings)
        if models.adapter:  # apart, so that an adapter trained later can join the rows that are there
            claim_settings(folder / "adapter.settings.json", {"adapter": adapter_identity(models.adapter)})
        store = RowStore(folder / "rows", hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16])
        bench = Bench(policy, reward, config, tuple(args.seeds), stepwise=stepwise)
        if own := stepwise_settings(names, bench):  # apart, so that these methods can join the rows that are there
            claim_settings(folder / "stepwise.settings.json", own)
        warn_past_trust(reward, config if searches(names) else None, chosen_among(names))
        wanted = steps(names, bench, tuned, lambda name: budget_flops(store, name))
        with AnswerChecker() as checker:
            run_steps(wanted, problems, store, checker, held_out=folder / HELD_OUT)
        command = shlex.join(["nabla-trl", "eval", *argv])
        facts = models.facts(title=args.title, command=command, task=args.dataset, seeds=args.seeds)
        facts["sampling"], facts["problems"] = asdict(config.sampling()), problem_facts(problems)
        facts["files"] = {"rows": "rows.jsonl", "facts": "facts.json"}
        rows, left_out = of_problems(store.read(), problems)
        store_results(folder, rows, facts)
    terminal_table(summarise(rows, facts))
    for remark in filter(None, [left_out, *remarks(folder, rows)]):
        print(remark)
    print(f"rows: {folder / 'rows.jsonl'}; nabla-trl report {folder} writes a page with plots")
    return 0


def report(argv: Sequence[str]) -> int:
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
    args, extra = parser.read(argv)
    if bool(args.output_dir) == bool(extra.folder):
        raise UsageError("give one folder, as in nabla-trl report outputs/tiny")

    from nabla_trl.evaluation.results import load_results
    from nabla_trl.report.text import terminal_table, write_report

    folder = Path(args.output_dir or extra.folder)
    rows, facts = load_results(folder)
    terminal_table(write_report(folder, rows, facts))
    print(f"report: {folder / 'report.md'}; the same as a page, with the traces: {folder / 'report.html'}")
    return 0


COMMANDS = {
    "solve": solve,
    "traces": traces,
    "eval": evaluate,
    "report": report,
    "audit": audit,
    "serve": serve,
    "ship": ship,
}
