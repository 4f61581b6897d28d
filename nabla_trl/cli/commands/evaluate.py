"""`nabla-trl eval`: run methods on held-out problems and compare accuracy and cost."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.cli.arguments import (
    DATASET_HELP,
    DEFAULT_SEEDS,
    DOLLARS_HELP,
    SEEDS_HELP,
    ModelArguments,
    check_distinct,
    check_dollars_per_gpu_hour,
    collect_output_faults,
)
from nabla_trl.cli.parsing import Parser, UsageError
from nabla_trl.evaluation.method import METHOD_SYNTAX, parse_methods
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.tasks.problem import Problem, filter_with_gold_answer
from nabla_trl.tasks.registry import get_task_settings, load_problems
from nabla_trl.tasks.shards import SHARD_HELP, Shard
from nabla_trl.tasks.templates import use_recorded_date
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.identity import identify_adapter
from nabla_trl.utils.locks import lock_folder

DEFAULT_EVAL_METHODS = "greedy,best_of_16,nabla,control"
DEFAULT_ADAPTER_EVAL_METHODS = "distilled_greedy,distilled_best_of_1,distilled_best_of_8"


@dataclass
class EvalArguments:
    """Options of `nabla-trl eval`."""

    dataset: str = required_option(DATASET_HELP)
    output_dir: str = required_option(
        "Folder to write the result rows to. Rows that already exist are kept, so an interrupted run can continue."
    )
    eval_methods: str = option(
        "",
        f"Methods to evaluate, separated by commas: {METHOD_SYNTAX}. L is distilled here, the policy with --adapter "
        f"(default: {DEFAULT_EVAL_METHODS}, and with an adapter also {DEFAULT_ADAPTER_EVAL_METHODS}).",
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
    seeds: list[int] = field(
        default_factory=lambda: list(DEFAULT_SEEDS), metadata={"help": SEEDS_HELP, "common": True}
    )
    shard: str | None = option(
        None,
        f"{SHARD_HELP} A method with a budget, such as nabla@best_of_16, needs the rows of all shards of "
        "best_of_16 first.",
        common=True,
    )
    dollars_per_gpu_hour: float | None = option(None, DOLLARS_HELP)
    title: str = option("Evaluation", "Title of the report.")

    def __post_init__(self) -> None:
        checks = Checks()
        with checks.collect():
            Shard.parse(self.shard)
        with checks.collect():
            check_distinct("seeds", self.seeds)
        with checks.collect():
            check_dollars_per_gpu_hour(self.dollars_per_gpu_hour)
        if self.eval_methods:
            with checks.collect():
                parse_methods(self.eval_methods)
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

    from nabla_trl.audit.overoptimization import warn_past_limits
    from nabla_trl.evaluation.method import get_max_selection_size, has_search
    from nabla_trl.evaluation.plan import EvaluationSetup, check_method_options
    from nabla_trl.evaluation.results import list_remarks, store_facts, store_results
    from nabla_trl.evaluation.runner import SETTINGS_FILE, Evaluation
    from nabla_trl.models.loading import load_policy
    from nabla_trl.report.summary import summarize
    from nabla_trl.report.text import print_summary_table
    from nabla_trl.rewards.spec import parse_reward_spec

    default_methods = (
        [DEFAULT_EVAL_METHODS, DEFAULT_ADAPTER_EVAL_METHODS] if models.adapter else [DEFAULT_EVAL_METHODS]
    )
    methods: list[str] = []
    with checks.collect():
        methods = parse_methods(args.eval_methods or ",".join(default_methods))
        labels = ["distilled"] if models.adapter else []
        has_better_model = parse_reward_spec(models.reward).kind == "log-ratio"
        check_method_options(
            methods, config, labels, has_better_model=has_better_model, baseline_config=baseline_config
        )
    problems: list[Problem] = []
    if args.dataset:
        with checks.collect():
            problems = load_problems(args.dataset, split=args.split, max_problems=args.max_problems or None)
            problems = filter_with_gold_answer(problems)
    models.preflight(checks, problems=problems, max_new_tokens=config.max_new_tokens)

    def get_settings() -> dict[str, str]:
        task_settings = get_task_settings(args.dataset) | {"split": args.split}
        return models.get_settings() | task_settings | config.get_settings()

    collect_output_faults(checks, args.output_dir, {SETTINGS_FILE: get_settings})
    checks.raise_faults(UsageError)
    output_dir, shard, settings = Path(args.output_dir), Shard.parse(args.shard), get_settings()
    with lock_folder(output_dir, shard.index, shard.count):
        use_recorded_date(output_dir, models.template_date)
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
        evaluation = Evaluation(output_dir, settings, problems, shard=shard)
        if models.adapter:  # apart, so that an adapter trained later can join the rows of the base policy
            evaluation.claim("adapter", {"adapter": identify_adapter(models.adapter)})
        setup = EvaluationSetup(policy, reward, config, tuple(args.seeds), baseline_config=baseline_config)
        jobs = evaluation.plan(methods, setup, trained_policies)
        warn_past_limits(reward, config if has_search(methods) else None, get_max_selection_size(methods))
        facts = models.build_run_facts(
            title=args.title,
            command=shlex.join(["nabla-trl", "eval", *argv]),
            task=args.dataset,
            seeds=args.seeds,
            sampling=config.get_sampling(),
            problems=problems,
            dollars_per_gpu_hour=args.dollars_per_gpu_hour,
        )
        facts["files"] = {"rows": "rows.jsonl", "facts": "facts.json"}
        if shard.count > 1:  # before the work, so that a report needs the rows of all shards and no more
            facts["command"] = facts["command"].replace(f"--shard {shard}", f"--shard I/{shard.count}")
            store_facts(output_dir, facts)
        with AnswerChecker() as checker:
            evaluation.run(jobs, checker, keep_traces=True)
        if missing := evaluation.describe_missing_shards():
            print(f"shard {shard}: rows of {len(shard.select(problems))} problems are in {output_dir / 'rows'}")
            print(f"rows are still missing of {missing}")
            return 0
        rows, incomplete = evaluation.select_rows()
        store_results(output_dir, rows, facts)
    print_summary_table(summarize(rows, facts))
    for remark in filter(None, [incomplete, *list_remarks(output_dir, rows)]):
        print(remark)
    print(f"rows: {output_dir / 'rows.jsonl'}; nabla-trl report {output_dir} writes a page with plots")
    return 0
