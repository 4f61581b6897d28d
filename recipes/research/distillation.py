"""Compare ways to keep the gain of a search in weights, at equal FLOPs, also with more of the same: expert iteration.

    python recipes/research/distillation.py --config recipes/tiny/distillation.yaml
    python recipes/research/distillation.py --config recipes/tiny/distillation.yaml --runs sft on-policy-distillation

A run is METHOD[:DIVERGENCE][@TFLOPS]. Each trains a LoRA adapter until its training has cost --training_tflops, or
what stands behind @. FLOPs of training are those of `train.json`: samples, rewards, teachers and steps. The search
that made the traces is counted apart. expert-iteration draws --num_draws responses to each problem, trains the
original policy on the right ones, and draws again from it. Its draws are part of its budget.

OUT/distillation.json has the results, and OUT/RUN/ each adapter and its evaluation. Runs that exist are kept.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nabla_trl import evaluate, generate_traces, load_policy, train
from nabla_trl.cli.arguments import DATASET_HELP, POLICY_HELP, REWARD_HELP
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.report.markdown import format_table
from nabla_trl.search.config import SearchConfig, SharedBudget
from nabla_trl.traces.schema import Trace
from nabla_trl.training.offline import DEFAULT_DIVERGENCES, OFFLINE_METHODS, TRAIN_METHODS, TrainingResult
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.files import read_json_file, write_atomic
from nabla_trl.utils.identity import claim_settings

EXPERT_ITERATION = "expert-iteration"
METRICS = {
    "greedy": "accuracy.distilled_greedy",
    "sampled": "accuracy.distilled_best_of_1",
    "pass@4": "pass@4.distilled",
    "reward": "reward.distilled_best_of_1",
    "KL to base": "kl.distilled_best_of_1",
}


@dataclass
class DistillationArguments:
    """Models, problems, runs and budgets."""

    output_dir: str = required_option("Folder to write distillation.json and the runs to.")
    policy: str = required_option(POLICY_HELP)
    reward: str = required_option(REWARD_HELP)
    dataset: str = required_option(DATASET_HELP)
    runs: list[str] = option(
        ["sft", "soft-targets", "on-policy-distillation"], "Runs, each METHOD[:DIVERGENCE][@TFLOPS]."
    )
    training_tflops: float = option(0.5, "TFLOPs of each training for which no other number is given.")
    max_train_problems: int = option(600, "Training problems.")
    max_eval_problems: int = option(300, "Held-out problems.")
    train_batch_size: int = option(32, "Rows or responses of an optimizer step.")
    offline_learning_rate: float = option(2e-3, "Learning rate of methods on traces, and of expert iteration.")
    online_learning_rate: float = option(1e-3, "Learning rate of methods that sample.")
    dpo_learning_rate: float = option(3e-4, "Learning rate of dpo.")
    num_draws: int = option(4, "Responses per problem and iteration of expert iteration.")
    num_iterations: int = option(2, "Iterations of expert iteration.")
    seed: int = option(0, "Seed of searches, trainings and evaluations.")

    def __post_init__(self) -> None:
        checks = Checks()
        for run in self.runs:
            checks.call(Run.parse, run, self.training_tflops)
        checks.raise_faults()


@dataclass(frozen=True)
class Run:
    """One training: its method, its divergence ("" where it has none) and its budget in TFLOPs."""

    method: str
    divergence: str
    tflops: float

    @classmethod
    def parse(cls, text: str, tflops: float) -> Run:
        """Return the run of METHOD[:DIVERGENCE][@TFLOPS]."""
        name, _, budget = text.partition("@")
        method, _, divergence = name.partition(":")
        if method not in (*TRAIN_METHODS, EXPERT_ITERATION):
            raise ValueError(f"unknown method {method!r}: choose from {', '.join((*TRAIN_METHODS, EXPERT_ITERATION))}")
        if divergence and method not in DEFAULT_DIVERGENCES:
            raise ValueError(f"{method} has no divergence")
        return cls(method, divergence or DEFAULT_DIVERGENCES.get(method, ""), float(budget or tflops))

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.method, self.divergence, f"{self.tflops:g}T") if part)


class DistillationStudy:
    """The traces of a search, and what is trained on them or beside them."""

    def __init__(self, args: DistillationArguments, search_config: SearchConfig, budget: SharedBudget):
        self.args, self.search_config, self.budget = args, search_config, budget
        self.folder = Path(args.output_dir)
        self.traces: list[Trace] = []

    def run(self, run: Run) -> dict[str, Any]:
        """Return the record of a run: FLOPs of training and of the search, and the metrics of the trained policy."""
        folder = self.folder / run.name
        file = folder / "result.json"
        if file.exists():
            return dict(read_json_file(file))
        if run.method == EXPERT_ITERATION:
            training_flops, adapter = self.iterate(run, folder)
        else:
            result = self.train(run, folder, self.find_num_steps(run))
            training_flops, adapter = result.flops, folder / "trained" / run.method / "adapter"
        search_flops = sum(trace.cost.flops for trace in self.traces) if run.method in OFFLINE_METHODS else 0.0
        record = {"run": run.name, "training_flops": training_flops, "search_flops": search_flops}
        record |= self.evaluate(adapter, folder / "eval")
        write_atomic(file, json.dumps(record, indent=1))
        return record

    def get_traces(self) -> list[Trace]:
        """Return the traces of the search, which is run once."""
        args = self.args
        if not self.traces:
            self.traces = generate_traces(
                args.dataset,
                args.policy,
                args.reward,
                config=self.search_config,
                seed=args.seed,
                max_problems=args.max_train_problems,
                output_dir=self.folder,
                **vars(self.budget),
            )
        return self.traces

    def find_num_steps(self, run: Run) -> int:
        """Return the optimizer steps of a budget, from the FLOPs of a training of two steps."""
        probe = self.train(run, self.folder / "probes" / run.name, 2)
        return max(1, round(run.tflops * 1e12 * probe.steps / probe.flops))

    def train(self, run: Run, folder: Path, num_steps: int, traces: list[Trace] | None = None) -> TrainingResult:
        """Train the original policy by a method on traces, or on the training problems."""
        is_offline = run.method in OFFLINE_METHODS or run.method == EXPERT_ITERATION
        rates = {True: self.args.offline_learning_rate, False: self.args.online_learning_rate}
        config = {
            "max_steps": num_steps,
            "per_device_train_batch_size": self.args.train_batch_size,
            "learning_rate": self.args.dpo_learning_rate if run.method == "dpo" else rates[is_offline],
            "lr_scheduler_type": "cosine",
            "warmup_steps": min(10, num_steps // 4),
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": max(1, num_steps // 20),
            "seed": self.args.seed,
        }
        config |= {"divergence": run.divergence} if run.divergence else {}
        if run.method == EXPERT_ITERATION:
            config["sft_selection"] = "correct"
            return train("sft", self.args.policy, traces or [], output_dir=folder, config=config)
        if is_offline:
            return train(run.method, self.args.policy, self.get_traces(), output_dir=folder, config=config)
        return train(
            run.method,
            self.args.policy,
            self.args.dataset,
            reward=self.args.reward,
            search={
                name: value for name, value in self.search_config.to_dict().items() if name != "soft_target_top_k"
            },
            max_problems=self.args.max_train_problems,
            output_dir=folder,
            config=config,
        )

    def iterate(self, run: Run, folder: Path) -> tuple[float, Path]:
        """Run expert iteration within a budget. Returns its FLOPs and the last adapter."""
        args, spent, policy = self.args, 0.0, load_policy(self.args.policy)
        draws = self.search_config.with_no_gradient().with_options(max_rounds=0, max_rollouts=1, patience=0)
        for iteration in range(args.num_iterations):
            part = folder / f"iteration{iteration}"
            traces = [
                trace
                for number in range(args.num_draws)
                for trace in generate_traces(
                    args.dataset,
                    policy,
                    _give_no_reward,
                    config=draws,
                    seed=1000 * args.seed + number,
                    max_problems=args.max_train_problems,
                )
            ]
            spent += sum(trace.cost.flops for trace in traces)
            probe = self.train(run, part / "probe", 2, traces)
            budget = run.tflops * 1e12 * (iteration + 1) / args.num_iterations - spent
            result = self.train(run, part, max(1, round(budget * probe.steps / probe.flops)), traces)
            spent += result.flops
            adapter = part / "trained" / "sft" / "adapter"
            policy = load_policy(args.policy, adapter=str(adapter))
        return spent, adapter

    def evaluate(self, adapter: Path, folder: Path) -> dict[str, Any]:
        """Return the metrics of a trained policy on held-out problems, each with its 95% interval."""
        result = evaluate(
            self.args.dataset,
            self.args.policy,
            self.args.reward,
            adapter=str(adapter),
            methods=["distilled_greedy", "distilled_best_of_1", "distilled_samples_4"],
            seeds=[self.args.seed],
            config=self.search_config.with_options(soft_target_top_k=0),
            max_problems=self.args.max_eval_problems,
            output_dir=folder,
        )
        return {name: result.summary[key] for name, key in METRICS.items()}


def _give_no_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Return 0 for every response: expert iteration selects by the answers alone."""
    return [0.0] * len(completions)


def format_results(records: Sequence[dict[str, Any]]) -> str:
    """Return the records as a Markdown table."""
    lines = []
    for record in records:
        total = record["training_flops"] + record["search_flops"]
        cells = [record["run"], f"{record['training_flops'] / 1e12:.2f}", f"{total / 1e12:.2f}"]
        for name in METRICS:
            value, low, high = (record[name][key] for key in ("value", "low", "high"))
            known = all(map(math.isfinite, (low, high)))
            cells.append(f"{value:.3f} [{low:.3f}, {high:.3f}]" if known else f"{value:.3f}")
        lines.append(cells)
    return format_table(["run", "TFLOPs of training", "with the search", *METRICS], lines)


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    args, search_config, budget = parse_dataclasses([DistillationArguments, SearchConfig, SharedBudget], argv)
    folder = Path(args.output_dir)
    settings = {name: str(value) for name, value in asdict(args).items() if name not in ("runs", "output_dir")}
    settings |= search_config.get_settings() | budget.get_settings()
    claim_settings(folder / "distillation.settings.json", settings)
    study = DistillationStudy(args, search_config, budget)
    records = []
    for text in args.runs:
        records.append(study.run(Run.parse(text, args.training_tflops)))
        write_atomic(folder / "distillation.json", json.dumps(records, indent=1))
        print(format_results(records), flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
