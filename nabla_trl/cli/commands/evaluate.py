"""`nabla-trl eval`: run methods on held-out problems and compare accuracy and cost."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.cli.arguments import (
    DATASET_HELP,
    DEFAULT_SEEDS,
    DOLLARS_HELP,
    REPORT_TO_HELP,
    SEEDS_HELP,
    ModelArguments,
    check_distinct,
    check_dollars_per_gpu_hour,
    collect_output_faults,
)
from nabla_trl.cli.parsing import Parser, UsageError
from nabla_trl.cli.quiet import log_to_folder
from nabla_trl.evaluation.method import METHOD_SYNTAX, parse_methods
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.tasks.shards import SHARD_HELP, Shard
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option, required_option

DEFAULT_EVAL_METHODS = "greedy,best_of_16,nabla,control"
DEFAULT_ADAPTER_EVAL_METHODS = "distilled_greedy,distilled_best_of_1,distilled_best_of_8"


@dataclass
class EvalArguments:
    """Options of `nabla-trl eval`."""

    dataset: str = required_option(DATASET_HELP)
    output_dir: str = required_option(
        "Folder to write the result rows to. Rows that already exist are kept, so an interrupted run can continue."
    )
    eval_methods: list[str] = option(
        [],
        f"Methods to evaluate, separated by commas or spaces: {METHOD_SYNTAX}. L is distilled here, the policy with "
        f"--adapter (default: {DEFAULT_EVAL_METHODS}, and with an adapter also {DEFAULT_ADAPTER_EVAL_METHODS}).",
        common=True,
    )
    split: str = option(
        "test", "Split of the data set. Evaluate on problems that nothing was trained on.", common=True
    )
    max_problems: int = option(
        300,
        "Maximum number of problems. Increase it for narrower confidence intervals. 0 uses all problems.",
        common=True,
    )
    seeds: list[int] = option(list(DEFAULT_SEEDS), SEEDS_HELP, common=True)
    shard: str | None = option(
        None,
        f"{SHARD_HELP} A method with a budget, such as nabla@best_of_16, needs the rows of all shards of "
        "best_of_16 first.",
        common=True,
    )
    dollars_per_gpu_hour: float | None = option(None, DOLLARS_HELP)
    title: str = option("Evaluation", "Title of the report.")
    report_to: list[str] = option([], REPORT_TO_HELP)

    def __post_init__(self) -> None:
        checks = Checks()
        checks.call(Shard.parse, self.shard)
        checks.call(check_distinct, "seeds", self.seeds)
        checks.call(check_dollars_per_gpu_hour, self.dollars_per_gpu_hour)
        if self.eval_methods:
            checks.call(parse_methods, self.eval_methods)
        checks.raise_faults()


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        [ModelArguments, EvalArguments, SearchConfig, BaselineConfig],
        presets=PRESETS,
        common=(),
        prog="nabla-trl eval",
        usage="nabla-trl eval --policy P --reward R --dataset D --output_dir DIR [options]",
        description="Run methods on held-out problems and print their accuracy and cost. The distilled_ methods use\n"
        "--adapter. All other methods, and the reward, use the policy without it.",
    )
    checks = Checks()
    models, args, config, baseline_config = parser.parse_options(argv, checks)[:4]

    from nabla_trl.evaluation.plan import check_baselines, check_method_options
    from nabla_trl.evaluation.runner import SETTINGS_FILE
    from nabla_trl.pipeline.evaluation import ADAPTER_LABEL, collect_eval_settings, run_evaluation
    from nabla_trl.pipeline.problems import ProblemSet, collect_problems
    from nabla_trl.report.text import print_summary_table
    from nabla_trl.rewards.spec import parse_reward_spec
    from nabla_trl.tasks.problem import filter_with_gold_answer
    from nabla_trl.training.reporting import check_trackers, track_metrics

    default_methods = [DEFAULT_EVAL_METHODS, *([DEFAULT_ADAPTER_EVAL_METHODS] if models.adapter else [])]
    methods: list[str] = []
    with checks.collect():
        methods = parse_methods(args.eval_methods or default_methods)
        labels = [ADAPTER_LABEL] if models.adapter else []
        has_better_model = parse_reward_spec(models.reward).kind == "log-ratio"
        check_method_options(
            methods, config, labels, has_better_model=has_better_model, baseline_config=baseline_config
        )
    checks.call(
        check_baselines,
        methods,
        baseline_config,
        policy=models.policy,
        reward=models.reward,
        settings_dir=Path(args.output_dir, SETTINGS_FILE).parent,
    )
    problem_set = ProblemSet([], "", {})
    if args.dataset:
        with checks.collect():
            problem_set = collect_problems(args.dataset, split=args.split, max_problems=args.max_problems or None)
            filter_with_gold_answer(problem_set.problems, verbose=False)
    models.preflight(checks, problems=problem_set.problems, max_new_tokens=config.max_new_tokens)

    def get_settings() -> dict[str, str]:
        return collect_eval_settings(models.build_pair(use_adapter=False), config, problem_set.settings)

    collect_output_faults(checks, args.output_dir, {SETTINGS_FILE: get_settings})
    checks.call(check_trackers, args.report_to)
    checks.raise_faults(UsageError)
    log_to_folder(Path(args.output_dir))
    output_dir, shard = Path(args.output_dir), Shard.parse(args.shard)
    with track_metrics(args.report_to, stage="eval", output_dir=output_dir, settings=get_settings()):
        result = run_evaluation(
            problem_set,
            models.build_pair(use_adapter=False),
            output_dir,
            methods=methods,
            seeds=args.seeds,
            config=config,
            baseline_config=baseline_config,
            trained_policies={ADAPTER_LABEL: models.adapter} if models.adapter else {},
            shard=shard,
            title=args.title,
            command=shlex.join(["nabla-trl", "eval", *argv]),
            template_date=models.template_date,
            dollars_per_gpu_hour=args.dollars_per_gpu_hour,
        )
    if result.missing:
        print(f"shard {shard}: rows of {result.num_shard_problems} problems are in {output_dir / 'rows'}")
        print(f"rows are still missing of {result.missing}")
        return 0
    print_summary_table(result.summary)
    for remark in result.remarks:
        print(remark)
    print(f"rows: {output_dir / 'rows.jsonl'}; nabla-trl report {output_dir} writes a page with plots")
    return 0
