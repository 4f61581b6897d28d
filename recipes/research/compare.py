"""Every method at a ladder of equal FLOPs budgets, on the same problems and seeds, in one process.

    python recipes/research/compare.py --config recipes/tiny/compare.yaml
    python recipes/research/compare.py --policy P --reward R --dataset gsm8k --output_dir OUT

A rung is what best-of-N costs. There best-of-N, weighted best-of-N and self-consistency (with as many samples as fit)
meet the search, the same search without the gradient, with the gradient's rows shuffled over the positions, and the
paper's, which scans one response and here begins anew from a fresh one until the budget is spent; `--baselines` adds
searches over steps: beam search, diverse verifier tree search, tree of thoughts, RAP. OUT/compare.md holds the tables
and says where ours is ahead; rows that are there are not made again.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import equal_flops
import step_curve

from nabla_trl.audit.overoptimization import warn_past_limits
from nabla_trl.baselines.step_config import StepSearchConfig
from nabla_trl.cli.arguments import DATASET_HELP, ModelArguments
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.evaluation.method import REWARD_MODEL_SAMPLING, STEP_SEARCHES
from nabla_trl.evaluation.plan import check_methods, get_step_search_settings, limit_to_flops, plan_jobs
from nabla_trl.evaluation.results import store_results
from nabla_trl.evaluation.rows import RowStore, select_complete_rows
from nabla_trl.evaluation.runner import EvaluationSetup, get_budget_flops, run_jobs
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.search.generate_traces import get_search_settings
from nabla_trl.tasks.problem import filter_with_gold_answer
from nabla_trl.tasks.registry import get_task_settings, load_problems
from nabla_trl.utils.fields import option
from nabla_trl.utils.identity import claim_settings, identify_adapter
from nabla_trl.utils.locks import lock_folder

BASELINES = ("control", "shuffled", "paper", "released", *STEP_SEARCHES)


@dataclass
class CompareArguments:
    output_dir: str = field(metadata={"help": "folder of rows/ and compare.md"})
    dataset: str = option("chains", DATASET_HELP)
    split: str = option("test", "split of the dataset")
    max_problems: int = option(300, "problems; 0 = all")
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of all that samples"})
    best_of_n: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32], metadata={"help": "N of the best-of-N whose FLOPs are the rungs"}
    )
    baselines: list[str] = field(
        default_factory=lambda: ["control", "shuffled", "paper"],
        metadata={"help": f"other searches at each rung: {', '.join(BASELINES)}"},
    )
    reward_weights: list[float] = field(
        default_factory=list,
        metadata={
            "help": "λ = 1/β to run the search with, at the FLOPs of the largest best-of-N: the curve of the step"
        },
    )
    title: str = option("Methods at equal FLOPs", "title of the page")

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be distinct and not empty")
        if not self.best_of_n or min(self.best_of_n) < 2 or self.best_of_n != sorted(set(self.best_of_n)):
            raise ValueError("best_of_n must be rising numbers of at least 2")
        if any(not lam > 0 for lam in self.reward_weights) or len(set(self.reward_weights)) < len(self.reward_weights):
            raise ValueError("reward_weights must be distinct positive numbers")
        unknown = [name for name in self.baselines if name not in BASELINES]
        if unknown:
            raise ValueError(f"unknown baseline {unknown[0]!r}: choose from {', '.join(BASELINES)}")


class Comparison:
    """The methods of the ladder and their rows."""

    def __init__(self, args: CompareArguments, setup: EvaluationSetup, store: RowStore):
        self.args, self.setup, self.store = args, setup, store

    def run_budgets(self, problems: Sequence[Any]) -> dict[str, list[str]]:
        """Make what rows are missing; the methods of each rung, ours first."""
        args, sizes = self.args, self.args.best_of_n
        searches = [f"{name}@best_of_{size}" for name in ("nabla", *args.baselines) for size in sizes]
        rivals = [REWARD_MODEL_SAMPLING] if self.setup.reward.preferred_model else []
        check_methods(searches, self.setup, {})
        with AnswerChecker() as checker:
            run_jobs(
                [self.setup.plan_sample_pool([1, *sizes], sizes, weighted_best_of=sizes)],
                problems,
                self.store,
                checker,
            )
            majority = {size: self.count_affordable_samples(size) for size in sizes}
            run_jobs([self.setup.plan_sample_pool([], sorted(set(majority.values())))], problems, self.store, checker)
            wanted = plan_jobs(["greedy", *searches, *rivals], self.setup, {}, self.read_mean_flops)
            run_jobs(wanted, problems, self.store, checker)
        return {
            f"best_of_{size}": [
                f"nabla@best_of_{size}",
                f"best_of_{size}",
                f"weighted_best_of_{size}",
                f"self_consistency_{majority[size]}",
                "greedy",
                *(f"{search}@best_of_{size}" for search in args.baselines),
                *rivals,
            ]
            for size in sizes
        }

    def run_reward_weights(self, problems: Sequence[Any]) -> dict[float, str]:
        """The search at every λ asked for; λ → method."""
        if not self.args.reward_weights:
            return {}
        setter = f"best_of_{self.args.best_of_n[-1]}"
        config = limit_to_flops(self.setup.config.with_beta(1.0), self.read_mean_flops(setter))
        methods = {lam: f"nabla_lambda_{lam:g}@{setter}" for lam in self.args.reward_weights}
        wanted = [self.setup.plan_search(name, replace(config, beta=1 / lam)) for lam, name in methods.items()]
        with AnswerChecker() as checker:
            run_jobs(wanted, problems, self.store, checker)
        return methods

    def read_mean_flops(self, method: str) -> float:
        return get_budget_flops(self.store, method)

    def count_affordable_samples(self, num_samples: int) -> int:
        """As many samples without scoring as cost what best-of-`size` does."""
        each = self.read_mean_flops(f"self_consistency_{num_samples}") / num_samples
        return max(2, round(self.read_mean_flops(f"best_of_{num_samples}") / each))


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    dataclasses = [CompareArguments, ModelArguments, SearchConfig, StepSearchConfig]
    args, models, config, stepwise = parse_dataclasses(dataclasses, argv, presets=PRESETS)
    folder = Path(args.output_dir)
    with lock_folder(folder):
        run_comparison(
            folder, args, models, config, stepwise, shlex.join(["python", "recipes/research/compare.py", *argv])
        )


def run_comparison(
    output_dir: Path,
    args: CompareArguments,
    models: ModelArguments,
    config: SearchConfig,
    step_search_config: StepSearchConfig,
    command: str,
) -> None:
    problems = filter_with_gold_answer(
        load_problems(args.dataset, split=args.split, max_problems=args.max_problems or None)
    )
    models.get_prompt_options().check_problems(problems)
    policy, reward = models.load_policy_and_reward(4 * config.batch_size)
    settings = models.get_settings() | get_search_settings(config)
    settings["adapter"] = identify_adapter(models.adapter) if models.adapter else ""
    settings |= {**get_task_settings(args.dataset), "split": args.split}
    claim_settings(output_dir / "compare.settings.json", settings)
    warn_past_limits(reward, config, max(args.best_of_n))
    store = RowStore(output_dir / "rows", hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16])
    bench = EvaluationSetup(policy, reward, config, tuple(args.seeds), step_search=step_search_config)
    if own := get_step_search_settings([f"{name}@best_of_{args.best_of_n[0]}" for name in args.baselines], bench):
        claim_settings(output_dir / "stepwise.settings.json", own)
    comparison = Comparison(args, bench, store)
    rungs, lams = comparison.run_budgets(problems), comparison.run_reward_weights(problems)
    asked = {name for names in rungs.values() for name in names} | set(rungs) | set(lams.values())
    made, _ = select_complete_rows(store.read(), problems)
    rows = [row for row in made if row["method"] in asked and row["seed"] in args.seeds]
    found = equal_flops.compare_at_equal_flops(rows, rungs)
    facts = models.build_run_facts(title=args.title, command=command, task=args.dataset, seeds=args.seeds)
    facts["files"] = {"rows": "rows.jsonl", "budgets": "compare.json", "page": "compare.md"}
    store_results(output_dir, rows, facts)
    (output_dir / "compare.json").write_text(
        json.dumps([rung.to_dict() for rung in found], indent=1), encoding="utf-8"
    )
    text = equal_flops.format_comparison_markdown(found, rows, args.title, command)
    if lams:
        curve = step_curve.compute_reward_weight_curve(rows, lams)
        step_curve.plot_reward_weight_curve(
            output_dir / "step.png", curve, f"{args.dataset}, {len(problems)} problems"
        )
        parts = [
            "## The size of the step",
            step_curve.conclude_reward_weight_curve(curve) + ".",
            step_curve.format_curve_table(curve),
            "![step](step.png)",
        ]
        text += "\n" + "\n\n".join(parts) + "\n"
    (output_dir / "compare.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
