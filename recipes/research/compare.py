"""Every method at a ladder of equal FLOPs budgets, on the same problems and seeds, in one process.

    python recipes/research/compare.py --config recipes/tiny/compare.yaml
    python recipes/research/compare.py --policy P --reward R --dataset gsm8k --output_dir OUT

A rung is what best-of-N costs. There best-of-N, weighted best-of-N and self-consistency (with as many samples as fit)
meet the search, the same search without the gradient, with the gradient's rows shuffled over the positions, and the
paper's, which scans one response and here begins anew from a fresh one until the budget is spent; `--rivals` adds
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

from nabla_trl.audit.overoptimization import warn_past_trust
from nabla_trl.baselines.step_config import StepConfig
from nabla_trl.cli.arguments import DATASETS, ModelArguments
from nabla_trl.cli.parsing import parse, quiet_libraries, run_main
from nabla_trl.evaluation.method import RIVAL, STEPWISE
from nabla_trl.evaluation.plan import budgeted, check, steps, stepwise_settings
from nabla_trl.evaluation.results import store_results
from nabla_trl.evaluation.rows import RowStore, of_problems
from nabla_trl.evaluation.runner import Bench, budget_flops, run_steps
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.search.config import PRESETS, ReasonerConfig
from nabla_trl.search.generate_traces import search_settings
from nabla_trl.tasks.problem import graded
from nabla_trl.tasks.registry import load_problems, task_settings
from nabla_trl.utils.identity import adapter_identity, claim_settings
from nabla_trl.utils.locks import hold


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


RIVALS = ("control", "shuffled", "paper", "released", *STEPWISE)


@dataclass
class CompareArguments:
    output_dir: str = field(metadata={"help": "folder of rows/ and compare.md"})
    dataset: str = _option("chains", DATASETS)
    split: str = _option("test", "split of the dataset")
    limit: int = _option(300, "problems; 0 = all")
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "seeds of all that samples"})
    samples: list[int] = field(
        default_factory=lambda: [4, 8, 16, 32], metadata={"help": "N of the best-of-N whose FLOPs are the rungs"}
    )
    rivals: list[str] = field(
        default_factory=lambda: ["control", "shuffled", "paper"],
        metadata={"help": f"other searches at each rung: {', '.join(RIVALS)}"},
    )
    lams: list[float] = field(
        default_factory=list,
        metadata={
            "help": "λ = 1/β to run the search with, at the FLOPs of the largest best-of-N: the curve of the step"
        },
    )
    title: str = _option("Methods at equal FLOPs", "title of the page")

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be distinct and not empty")
        if not self.samples or min(self.samples) < 2 or self.samples != sorted(set(self.samples)):
            raise ValueError("samples must be rising numbers of at least 2")
        if any(not lam > 0 for lam in self.lams) or len(set(self.lams)) < len(self.lams):
            raise ValueError("lams must be distinct positive numbers")
        unknown = [name for name in self.rivals if name not in RIVALS]
        if unknown:
            raise ValueError(f"unknown rival {unknown[0]!r}: choose from {', '.join(RIVALS)}")


class Comparison:
    """The methods of the ladder and their rows."""

    def __init__(self, args: CompareArguments, bench: Bench, store: RowStore):
        self.args, self.bench, self.store = args, bench, store

    def run(self, problems: Sequence[Any]) -> dict[str, list[str]]:
        """Make what rows are missing; the methods of each rung, ours first."""
        args, sizes = self.args, self.args.samples
        searches = [f"{name}@best_of_{size}" for name in ("nabla", *args.rivals) for size in sizes]
        rivals = [RIVAL] if self.bench.reward.rival else []
        check(searches, self.bench, {})
        with AnswerChecker() as checker:
            run_steps([self.bench.pool([1, *sizes], sizes, weighted=sizes)], problems, self.store, checker)
            majority = {size: self.affordable(size) for size in sizes}
            run_steps([self.bench.pool([], sorted(set(majority.values())))], problems, self.store, checker)
            wanted = steps(["greedy", *searches, *rivals], self.bench, {}, self.flops)
            run_steps(wanted, problems, self.store, checker)
        return {
            f"best_of_{size}": [
                f"nabla@best_of_{size}",
                f"best_of_{size}",
                f"weighted_best_of_{size}",
                f"self_consistency_{majority[size]}",
                "greedy",
                *(f"{search}@best_of_{size}" for search in args.rivals),
                *rivals,
            ]
            for size in sizes
        }

    def sweep(self, problems: Sequence[Any]) -> dict[float, str]:
        """The search at every λ asked for; λ → method."""
        if not self.args.lams:
            return {}
        setter = f"best_of_{self.args.samples[-1]}"
        config = budgeted(replace(self.bench.config, beta=1.0, kl=None), self.flops(setter))
        methods = {lam: f"nabla_lambda_{lam:g}@{setter}" for lam in self.args.lams}
        wanted = [self.bench.search(name, replace(config, beta=1 / lam)) for lam, name in methods.items()]
        with AnswerChecker() as checker:
            run_steps(wanted, problems, self.store, checker)
        return methods

    def flops(self, method: str) -> float:
        return budget_flops(self.store, method)

    def affordable(self, size: int) -> int:
        """As many samples without scoring as cost what best-of-`size` does."""
        each = self.flops(f"self_consistency_{size}") / size
        return max(2, round(self.flops(f"best_of_{size}") / each))


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    dataclasses = [CompareArguments, ModelArguments, ReasonerConfig, StepConfig]
    args, models, config, stepwise = parse(dataclasses, argv, presets=PRESETS)
    folder = Path(args.output_dir)
    with hold(folder):
        compare(folder, args, models, config, stepwise, shlex.join(["python", "recipes/research/compare.py", *argv]))


def compare(
    folder: Path,
    args: CompareArguments,
    models: ModelArguments,
    config: ReasonerConfig,
    stepwise: StepConfig,
    command: str,
) -> None:
    problems = graded(load_problems(args.dataset, split=args.split, limit=args.limit or None))
    models.prompting().check(problems)
    policy, reward = models.load(4 * config.batch_size)
    settings = models.settings() | search_settings(config)
    settings["adapter"] = adapter_identity(models.adapter) if models.adapter else ""
    settings |= {**task_settings(args.dataset), "split": args.split}
    claim_settings(folder / "compare.settings.json", settings)
    warn_past_trust(reward, config, max(args.samples))
    store = RowStore(folder / "rows", hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16])
    bench = Bench(policy, reward, config, tuple(args.seeds), stepwise=stepwise)
    if own := stepwise_settings([f"{name}@best_of_{args.samples[0]}" for name in args.rivals], bench):
        claim_settings(folder / "stepwise.settings.json", own)
    comparison = Comparison(args, bench, store)
    rungs, lams = comparison.run(problems), comparison.sweep(problems)
    asked = {name for names in rungs.values() for name in names} | set(rungs) | set(lams.values())
    made, _ = of_problems(store.read(), problems)
    rows = [row for row in made if row["method"] in asked and row["seed"] in args.seeds]
    found = equal_flops.climb(rows, rungs)
    facts = models.facts(title=args.title, command=command, task=args.dataset, seeds=args.seeds)
    facts["files"] = {"rows": "rows.jsonl", "ladder": "compare.json", "page": "compare.md"}
    store_results(folder, rows, facts)
    (folder / "compare.json").write_text(json.dumps([rung.to_dict() for rung in found], indent=1), encoding="utf-8")
    text = equal_flops.page(found, rows, args.title, command)
    if lams:
        curve = step_curve.read(rows, lams)
        step_curve.draw(folder / "step.png", curve, f"{args.dataset}, {len(problems)} problems")
        parts = [
            "## The size of the step",
            step_curve.verdict(curve) + ".",
            step_curve.table(curve),
            "![step](step.png)",
        ]
        text += "\n" + "\n\n".join(parts) + "\n"
    (folder / "compare.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(run_main(main))
