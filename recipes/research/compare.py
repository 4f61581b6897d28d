"""Compare every method at equal FLOPs budgets, on the same problems and seeds, in one process.

    python recipes/research/compare.py --config recipes/tiny/compare.yaml
    python recipes/research/compare.py --policy P --reward R --dataset gsm8k --output_dir OUT

A budget is what best-of-N costs. Compared there are best-of-N, weighted best-of-N, self-consistency (with as many
samples as fit), the search, the same search without the gradient, with the gradient's rows shuffled over the
positions, and the paper's search. The last one scans one response, and begins again from a new one until the budget is
spent. `--baselines` adds step-level searches, votes without a reward, and samplers of the power distribution.
OUT/compare.md holds the tables and says where the search is ahead. Rows that exist are not made again.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import equal_flops
import step_curve

from nabla_trl.audit.overoptimization import warn_past_limits
from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.cli.arguments import DATASET_HELP, ModelArguments
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.evaluation.method import (
    POWER_SAMPLERS,
    POWER_SEARCHES,
    REWARD_MODEL_SAMPLING,
    STEP_SEARCHES,
    VOTE_METHODS,
)
from nabla_trl.evaluation.plan import EvaluationSetup, Job, check_methods, limit_to_flops
from nabla_trl.evaluation.results import store_results
from nabla_trl.evaluation.runner import Evaluation
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.pipeline.evaluation import open_evaluation
from nabla_trl.pipeline.problems import collect_problems
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.tasks.problem import filter_with_gold_answer
from nabla_trl.utils.fields import option
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.formatting import hide_userinfo
from nabla_trl.utils.locks import lock_folder

BASELINES = (
    *("control", "shuffled", "paper", "released", "qalign", *STEP_SEARCHES),
    *(*VOTE_METHODS, *POWER_SAMPLERS, *POWER_SEARCHES),
)


@dataclass
class CompareArguments:
    """Problems, sizes and methods of the comparison."""

    output_dir: str = field(metadata={"help": "Folder to write rows/ and compare.md to."})
    dataset: str = option("digit_chains", DATASET_HELP)
    split: str = option("test", "Split of the data set.")
    max_problems: int = option(300, "Maximum number of problems. 0: all.")
    seeds: list[int] = option([0, 1, 2], "Random seeds of everything that samples.")
    best_of_n: list[int] = option([4, 8, 16, 32], "N of the best-of-N methods whose FLOPs are the budgets.")
    baselines: list[str] = option(
        ["control", "shuffled", "paper"], f"Other methods at each budget: {', '.join(BASELINES)}."
    )
    reward_weights: list[float] = option(
        [], "Values of λ = 1/β to search with, at the FLOPs of the largest best-of-N, for a curve."
    )
    title: str = option("Methods at equal FLOPs", "Title of the page.")

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be distinct and not empty")
        if not self.best_of_n or min(self.best_of_n) < 2 or self.best_of_n != sorted(set(self.best_of_n)):
            raise ValueError("best_of_n must be rising numbers of at least 2")
        if any(not weight > 0 for weight in self.reward_weights) or len(set(self.reward_weights)) < len(
            self.reward_weights
        ):
            raise ValueError("reward_weights must be distinct positive numbers")
        unknown = [name for name in self.baselines if name not in BASELINES]
        if unknown:
            raise ValueError(f"unknown baseline {unknown[0]!r}: choose from {', '.join(BASELINES)}")


class Comparison:
    """The methods at every budget, and their rows."""

    def __init__(self, args: CompareArguments, setup: EvaluationSetup, evaluation: Evaluation, checker: AnswerChecker):
        self.args, self.setup, self.evaluation, self.checker = args, setup, evaluation, checker

    def run_budgets(self) -> dict[str, list[str]]:
        """Make the missing rows. Return reference method -> the methods compared at its FLOPs, nabla first."""
        args, sizes = self.args, self.args.best_of_n
        searches = [f"{name}@best_of_{size}" for name in ("nabla", *args.baselines) for size in sizes]
        extra = [REWARD_MODEL_SAMPLING] if self.setup.reward.preferred_model else []
        check_methods(searches, self.setup, {})
        self.run([self.setup.plan_sample_pool(best_of=[1, *sizes], self_consistency=sizes, weighted_best_of=sizes)])
        majority = {size: self.count_affordable_samples(size) for size in sizes}
        self.run([self.setup.plan_sample_pool(self_consistency=sorted(set(majority.values())))])
        self.run(self.evaluation.plan(["greedy", *searches, *extra], self.setup))
        return {
            f"best_of_{size}": [
                f"nabla@best_of_{size}",
                f"best_of_{size}",
                f"weighted_best_of_{size}",
                f"self_consistency_{majority[size]}",
                "greedy",
                *(f"{search}@best_of_{size}" for search in args.baselines),
                *extra,
            ]
            for size in sizes
        }

    def run_reward_weights(self) -> dict[float, str]:
        """Run the search at every reward weight λ of the options. Return λ -> method."""
        if not self.args.reward_weights:
            return {}
        reference = f"best_of_{self.args.best_of_n[-1]}"
        config = limit_to_flops(self.setup.config.with_beta(1.0), self.evaluation.get_budget_flops(reference))
        methods = {weight: f"nabla_lambda_{weight:g}@{reference}" for weight in self.args.reward_weights}
        self.run(self.setup.plan_search(name, replace(config, beta=1 / weight)) for weight, name in methods.items())
        return methods

    def run(self, jobs: Iterable[Job]) -> None:
        self.evaluation.run(jobs, self.checker)

    def count_affordable_samples(self, num_samples: int) -> int:
        """Return how many samples cost without scoring what best-of-`num_samples` costs with it."""
        flops_per_sample = self.evaluation.get_budget_flops(f"self_consistency_{num_samples}") / num_samples
        return max(2, round(self.evaluation.get_budget_flops(f"best_of_{num_samples}") / flops_per_sample))


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    dataclasses = [CompareArguments, ModelArguments, SearchConfig, BaselineConfig]
    args, models, config, baseline_config = parse_dataclasses(dataclasses, argv, presets=PRESETS)
    folder = Path(args.output_dir)
    with lock_folder(folder):
        command = hide_userinfo(shlex.join(["python", "recipes/research/compare.py", *argv]))
        run_comparison(folder, args, models, config, baseline_config, command)


def run_comparison(
    output_dir: Path,
    args: CompareArguments,
    model_arguments: ModelArguments,
    config: SearchConfig,
    baseline_config: BaselineConfig,
    command: str,
) -> None:
    """Make the missing rows and write compare.md, compare.json, rows.jsonl and facts.json."""
    models = model_arguments.build_pair()
    problem_set = collect_problems(
        args.dataset,
        split=args.split,
        max_problems=args.max_problems or None,
        prompt_options=models.get_prompt_options(),
    )
    problems = filter_with_gold_answer(problem_set.problems)
    evaluation, setup = open_evaluation(
        problems,
        models,
        output_dir,
        task_settings=problem_set.settings | models.get_adapter_settings(),
        config=config,
        seeds=args.seeds,
        baseline_config=baseline_config,
        settings_file="compare.settings.json",
    )
    warn_past_limits(setup.reward, config, max(args.best_of_n))
    with AnswerChecker() as checker:
        comparison = Comparison(args, setup, evaluation, checker)
        methods_by_reference, method_by_weight = comparison.run_budgets(), comparison.run_reward_weights()
    compared = {name for names in methods_by_reference.values() for name in names}
    compared |= {*methods_by_reference, *method_by_weight.values()}
    complete_rows, _ = evaluation.select_rows()
    rows = [row for row in complete_rows if row.method in compared and row.seed in args.seeds]
    facts = models.build_run_facts(
        title=args.title,
        command=command,
        task=args.dataset,
        seeds=args.seeds,
        sampling=config.get_sampling(),
        problems=problems,
    )
    facts["files"] = {"rows": "rows.jsonl", "budgets": "compare.json", "page": "compare.md"}
    store_results(output_dir, rows, facts)
    comparisons = equal_flops.compare_at_equal_flops(rows, methods_by_reference)
    write_atomic(
        output_dir / "compare.json", json.dumps([comparison.to_dict() for comparison in comparisons], indent=1)
    )
    text = equal_flops.format_comparison_markdown(comparisons, rows, args.title, command)
    if method_by_weight:
        curve = step_curve.compute_reward_weight_curve(rows, method_by_weight)
        subject = f"{args.dataset}, {len(problems)} problems"
        step_curve.plot_reward_weight_curve(output_dir / "step.png", curve, subject)
        parts = [
            "## The reward weight",
            step_curve.conclude_reward_weight_curve(curve) + ".",
            step_curve.format_curve_table(curve),
            "![reward weight](step.png)",
        ]
        text += "\n" + "\n\n".join(parts) + "\n"
    write_atomic(output_dir / "compare.md", text)
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
