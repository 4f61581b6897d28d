"""`nabla-trl traces`: refine the answers to many problems and store the traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nabla_trl.cli.arguments import DATASET_HELP, ModelArguments, collect_output_faults
from nabla_trl.cli.parsing import Parser, UsageError
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import get_task_settings, load_problems
from nabla_trl.tasks.shards import SHARD_HELP, Shard, ShardPlan
from nabla_trl.tasks.templates import use_recorded_date
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.identity import claim_settings, identify_adapter
from nabla_trl.utils.locks import lock_folder

SETTINGS_FILE = "traces.settings.json"


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

    def __post_init__(self) -> None:
        Shard.parse(self.shard)  # refuses a wrong value before anything is loaded


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        [ModelArguments, TracesArguments, SearchConfig],
        presets=PRESETS,
        prog="nabla-trl traces",
        usage="nabla-trl traces --policy P --reward R --dataset D --output_dir DIR [options]",
        description="Refine the answers to many problems and store them as parquet files, in one process.\n"
        "With --shard, any number of independent processes share the work. recipes/distill.py generates the same\n"
        "traces on several devices of one launch, and then trains on them.",
    )
    checks = Checks()
    models, args, config = parser.parse_options(argv, checks)[:3]
    problems: list[Problem] = []
    if args.dataset:
        with checks.collect():
            problems = load_problems(args.dataset, split=args.split, max_problems=args.max_problems or None)
    models.preflight(checks, problems=problems, max_new_tokens=config.max_new_tokens)

    def get_settings() -> dict[str, str]:
        adapter = identify_adapter(models.adapter) if models.adapter else ""
        task_settings = get_task_settings(args.dataset)
        return (
            models.get_settings() | {"adapter": adapter, **task_settings, "split": args.split} | config.get_settings()
        )

    collect_output_faults(checks, args.output_dir, {SETTINGS_FILE: get_settings})
    checks.raise_faults(UsageError)

    from nabla_trl.audit.overoptimization import warn_past_limits
    from nabla_trl.search.generate_traces import find_unfinished_problems, generate_traces
    from nabla_trl.traces.storage import describe_missing_shards, get_shard_plan_path

    shard = Shard.parse(args.shard)
    output_dir, traces_dir = Path(args.output_dir), Path(args.output_dir) / "traces"
    share = shard.select(problems)
    with lock_folder(output_dir, shard.index, shard.count):
        use_recorded_date(output_dir, models.template_date)
        unfinished = find_unfinished_problems(share, traces_dir, args.seed)
        num_done = len(share) - len(unfinished)
        if unfinished:  # load before the settings are claimed: a mistyped model must not claim the folder
            policy, reward = models.load_policy_and_reward(4 * config.batch_size)
        claim_settings(output_dir / SETTINGS_FILE, get_settings())
        if shard.count > 1:
            ShardPlan.build(shard, problems, [args.seed]).write(get_shard_plan_path(traces_dir, args.seed))
        if unfinished:
            warn_past_limits(reward, config)
            with AnswerChecker() as checker:
                tally = generate_traces(
                    unfinished,
                    traces_dir,
                    policy=policy,
                    reward=reward,
                    config=config,
                    seed=args.seed,
                    checker=checker,
                    rank=shard.index,
                    num_done=num_done,
                )
            print(tally)
    print(f"{len(unfinished)} traces written, {num_done} existed: {traces_dir}")
    if missing := describe_missing_shards(output_dir):
        print(f"traces are still missing of {missing}")
    return 0
