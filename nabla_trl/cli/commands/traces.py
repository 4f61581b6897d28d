"""`nabla-trl traces`: refine the answers to many problems and store the traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nabla_trl.cli.arguments import DATASET_HELP, REPORT_TO_HELP, ModelArguments, collect_output_faults
from nabla_trl.cli.parsing import Parser, UsageError
from nabla_trl.cli.quiet import log_to_folder
from nabla_trl.search.config import PRESETS, SearchConfig, SharedBudget
from nabla_trl.tasks.shards import SHARD_HELP, Shard
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option, required_option


@dataclass
class TracesArguments:
    """Options of `nabla-trl traces`."""

    dataset: str = required_option(DATASET_HELP)
    output_dir: str = required_option(
        "Folder to write traces/ to. Traces that already exist are kept, so an interrupted run can continue."
    )
    split: str = option(
        "train", "Split of the data set. Use a training split, because the traces are training data.", common=True
    )
    max_problems: int = option(
        1000, "Maximum number of problems. Lower it for a quick test. 0 uses all problems.", common=True
    )
    seed: int = option(0, "Random seed of the search. Traces of several seeds can be in the same folder.", common=True)
    shard: str | None = option(None, SHARD_HELP, common=True)
    report_to: list[str] = option([], REPORT_TO_HELP)

    def __post_init__(self) -> None:
        Shard.parse(self.shard)  # refuses a wrong value before anything is loaded


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        [ModelArguments, TracesArguments, SearchConfig, SharedBudget],
        presets=PRESETS,
        prog="nabla-trl traces",
        usage="nabla-trl traces --policy P --reward R --dataset D --output_dir DIR [options]",
        description="Refine the answers to many problems and store them as parquet files, in one process.\n"
        "With --shard, any number of independent processes share the work. recipes/distill.py generates the same\n"
        "traces on several devices of one launch, and then trains on them.",
    )
    checks = Checks()
    models, args, config, budget = parser.parse_options(argv, checks)[:4]
    checks.call(budget.check, config)

    from nabla_trl.pipeline.problems import ProblemSet, collect_problems
    from nabla_trl.pipeline.traces import SETTINGS_FILE, TraceRun, collect_trace_settings
    from nabla_trl.training.reporting import check_trackers, track_metrics

    problem_set = ProblemSet([], "", {})
    if args.dataset:
        with checks.collect():
            problem_set = collect_problems(args.dataset, split=args.split, max_problems=args.max_problems or None)
    models.preflight(checks, problems=problem_set.problems, max_new_tokens=config.max_new_tokens)

    def get_settings() -> dict[str, str]:
        return collect_trace_settings(models.build_pair(), config, problem_set.settings, budget)

    collect_output_faults(checks, args.output_dir, {SETTINGS_FILE: get_settings})
    checks.call(check_trackers, args.report_to)
    checks.raise_faults(UsageError)
    log_to_folder(Path(args.output_dir))
    with track_metrics(args.report_to, stage="traces", output_dir=args.output_dir, settings=get_settings()):
        run = TraceRun(models.build_pair(), Path(args.output_dir), config, args.seed, problem_set.settings, budget)
        shard = Shard.parse(args.shard, budget.block_size)
        summary = run.write(problem_set.problems, shard, models.template_date)
    if summary.totals is not None:
        print(summary.totals)
    print(f"{summary.num_written} traces written, {summary.num_existing} existed: {summary.folder}")
    if summary.missing:
        print(f"traces are still missing of {summary.missing}")
    return 0
