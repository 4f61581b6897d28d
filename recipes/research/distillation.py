"""Compare ways to keep the gain of a search in weights, at equal FLOPs, also with more of the same: expert iteration.

    python recipes/research/distillation.py --config recipes/tiny/distillation.yaml
    python recipes/research/distillation.py --config recipes/tiny/distillation.yaml --runs sft on-policy-distillation

A run is METHOD[:DIVERGENCE][@TFLOPS]. Each trains a LoRA adapter until its training has cost --training_tflops, or
what stands behind @. FLOPs of training are those of `train.json`: samples, rewards, teachers and steps. The search
that made the traces is counted apart. expert-iteration draws --num_draws responses to each problem, trains the
original policy on the right ones, and draws again from it. Its draws are part of its budget. With --answers_dir it
trains once, on answers that recipes/reward.py has drawn.

OUT/distillation.json has the results, OUT/base the evaluation of the policy itself, and OUT/RUN/ each adapter and its
evaluation, from where `nabla-trl export` takes both. Runs that exist are kept.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nabla_trl import EvaluationResult, evaluate, generate_traces, load_policy, load_problems, train
from nabla_trl.cli.arguments import DATASET_HELP, POLICY_HELP, REWARD_HELP
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import FlopCounter, measure_model_size
from nabla_trl.models.policy import Policy
from nabla_trl.report.markdown import format_table
from nabla_trl.reward_training.data import read_samples
from nabla_trl.search.config import SearchConfig, SharedBudget
from nabla_trl.traces.build import build_response_trace, grade_traces
from nabla_trl.traces.schema import Trace
from nabla_trl.training.checkpoints import find_trained_weights, get_policy_label
from nabla_trl.training.offline import (
    DEFAULT_DIVERGENCES,
    OFFLINE_METHODS,
    TRAIN_METHODS,
    TrainingResult,
    TrainOptions,
)
from nabla_trl.training.peft import LoraArguments
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option, required_option, split_names
from nabla_trl.utils.files import read_json_file, write_atomic
from nabla_trl.utils.identity import claim_settings
from nabla_trl.utils.statistics import adjust_differences, paired_difference

EXPERT_ITERATION = "expert-iteration"
BASE = "base"


@dataclass
class DistillationArguments:
    """Models, problems, runs and budgets."""

    output_dir: str = required_option("Folder to write distillation.json and the runs to.")
    policy: str = required_option(POLICY_HELP)
    reward: str = required_option(REWARD_HELP)
    dataset: str = required_option(DATASET_HELP)
    runs: list[str] = option(
        ["sft", "soft-targets", "on-policy-distillation"],
        "Runs, separated by commas or spaces, each METHOD[:DIVERGENCE][@TFLOPS].",
    )
    training_tflops: float = option(0.5, "TFLOPs of each training for which no other number is given.")
    max_train_problems: int = option(600, "Training problems.")
    eval_dataset: str = option("", "Data set of the held-out problems (default: the test split of --dataset).")
    max_eval_problems: int = option(300, "Held-out problems.")
    max_kl_problems: int = option(
        300, "Held-out problems of the KL to the base policy and of the reward, which both cost a reading each."
    )
    num_eval_samples: int = option(4, "Responses to each held-out problem, for the sampled accuracy and pass@k.")
    dtype: str | None = option(
        None, "Data type of frozen models: float32, bfloat16 or float16 (default: float32 on CPUs)."
    )
    train_batch_size: int = option(32, "Rows or responses of an optimizer step.")
    offline_learning_rate: float = option(2e-3, "Learning rate of methods on traces, and of expert iteration.")
    online_learning_rate: float = option(1e-3, "Learning rate of methods that sample.")
    dpo_learning_rate: float = option(3e-4, "Learning rate of dpo.")
    num_draws: int = option(4, "Responses per problem and iteration of expert iteration.")
    num_iterations: int = option(2, "Iterations of expert iteration.")
    answers_dir: str = option(
        "",
        "Folder of answers of the policy that recipes/reward.py has drawn (its --samples_dir). Expert iteration takes "
        "them in place of its own draws, for one iteration, and is charged for drawing them.",
    )
    seed: int = option(0, "Seed of searches, trainings and evaluations.")

    def __post_init__(self) -> None:
        self.runs = split_names(self.runs)
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
        TrainOptions(divergence=divergence or None)  # refuses what is no divergence
        with suppress(ValueError):
            tflops = float(budget or tflops)
            if 0 < tflops < math.inf:
                return cls(method, divergence or DEFAULT_DIVERGENCES.get(method, ""), tflops)
        raise ValueError(f"{text}: the TFLOPs of a training must be a number above 0, not {budget or tflops}")

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.method, self.divergence, f"{self.tflops:g}T") if part)


class DistillationStudy:
    """The traces of a search, and what is trained on them or beside them."""

    def __init__(
        self, args: DistillationArguments, lora: LoraArguments, search_config: SearchConfig, budget: SharedBudget
    ):
        self.args, self.lora, self.search_config, self.budget = args, lora, search_config, budget
        self.folder = Path(args.output_dir)
        self.traces: list[Trace] = []

    def run(self, run: Run | None) -> dict[str, Any]:
        """Return the record of a run: FLOPs of training and of the search, and the metrics of the trained policy.

        Args:
            run: None for the policy itself.
        """
        folder = self.folder / (run.name if run else BASE)
        file = folder / "result.json"
        if file.exists():
            return dict(read_json_file(file))
        if run is None:
            record: dict[str, Any] = {"run": BASE, "training_flops": 0.0, "search_flops": 0.0}
            record |= self.evaluate("", folder)
        elif run.method == EXPERT_ITERATION:
            training_flops, last = self.iterate(run, folder)
            record = {"run": run.name, "training_flops": training_flops, "search_flops": 0.0}
            record |= self.evaluate("sft", last)
        else:
            result = self.train(run, folder, self.find_num_steps(run))
            search_flops = sum(trace.cost.flops for trace in self.traces) if run.method in OFFLINE_METHODS else 0.0
            record = {"run": run.name, "training_flops": result.flops, "search_flops": search_flops}
            record |= self.evaluate(get_policy_label(run.method), folder)
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
                dtype=args.dtype,
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
            "gradient_checkpointing": False,  # it saves memory that short responses do not need
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": max(1, num_steps // 20),
            "seed": self.args.seed,
        }
        config |= {"divergence": run.divergence} if run.divergence else {}
        options: dict[str, Any] = {"output_dir": folder, "config": config, "lora": self.lora, "dtype": self.args.dtype}
        if run.method == EXPERT_ITERATION:
            config["sft_selection"] = "correct"
            return train("sft", self.args.policy, traces or [], **options)
        if is_offline:
            return train(run.method, self.args.policy, self.get_traces(), **options)
        search = {name: value for name, value in self.search_config.to_dict().items() if name != "soft_target_top_k"}
        return train(
            run.method,
            self.args.policy,
            self.args.dataset,
            reward=self.args.reward,
            search=search,
            max_problems=self.args.max_train_problems,
            **options,
        )

    def iterate(self, run: Run, folder: Path) -> tuple[float, Path]:
        """Run expert iteration within a budget. Returns its FLOPs and the folder of the last training."""
        args, spent = self.args, 0.0
        policy = load_policy(args.policy, dtype=args.dtype)
        num_iterations = 1 if args.answers_dir else args.num_iterations
        for iteration in range(num_iterations):
            part = folder / f"iteration{iteration}"
            traces = self.read_answers(policy) if args.answers_dir else self.draw_answers(policy)
            spent += sum(trace.cost.flops for trace in traces)
            probe = self.train(run, part / "probe", 2, traces)
            budget = run.tflops * 1e12 * (iteration + 1) / num_iterations - spent
            result = self.train(run, part, max(1, round(budget * probe.steps / probe.flops)), traces)
            spent += result.flops
            adapter = part / "trained" / "sft" / "adapter"
            policy = load_policy(args.policy, adapter=str(adapter), dtype=args.dtype)
        return spent, part

    def draw_answers(self, policy: Policy) -> list[Trace]:
        """Return `num_draws` answers of a policy to each training problem, as traces without rounds."""
        draws = self.search_config.with_no_gradient().with_options(
            max_rounds=0, max_rollouts=1, patience=0, num_starts=1, num_chains=1, soft_target_top_k=0
        )
        return [
            trace
            for number in range(self.args.num_draws)
            for trace in generate_traces(
                self.args.dataset,
                policy,
                _give_no_reward,
                config=draws,
                seed=1000 * self.args.seed + number,
                max_problems=self.args.max_train_problems,
            )
        ]

    def read_answers(self, policy: Policy) -> list[Trace]:
        """Return the answers of --answers_dir as traces, each problem's prompt charged once."""
        problems = load_problems(self.args.dataset, split="train", max_problems=self.args.max_train_problems)
        by_id = {problem.id: problem for problem in problems}
        file = Path(self.args.answers_dir, "round-0.0.jsonl")
        known = {problem.id: problem for problem in load_problems(self.args.dataset, split="train")}
        samples = [sample for sample in read_samples(file, known) if sample.problem.id in by_id]
        if missing := by_id.keys() - {sample.problem.id for sample in samples}:
            raise ValueError(f"{file} has no answers to {len(missing)} of {len(problems)} training problems")
        size = measure_model_size(policy.model, "policy")
        num_answers: Counter[str] = Counter()
        traces = []
        for sample in samples:
            counter, num_prompt = FlopCounter(), len(sample.prompt_ids)
            if not num_answers[sample.problem.id]:
                counter.add_flops("draw", size, "prefill", 0, num_prompt - 1, num_head_positions=0)
            counter.add_flops("draw", size, "decode", num_prompt - 1, len(sample.response_ids))
            traces.append(
                build_response_trace(
                    policy,
                    sample.problem,
                    method="samples",
                    seed=num_answers[sample.problem.id],
                    prompt_ids=sample.prompt_ids,
                    response_ids=sample.response_ids,
                    reward=0.0,
                    cost=counter.get_total_cost(),
                    meta={"tokenizer_hash": policy.tokenizer_hash},
                )
            )
            num_answers[sample.problem.id] += 1
        with AnswerChecker() as checker:
            return grade_traces(traces, checker)

    def evaluate(self, label: str, folder: Path) -> dict[str, Any]:
        """Return the metrics of a policy on held-out problems with their intervals, and its values by problem.

        Args:
            label: of the trained policy in `folder`, or "" for the policy itself.
        """
        prefix, n = f"{label}_" if label else "", self.args.num_eval_samples
        adapter = str(find_trained_weights(folder, label.replace("_", "-"))) if label else None
        methods = [f"{prefix}greedy", f"{prefix}samples_{n}"]
        if label:  # the rows of the policy itself, with which an exported model's card compares
            if not (folder / "rows").exists():
                shutil.copytree(self.folder / BASE / "rows", folder / "rows")
            methods += ["greedy", f"samples_{n}"]
        answered = self.evaluate_methods(methods, folder, self.args.max_eval_problems)
        drawn = "distilled_best_of_1" if label else "best_of_1"
        scored = self.evaluate_methods([drawn], folder / "kl", self.args.max_kl_problems, adapter=adapter)
        greedy, sampled = ([row for row in answered.rows if row.method == method] for method in methods[:2])
        return {
            "greedy": answered.summary[f"accuracy.{prefix}greedy"],
            "sampled": answered.summary[f"avg@{n}.{label or BASE}"],
            f"pass@{n}": answered.summary[f"pass@{n}.{label or BASE}"],
            "reward": scored.summary[f"reward.{drawn}"],
            "KL to base": scored.summary[f"kl.{drawn}"],
            "values": [
                {row.problem: float(bool(row.correct)) for row in greedy},
                {row.problem: sum(bool(correct) for _, correct in row.samples or ()) / n for row in sampled},
            ],
        }

    def evaluate_methods(
        self, methods: list[str], folder: Path, max_problems: int, adapter: str | None = None
    ) -> EvaluationResult:
        """Evaluate methods on held-out problems."""
        return evaluate(
            self.args.eval_dataset or self.args.dataset,
            self.args.policy,
            self.args.reward,
            adapter=adapter,
            methods=methods,
            seeds=[self.args.seed],
            config=self.search_config.with_options(soft_target_top_k=0),
            max_problems=max_problems,
            output_dir=folder,
            dtype=self.args.dtype,
        )


def _give_no_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Return 0 for every response: expert iteration selects by the answers alone."""
    return [0.0] * len(completions)


def format_results(records: Sequence[dict[str, Any]], num_samples: int) -> str:
    """Return the records as a Markdown table, each accuracy with its paired difference from the policy itself.

    Args:
        records: the first one is that of the policy itself. P-values of all differences are adjusted together (Holm).
        num_samples: responses to each problem of the sampled accuracy.
    """
    base = records[0]
    differences = {}
    for record in records[1:]:
        for column, (name, trials) in enumerate((("greedy", 1), ("sampled", num_samples))):
            values = [{key: [value] for key, value in item["values"][column].items()} for item in (record, base)]
            differences[record["run"], name] = paired_difference(*values, trials_per_cell=trials)
    differences = adjust_differences(differences)
    metrics = [name for name in base if isinstance(base[name], dict)]
    lines = []
    for record in records:
        total = record["training_flops"] + record["search_flops"]
        cells = [record["run"], f"{record['training_flops'] / 1e12:.2f}", f"{total / 1e12:.2f}"]
        for name in metrics:
            value, low, high = (record[name][key] for key in ("value", "low", "high"))
            known = all(map(math.isfinite, (low, high)))
            cells.append(f"{value:.3f} [{low:.3f}, {high:.3f}]" if known else f"{value:.3f}")
            if (difference := differences.get((record["run"], name))) is not None:
                ends = f"[{difference.low:+.3f}, {difference.high:+.3f}]"
                cells[-1] += f", {difference.value:+.3f} {ends}, p = {difference.p_value:.3f}"
        lines.append(cells)
    return format_table(["run", "TFLOPs of training", "with the search", *metrics], lines)


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    dataclasses = [DistillationArguments, LoraArguments, SearchConfig, SharedBudget]
    args, lora, search_config, budget = parse_dataclasses(dataclasses, argv)
    folder = Path(args.output_dir)
    kept = ("runs", "output_dir", "training_tflops")
    settings = {name: str(value) for name, value in (asdict(args) | asdict(lora)).items() if name not in kept}
    settings |= search_config.get_settings() | budget.get_settings()
    claim_settings(folder / "distillation.settings.json", settings)
    study = DistillationStudy(args, lora, search_config, budget)
    records = [study.run(None)]
    for text in args.runs:
        records.append(study.run(Run.parse(text, args.training_tflops)))
        write_atomic(folder / "distillation.json", json.dumps(records, indent=1))
        print(format_results(records, args.num_eval_samples), flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
